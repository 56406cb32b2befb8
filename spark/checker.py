"""The judge: looks at a picture and says what is on it, without knowing who drew it.

Background: the median colour of the border. Objects: connected components that differ from it. Colour: the
nearest of the palette to the component's inner median. Shape: the best of eight templates by intersection
over union after scaling to the bounding box, and only if that overlap is good (`MIN_IOU`): a blob is no shape.

`check` compares the findings with a `Scene`. Its own error is measured on drawn pictures in the tests.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from spark.scenes import COLORS, PLACES, SHAPES, Item, Scene, draw

MIN_IOU = 0.7
MIN_AREA = 0.004  # of the picture; smaller components are specks
CONTRAST = 40.0  # Euclidean RGB distance from the background that makes a pixel part of an object
SIZE_TOLERANCE = 0.28  # natural logarithm of found over expected diameter
ATTRIBUTES = ("background", "count", "color", "shape", "position", "size")
JUDGED = ("background", "count", "color", "shape", "position")  # what "everything right" means
_GRID = 48

Mask = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Found:
    """One object seen in a picture; units as in `scenes.Item`. `shape` is None when no template fits."""

    shape: str | None
    color: str
    x: float
    y: float
    diameter: float
    iou: float
    area: int


@dataclass(frozen=True, slots=True)
class Verdict:
    """Which attributes of a picture agree with the scene it should show."""

    background: bool
    count: bool
    color: bool
    shape: bool
    position: bool
    size: bool

    @property
    def right(self) -> bool:
        return all(getattr(self, name) for name in JUDGED)


def look(image: Image.Image) -> tuple[str, list[Found]]:
    """The background's colour and the objects, largest first."""
    pixels = np.asarray(image.convert("RGB"), dtype=np.float64)
    height, width = pixels.shape[:2]
    behind = border_color(pixels)
    labels, _ = ndimage.label(np.linalg.norm(pixels - behind, axis=-1) > CONTRAST)
    found = [
        _describe(pixels, labels == i, np.bincount(labels.ravel())[i])
        for i in np.flatnonzero(np.bincount(labels.ravel()) >= MIN_AREA * height * width)
        if i
    ]
    return nearest_color(behind), sorted(found, key=lambda f: -f.area)


def check(image: Image.Image, scene: Scene) -> Verdict:
    """Judge `image` against `scene`, whose items stand at their canonical places."""
    background, found = look(image)
    matched = _match(list(scene.items), found)
    every = len(matched) == len(scene.items)
    return Verdict(
        background=background == scene.background,
        count=len(found) == len(scene.items),
        color=every and all(f.color == item.color for item, f in matched),
        shape=every and all(f.shape == item.shape for item, f in matched),
        position=every and all(_placed(scene, item, f) for item, f in matched),
        size=every and all(abs(np.log(f.diameter / item.diameter)) < SIZE_TOLERANCE for item, f in matched),
    )


def border_color(pixels: NDArray[np.float64]) -> NDArray[np.float64]:
    """The median colour (3,) of the border of a picture (height, width, 3): what is behind everything."""
    edge = max(2, min(pixels.shape[:2]) // 32)
    border = [pixels[:edge], pixels[-edge:], pixels[:, :edge], pixels[:, -edge:]]
    median: NDArray[np.float64] = np.median(np.concatenate([b.reshape(-1, 3) for b in border]), axis=0)
    return median


def nearest_color(rgb: NDArray[np.float64]) -> str:
    """The palette's name for a colour."""
    return min(COLORS, key=lambda name: float(np.sum((np.array(COLORS[name]) - rgb) ** 2)))


def _describe(pixels: NDArray[np.float64], mask: Mask, area: int) -> Found:
    height, width = mask.shape
    inner = ndimage.binary_erosion(mask, iterations=2)
    color = np.median(pixels[inner if inner.sum() >= 8 else mask], axis=0)
    rows, columns = np.where(mask)
    normal = _normalise(mask)
    overlap = {name: _iou(normal, template) for name, template in _templates().items()}
    best = max(overlap, key=lambda name: overlap[name])
    return Found(
        shape=best if overlap[best] >= MIN_IOU else None,
        color=nearest_color(color),
        x=float(columns.min() + columns.max() + 1) / 2 / width,
        y=float(rows.min() + rows.max() + 1) / 2 / height,
        diameter=max(int(np.ptp(rows)), int(np.ptp(columns)) + 1) / min(height, width),
        iou=overlap[best],
        area=int(area),
    )


def _normalise(mask: Mask) -> Mask:
    rows, columns = np.where(mask)
    box = mask[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    scaled = Image.fromarray(box.astype(np.uint8) * 255).resize((_GRID, _GRID), Image.Resampling.BILINEAR)
    return np.asarray(scaled) > 127


def _iou(a: Mask, b: Mask) -> float:
    return float((a & b).sum() / (a | b).sum())


@cache
def _templates() -> dict[str, Mask]:
    def template(shape: str) -> Mask:
        item = Item(shape, "white", 0.5, 0.5, 0.8, (255, 255, 255))
        scene = Scene("one", "black", None, None, None, (0, 0, 0), (item,), ())
        return _normalise(np.asarray(draw(scene, (128, 128)))[..., 0] > 127)

    return {shape: template(shape) for shape in SHAPES}


def _match(items: list[Item], found: list[Found]) -> list[tuple[Item, Found]]:
    """Pair each item with the nearest object that is still free."""
    free, matched = list(found), []
    for item in items:
        if free:
            near = min(free, key=lambda f: (f.x - item.x) ** 2 + (f.y - item.y) ** 2)
            free.remove(near)
            matched.append((item, near))
    return matched


def _placed(scene: Scene, item: Item, found: Found) -> bool:
    if scene.place:
        nearest = min(PLACES, key=lambda p: (PLACES[p][0] - found.x) ** 2 + (PLACES[p][1] - found.y) ** 2)
        return nearest == scene.place
    tolerance = 0.22 if scene.kind == "one" else 0.17
    return abs(found.x - item.x) < tolerance and abs(found.y - item.y) < tolerance
