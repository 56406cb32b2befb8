"""How many pictures are drawn at once: as many as was measured to pay, or as `gains` has learned, all of one shape.

Small pictures leave a GPU idle between kernels, so several take hardly longer than one. Together they never have more
pixels than one of 1024x1024, so that they need no more memory.
"""

from dataclasses import replace
from typing import Literal

from handler.core.recipe import MOST, Recipe
from handler.volume.receipts import Gains

PIXELS = 1024 * 1024
PAYS = 1.1  # times the pictures a second of one by one; less is not worth that all wait for all
COUNTS = tuple(count for count in (1, 2, 4, 8) if count <= MOST)  # that are tried
Size = tuple[int, int]


def room(size: Size) -> int:
    """How many pictures of `size` may be drawn at once at most."""
    return max(1, min(MOST, PIXELS // (size[0] * size[1])))


def at_once(asked: Literal["auto"] | int, gains: Gains, size: Size) -> int:
    """How many pictures of `size` to draw at once: as many as `asked`, or as pay by what was measured.

    What was measured of a size holds for smaller ones too, which gain more.
    """
    if asked != "auto":
        return min(asked, room(size))
    measured = {_pixels(name): times for name, times in gains.items()}
    larger = min((pixels for pixels in measured if pixels >= size[0] * size[1]), default=None)
    paying = {int(count): times for count, times in measured[larger].items() if times >= PAYS} if larger else {}
    return min(max(paying, key=lambda count: paying[count], default=1), room(size))


def _pixels(name: str) -> int:
    width, height = name.split("x")
    return int(width) * int(height)


def alike(one: Recipe, other: Recipe) -> bool:
    """Whether two pictures can be drawn together: all but words and noise is equal."""
    return batchable(one) and shape(one) == shape(other)


def batchable(recipe: Recipe) -> bool:
    """Whether a picture can be drawn with others at all: it has no images, and nothing is skipped by likeness.

    A step cache looks at all pictures at once, so each would depend on its neighbours.
    """
    return recipe.step_cache is None and not recipe.images


def shape(recipe: Recipe) -> Recipe:
    """`recipe` without its words and its seed; equal where pictures differ in nothing else."""
    sampling = recipe.sampling and recipe.sampling.model_copy(update={"batch": 1, "index": 0})
    return replace(recipe, prompt="", negative_prompt=None, seed=0, sampling=sampling)
