"""How well a picture is drawn, where `checker` says what is on it: shape, edges and flat areas, each as a number.

Every pixel around an object is placed between the background's colour and the object's: its cover, 0 to 1. The
scene's own shape is fitted to it by area and centre of mass and drawn as exactly as `scenes` can, at the picture's own
size, so that no grid and no box of whole pixels limits what can be told apart. `nearest` is the scene that comes out.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage
from skimage.measure import find_contours

from spark.checker import CONTRAST, MIN_AREA, border_color, nearest_color
from spark.scenes import RGB, SHAPES, Item, Scene, draw

Cover = NDArray[np.float64]

MARGIN = 0.3  # of an object's side, that its window shows around it
FITS = 2  # of area and centre; a third changes next to nothing
INNER = 64  # flat areas keep away from edges by the shorter side over this, and by `LEAST_INNER` pixels
LEAST_INNER = 3
FINE = 256  # pixels of a window's side up to which shapes are drawn with four times as many
EDGE = (0.1, 0.9)  # of the cover, between which a pixel is on an edge
ALIKE, UNLIKE = 0.6, 0.05  # the least overlap with its own shape, and how much more of it another may have


@dataclass(frozen=True, slots=True)
class Measured:
    """One picture's measures, NaN where there is nothing to measure. Of several objects the worst counts.

    `iou` is the overlap with the scene's own shape, 0 to 1; `edge_px` the mean width of edges, 10 to 90 %, in pixels;
    `object_std` and `background_std` the standard deviation inside objects and behind them, of 255.
    """

    iou: float
    edge_px: float
    object_std: float
    background_std: float


MEASURES = tuple(Measured.__dataclass_fields__)


def measure(image: Image.Image, scene: Scene) -> Measured:
    """Measure `image`, which should show the items of `scene`, wherever in it they stand."""
    pixels = np.asarray(image.convert("RGB"), dtype=np.float64)
    objects, background = _seen(pixels, border_color(pixels))
    own = {item.shape: item for item in scene.items}.values()
    fits = [max(_fit(seen.cover, item)[1] for item in own) for seen in objects]
    return Measured(
        iou=min(fits) if len(objects) == len(scene.items) else 0.0,
        edge_px=_worst(_edge(seen.cover) for seen in objects),
        object_std=_worst(_spread(seen.inside) for seen in objects),
        background_std=_spread(background),
    )


def nearest(image: Image.Image, scene: Scene) -> Scene | None:
    """The scene that `image` comes nearest to: the shapes of `scene`, each where, as large and as coloured as drawn.

    None if `image` has more objects or fewer, or one of another colour or shape: of less overlap than `ALIKE` with its
    own, or of more, by `UNLIKE`, with another.
    """
    pixels = np.asarray(image.convert("RGB"), dtype=np.float64)
    behind = border_color(pixels)
    objects, _ = _seen(pixels, behind)
    if len(objects) != len(scene.items):
        return None
    theirs = [min(objects, key=partial(_away, item, pixels.shape)) for item in scene.items]
    if len({id(seen) for seen in theirs}) < len(objects):
        return None
    items = [_as_drawn(item, seen, pixels.shape) for item, seen in zip(scene.items, theirs, strict=True)]
    return None if None in items else replace(scene, rgb=_rgb(behind), items=tuple(items))


def _as_drawn(item: Item, seen: "_Object", shape: tuple[int, ...]) -> Item | None:
    """`item` as it is seen in a picture of `shape`, or None if it is something else."""
    fits = {name: _fit(seen.cover, replace(item, shape=name)) for name in SHAPES}
    fitted, overlap = fits[item.shape]
    alike = max(ALIKE, max(other for _, other in fits.values()) - UNLIKE)
    if overlap < alike or nearest_color(seen.color) != item.color:
        return None
    return seen.placed(fitted, shape)


def mean(measured: Iterable[Measured]) -> dict[str, float]:
    """The means over pictures, leaving out what could not be measured."""
    rows = list(measured)
    return {name: round(float(np.nanmean([getattr(row, name) for row in rows] or [np.nan])), 3) for name in MEASURES}


def _worst(values: Iterable[float]) -> float:
    return max((value for value in values if not np.isnan(value)), default=float("nan"))


@dataclass(frozen=True, slots=True)
class _Object:
    """One object: its cover in a window that begins at row `top` and column `left`, its colour, its inner pixels."""

    cover: Cover
    top: int
    left: int
    color: Cover
    inside: Cover

    def placed(self, item: Item, shape: tuple[int, ...]) -> Item:
        """`item` of the window in a picture of `shape`, in this object's colour."""
        height, width, side = *shape[:2], max(self.cover.shape)
        x, y = (self.left + item.x * side) / width, (self.top + item.y * side) / height
        return replace(item, x=x, y=y, diameter=item.diameter * side / min(height, width), rgb=_rgb(self.color))


def _rgb(color: Cover) -> RGB:
    red, green, blue = (round(float(value)) for value in color)
    return red, green, blue


def _away(item: Item, shape: tuple[int, ...], seen: _Object) -> float:
    """How far `seen` is from where `item` should be, in pixels."""
    row, column = ndimage.center_of_mass(seen.cover)
    return math.hypot(seen.top + row - item.y * shape[0], seen.left + column - item.x * shape[1])


def _seen(pixels: Cover, behind: Cover) -> tuple[list[_Object], Cover]:
    """The objects: connected areas that differ from the colour `behind`; and the pixels of the background."""
    labels, _ = ndimage.label(np.linalg.norm(pixels - behind, axis=-1) > CONTRAST)
    counts, boxes = np.bincount(labels.ravel()), ndimage.find_objects(labels)
    large = [i + 1 for i, box in enumerate(boxes) if box and counts[i + 1] >= MIN_AREA * labels.size]
    inner = max(LEAST_INNER, min(labels.shape) // INNER)
    background = ~_reach(np.isin(labels, large), 2 * inner)  # specks are unevenness
    return [_object(pixels, labels, behind, label, boxes[label - 1], inner) for label in large], pixels[background]


def _object(
    pixels: Cover, labels: NDArray[np.int32], behind: Cover, label: int, box: tuple[slice, slice], inner: int
) -> _Object:
    """The object of this label, in a window around its box."""
    side = max(edge.stop - edge.start for edge in box)
    rows, columns = (slice(max(0, int(e.start - MARGIN * side)), int(e.stop + MARGIN * side) + 1) for e in box)
    mine, shown = labels[rows, columns] == label, pixels[rows, columns]
    inside = ~_reach(~mine, inner)
    color = np.median(shown[inside if inside.any() else mine], axis=0)
    along = color - behind
    cover = np.clip((shown - behind) @ along / (along @ along), 0, 1)
    others = (labels[rows, columns] != label) & (labels[rows, columns] > 0)
    cover[_reach(others, inner)] = 0
    return _Object(cover, rows.start, columns.start, color, shown[inside])


def _reach(mask: NDArray[np.bool_], pixels: int) -> NDArray[np.bool_]:
    """`mask` and what is at most so far from it."""
    return np.asarray(ndimage.maximum_filter(mask, 2 * pixels + 1)) if mask.any() else mask


def _edge(cover: Cover) -> float:
    """The area between 10 and 90 % over the length of the line at 50 %: the mean width of the edge, in pixels."""
    lines = find_contours(np.pad(cover, 1), 0.5)
    length = sum(float(np.linalg.norm(np.diff(line, axis=0), axis=1).sum()) for line in lines)
    low, high = EDGE
    return float(((cover > low) & (cover < high)).sum() / length) if length else float("nan")


def _spread(pixels: Cover) -> float:
    """The standard deviation of (count, 3) pixels, the mean of the three colours; NaN of none."""
    return float(pixels.std(axis=0).mean()) if len(pixels) else float("nan")


def _fit(cover: Cover, item: Item) -> tuple[Item, float]:
    """The item's shape at the place and size in the window that fit `cover` best, and their overlap."""
    height, width = cover.shape
    side, target = max(height, width), np.pad(cover, [(0, max(0, width - height)), (0, max(0, height - width))])
    area, center = target.sum(), ndimage.center_of_mass(target)
    fitted = replace(item, x=0.5, y=0.5, diameter=0.6, rgb=(255, 255, 255))
    for _ in range(FITS):
        shape = _shape(fitted, side)
        there = ndimage.center_of_mass(shape)
        fitted = replace(
            fitted,
            x=fitted.x + (center[1] - there[1]) / side,
            y=fitted.y + (center[0] - there[0]) / side,
            diameter=fitted.diameter * float(np.sqrt(area / shape.sum())),
        )
    shape = _shape(fitted, side)
    return fitted, float(np.minimum(shape, target).sum() / np.maximum(shape, target).sum())


def _shape(item: Item, side: int) -> Cover:
    """The cover of `item` alone in a square window of `side` pixels."""
    alone = Scene("one", "black", None, None, None, (0, 0, 0), (item,), ())
    finer = 4 if side <= FINE else 2
    return np.asarray(draw(alone, (side, side), finer).convert("L"), dtype=np.float64) / 255
