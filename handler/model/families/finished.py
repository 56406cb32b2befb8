"""What a pipeline has drawn, or is drawing, as the arrays that all others want: exact in size, judged, on the host."""

from collections.abc import Callable
from typing import Any

import torch

from handler.core.errors import NumericalError
from handler.core.recipe import Recipe
from handler.model.families import edits
from handler.model.preview import SHRINK, Projection


def preview(
    heading: Callable[[], Any], projection: Projection, canvas: tuple[int, int], size: tuple[int, int], i: int
) -> Any:
    """What picture `i` is heading for: uint8 (height, width, 3), an eighth of `size`, which lies amid `canvas`."""
    small = projection.draw(heading()[i : i + 1], canvas)
    return _crop(small, (-(-size[0] // SHRINK), -(-size[1] // SHRINK))).cpu().numpy()


def _fetched(picture: torch.Tensor, recipe: Recipe) -> tuple[torch.Tensor, torch.Tensor]:
    """Of (3, height, width) from 0 to 1, on their way to the host: whether it is finite, and not black; its pixels.

    Those are uint8 (height, width, 3), of its size. From a GPU they come to page-locked memory, and nothing waits.
    """
    shades = picture.float() * 255
    pixels = (shades if recipe.sampling else shades.round_()).to(torch.uint8)  # ComfyUI's SaveImage cuts
    sound = torch.stack([torch.isfinite(picture).all(), pixels.any()])
    cropped = _crop(pixels.permute(1, 2, 0), recipe.size)
    return sound.to("cpu", non_blocking=True), cropped.to("cpu", non_blocking=True)


def finished(
    pictures: torch.Tensor, latents: torch.Tensor, recipe: Recipe, projection: Projection, wait: Callable[[], None]
) -> list[Any]:
    """Each picture as `run` gives it, for one wait."""
    on_host = [_fetched(picture, recipe) for picture in pictures]
    wait()
    each = zip(on_host, pictures, latents.split(1), strict=True)
    return [_judged(*one, recipe, projection) for one in each]


def _judged(
    on_host: tuple[torch.Tensor, torch.Tensor],
    picture: torch.Tensor,
    latents: torch.Tensor,
    recipe: Recipe,
    projection: Projection,
) -> Any:
    """The pixels that have come to the host, as an array; a NumericalError if the picture is broken."""
    sound, pixels = on_host
    finite, lit = sound.tolist()
    if not finite:
        return NumericalError("The model produced NaN or infinite values; no picture was made.")
    if not lit:
        return NumericalError("The model produced an all-black picture.")
    # Where a mask keeps, what the last step headed for is not what was decoded; a LoRA may make latents of any size;
    # ComfyUI's sampling may stop on the way.
    if not (recipe.mask or recipe.loras or recipe.sampling):
        projection.learn(latents, picture)
    return edits.pasted(pixels.numpy(), recipe)


def _crop(pixels: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """The middle of `pixels`, exactly `size` (width, height), contiguous."""
    width, height = size
    top, left = (pixels.shape[0] - height) // 2, (pixels.shape[1] - width) // 2
    return pixels[top : top + height, left : left + width].contiguous()
