"""Scenes with a thick black outline around each shape: what a LoRA learns to draw, and how much there is of it."""

from dataclasses import replace

import numpy
from PIL import Image
from scipy import ndimage

from spark.checker import CONTRAST
from spark.scenes import Item, Scene, draw

LINE = 0.1  # of a shape's diameter, on each side
INK = 90.0  # Euclidean RGB distance from black below which a pixel is the outline's


def outlined(scene: Scene, size: tuple[int, int]) -> Image.Image:
    """Draw `scene` with a black outline around each shape, which stays as large as it is."""

    def filled(item: Item) -> Item:
        return replace(item, diameter=item.diameter * (1 - 2 * LINE))

    black = replace(scene, items=tuple(replace(item, rgb=(0, 0, 0)) for item in scene.items))
    outer, inner = draw(black, size), draw(replace(scene, items=tuple(map(filled, scene.items))), size)
    pixels = numpy.asarray(inner).astype(int)
    behind = numpy.abs(pixels - numpy.array(scene.rgb)).sum(-1, keepdims=True) == 0
    return Image.fromarray(numpy.where(behind, numpy.asarray(outer), pixels).astype(numpy.uint8))


def inked(image: Image.Image) -> float:
    """How much of the objects' edges in `image`, two pixels deep, is black: of plain pictures next to nothing."""
    pixels = numpy.asarray(image.convert("RGB"), dtype=numpy.float64)
    objects = numpy.linalg.norm(pixels - numpy.median(pixels[:4].reshape(-1, 3), axis=0), axis=-1) > CONTRAST
    edge = ndimage.binary_erosion(objects, iterations=2) & ~ndimage.binary_erosion(objects, iterations=4)
    return float((numpy.linalg.norm(pixels[edge], axis=-1) < INK).mean()) if edge.any() else 0.0
