"""The measures are measured: drawn truth passes at every size, and what is blurred, bitten, torn or uneven fails."""

import itertools
import random
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter

from spark.checker import check
from spark.measures import Measured, mean, measure, nearest
from spark.scenes import KINDS, NUISANCES, SHAPES, Meaning, Scene, compose, draw, meaning_of, sample_scene

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


@pytest.mark.parametrize("blur", [0.0, 2.0])
@pytest.mark.parametrize("kind", KINDS)
def test_the_nearest_scene_is_the_one_that_was_drawn(kind: str, blur: float) -> None:
    """Wherever the asked one has its objects, and however soft they are drawn."""
    rng = random.Random(f"nearest{kind}")
    for size in ((256, 256), (384, 256), (256, 384), (512, 512)):
        scene = sample_scene(rng, "validation", kind)
        found = nearest(draw(scene, size).filter(ImageFilter.GaussianBlur(blur)), compose(meaning_of(scene), CALM))
        assert found is not None
        assert found.rgb == scene.rgb
        for seen, item in zip(found.items, scene.items, strict=True):
            assert (seen.shape, seen.color) == (item.shape, item.color)
            assert seen.rgb == pytest.approx(item.rgb, abs=4 if blur else 0)
            assert (seen.x, seen.y) == pytest.approx((item.x, item.y), abs=0.5 / min(size))
            assert seen.diameter == pytest.approx(item.diameter, rel=0.02 if blur else 0.01)


@pytest.mark.parametrize(
    "shown",
    [
        Meaning("many", "blue", (("star", "yellow"),) * 2),
        Meaning("one", "blue", (("ring", "yellow"),)),
        Meaning("one", "blue", (("circle", "yellow"),)),
        Meaning("one", "blue", (("square", "yellow"),)),
        Meaning("one", "blue", (("star", "red"),)),
    ],
    ids=["more", "ring", "circle", "square", "red"],
)
def test_a_picture_of_something_else_comes_near_to_no_scene(shown: Meaning) -> None:
    _, asked = star(256)
    assert nearest(draw(compose(shown, CALM), (256, 256)), asked) is None
    assert nearest(Image.new("RGB", (256, 256), "blue"), asked) is None


def test_one_object_for_two_comes_near_to_no_scene() -> None:
    """And one far from where both should be is not taken twice."""
    two = compose(Meaning("many", "blue", (("circle", "yellow"),) * 2), CALM)
    moved = replace(
        two, items=tuple(replace(item, x=0.15 + 0.7 * place, y=0.2) for place, item in enumerate(two.items))
    )
    assert nearest(draw(moved, (256, 256)), two) is not None
    left = replace(
        two, items=tuple(replace(item, x=0.8, y=y, diameter=0.3) for item, y in zip(two.items, (0.2, 0.8), strict=True))
    )
    assert nearest(draw(left, (256, 256)), two) is None
