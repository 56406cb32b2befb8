"""The measures are measured: drawn truth passes at every size, and what is blurred, bitten, torn or uneven fails."""

import itertools
import random
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter

from spark.checker import check
from spark.measures import Measured, mean, measure
from spark.scenes import KINDS, NUISANCES, SHAPES, Meaning, Scene, compose, draw, sample_scene

SIZES = [(128, 128), (256, 256), (512, 512), (768, 512), (512, 768), (1024, 1024), (512, 288), (288, 512)]
CALM = (0.0,) * NUISANCES
LEAST_IOU, WIDEST_EDGE, MOST_UNEVEN = 0.93, 2.0, 2.0


def star(size: int, shape: str = "star") -> tuple[Image.Image, Scene]:
    scene = compose(Meaning("one", "blue", ((shape, "yellow"),)), CALM)
    return draw(scene, (size, size)), scene


def good(found: Measured) -> bool:
    """What a picture must reach that is drawn well."""
    flat = max(found.object_std, found.background_std) <= MOST_UNEVEN
    return found.iou >= LEAST_IOU and found.edge_px <= WIDEST_EDGE and flat


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_drawn_truth_is_good_at_every_size(size: tuple[int, int]) -> None:
    rng = random.Random(f"truth{size}")
    scenes = [sample_scene(rng, "validation", kind) for kind in KINDS for _ in range(4)]
    found = [measure(draw(scene, size), scene) for scene in scenes]
    assert all(map(good, found)), found
    assert mean(found)["iou"] > 0.985


def bitten(image: Image.Image) -> Image.Image:
    """Pieces gone from the object's edge."""
    side, pen = image.width, ImageDraw.Draw(image)
    for x, y in ((0.5, 0.3), (0.62, 0.6), (0.36, 0.6)):
        pen.ellipse([(x - 0.05) * side, (y - 0.05) * side, (x + 0.05) * side, (y + 0.05) * side], fill=(45, 85, 220))
    return image


def torn(image: Image.Image) -> Image.Image:
    """The lower half shifted sideways."""
    half = image.height // 2
    lower = image.crop((0, half, image.width, image.height))
    image.paste(lower, (image.width // 16, half))
    return image


def gridded(image: Image.Image) -> Image.Image:
    """A dot in every patch."""
    pixels = np.asarray(image).astype(int)
    for row, column in itertools.product((7, 8), repeat=2):
        pixels[row::16, column::16] -= 40
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize("size", [128, 256, 512, 1024])
@pytest.mark.parametrize("harm", [bitten, torn, gridded])
def test_harm_is_seen_at_every_size(harm: Callable[[Image.Image], Image.Image], size: int) -> None:
    image, scene = star(size)
    assert good(measure(image, scene))
    assert not good(measure(harm(image), scene))


@pytest.mark.parametrize("size", [128, 256, 512, 1024])
def test_the_width_of_an_edge_is_that_of_its_blur(size: int) -> None:
    """10 to 90 % of a Gaussian blur's edge are 2.56 of its standard deviations."""
    image, scene = star(size, "square")
    for blur in (2.0, 4.0):
        found = measure(image.filter(ImageFilter.GaussianBlur(blur)), scene)
        assert found.edge_px == pytest.approx(2.56 * blur, rel=0.2)
        assert not good(found)


def test_another_shape_overlaps_less() -> None:
    for shape in SHAPES:
        image, _ = star(256, shape)
        overlaps = {other: measure(image, star(16, other)[1]).iou for other in SHAPES}
        assert overlaps.pop(shape) > 0.98
        assert max(overlaps.values()) < LEAST_IOU, (shape, overlaps)


def test_a_shape_is_measured_wherever_it_stands_and_the_judge_says_where_it_should() -> None:
    scene = compose(Meaning("one", "blue", (("heart", "red"),), place="top left"), CALM)
    elsewhere = compose(Meaning("one", "blue", (("heart", "red"),), place="bottom right"), CALM)
    image = draw(elsewhere, (256, 256))
    assert measure(image, scene).iou > 0.98
    assert not check(image, scene).position


def test_another_number_of_objects_overlaps_with_none_and_an_empty_picture_has_no_edge() -> None:
    image, _ = star(256)
    two = compose(Meaning("many", "blue", (("star", "yellow"),) * 2), CALM)
    assert measure(image, two).iou == 0
    empty = measure(Image.new("RGB", (256, 256), "blue"), two)
    assert empty.iou == 0
    assert np.isnan([empty.edge_px, empty.object_std]).all()
    assert empty.background_std == 0
    assert mean([empty, measure(image, two)])["edge_px"] < WIDEST_EDGE
