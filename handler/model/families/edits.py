"""Edits: an image drawn anew, in part or where a mask says, by diffusers' own pipelines for that.

They share the components of the one that draws from text. Whatever grid a model stands on, the image lies in the middle
of the canvas, its edges continued, where `_crop` will look for it.
"""

import inspect
from fractions import Fraction
from types import ModuleType
from typing import Any

import numpy
from PIL import Image

from handler.core.recipe import Recipe

Size = tuple[int, int]


def pipeline_for(recipe: Recipe, family: ModuleType, pipeline: Any) -> Any:
    """The pipeline that draws `recipe`: `pipeline`, or one with its components. Making one takes milliseconds.

    Of ComfyUI's sampling the scheduler has the mask.
    """
    if recipe.strength is None:
        return pipeline
    kind = family.INPAINT if recipe.mask and not recipe.sampling else family.IMAGE_TO_IMAGE
    known = {**pipeline.config, **pipeline.components}
    made = kind(**{name: known[name] for name in inspect.signature(kind).parameters if name in known})
    made.set_progress_bar_config(disable=True)
    return made


def cell(recipe: Recipe, family: ModuleType, pipeline: Any) -> int:
    """How many pixels wide is what the mask of `recipe` keeps or draws anew as one; 1 where it has none."""
    width: int = family.MASK_CELL * pipeline.vae_scale_factor if recipe.mask else 1
    return width


def arguments(recipe: Recipe, canvas: Size, cell: int) -> dict[str, Any]:
    """What its pipeline must know of the images of `recipe`, whose mask it takes in squares of `cell` pixels."""
    if not recipe.images:
        return {}
    first, *others = recipe.images
    if recipe.strength is None:
        return {"image": [Image.fromarray(image.rgb) for image in recipe.images]}
    source = _sized(first.rgb, recipe.size, Image.Resampling.LANCZOS)
    # Exact, for some pipelines round up what others round down; ComfyUI's sigmas are those of its share.
    share = Fraction(1) if recipe.sampling else Fraction(recipe.taken, recipe.steps)
    known = {"image": Image.fromarray(_spread(source, recipe.size, canvas)), "strength": share}
    if recipe.mask and not recipe.sampling:
        known["mask_image"] = _drawn_anew(kept_on(recipe, canvas), canvas, cell)
    if others:
        known["image_reference"] = [Image.fromarray(image.rgb) for image in others]
    return known


def pasted(drawn: Any, recipe: Recipe) -> Any:
    """`drawn`, with the image where its mask keeps that: there not one pixel is another. ComfyUI pastes nothing."""
    if not recipe.mask or recipe.sampling:
        return drawn
    source = _sized(recipe.images[0].rgb, recipe.size, Image.Resampling.LANCZOS)
    both = Image.composite(Image.fromarray(source), Image.fromarray(drawn), Image.fromarray(_kept(recipe)))
    return numpy.array(both)


def kept_on(recipe: Recipe, canvas: Size) -> Any:
    """Where the image of `recipe` stays, on the whole canvas: uint8 (height, width), 255 where it does."""
    return _spread(_kept(recipe), recipe.size, canvas)


def _kept(recipe: Recipe) -> Any:
    assert recipe.mask
    return _sized(recipe.mask.kept, recipe.size, Image.Resampling.BILINEAR)


def _drawn_anew(kept: Any, canvas: Size, cell: int) -> Image.Image:
    """diffusers' mask, white where to draw: every cell that has a pixel which is not wholly kept."""
    width, height = canvas
    cells = (kept < 255).reshape(height // cell, cell, width // cell, cell).any((1, 3))
    return Image.fromarray(cells.repeat(cell, 0).repeat(cell, 1))


def _sized(pixels: Any, size: Size, filter_: Any) -> Any:
    """`pixels` at `size`; the very same if that is theirs."""
    image = Image.fromarray(pixels)
    return pixels if image.size == size else numpy.asarray(image.resize(size, filter_))


def _spread(pixels: Any, size: Size, canvas: Size) -> Any:
    """`pixels` in the middle of the canvas, their edges continued."""
    left, top = ((whole - part) // 2 for whole, part in zip(canvas, size, strict=True))
    edges = [(top, canvas[1] - size[1] - top), (left, canvas[0] - size[0] - left), (0, 0)]
    return numpy.pad(pixels, edges[: pixels.ndim], mode="edge")
