"""The judge is judged: right on drawn ground truth, and not fooled by near misses."""

import random
from dataclasses import replace

import pytest
from PIL import Image, ImageDraw, ImageFilter

from spark.checker import ATTRIBUTES, check, look
from spark.scenes import COLORS, KINDS, NUISANCES, SHAPES, Item, Meaning, Scene, compose, draw, meaning_of, sample_scene

CALM = (0.0,) * NUISANCES


def expected(scene: Scene) -> Scene:
    """The same meaning at its canonical place."""
    return compose(meaning_of(scene), CALM)


@pytest.mark.parametrize("size", [(128, 128), (256, 256), (384, 256), (256, 384), (512, 512)])
def test_drawn_truth_is_all_right(size: tuple[int, int]) -> None:
    rng = random.Random(f"truth{size}")
    scenes = [sample_scene(rng, "validation", kind) for kind in KINDS for _ in range(20)]
    wrong = [s for s in scenes if not all(getattr(check(draw(s, size), expected(s)), a) for a in ATTRIBUTES)]
    assert not wrong


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_in_every_color_is_recognised(shape: str) -> None:
    for color in COLORS:
        background = "white" if color != "white" else "black"
        scene = compose(Meaning("one", background, ((shape, color),)), CALM)
        seen_background, found = look(draw(scene, (256, 256)))
        assert seen_background == background
        assert [(f.shape, f.color) for f in found] == [(shape, color)]


def wrongs(scene: Scene) -> dict[str, Scene]:
    """Scenes that miss `scene` in one attribute each."""
    item = scene.items[0]
    return {
        "background": replace(scene, rgb=COLORS["pink"]),
        "color": replace(scene, items=(replace(item, rgb=COLORS["green"]),)),
        "shape": replace(scene, items=(replace(item, shape="square"),)),
        "position": replace(scene, items=(replace(item, x=0.25, y=0.25),)),
        "size": replace(scene, items=(replace(item, diameter=item.diameter * 1.5),)),
        "count": replace(scene, items=(replace(item, x=0.27), replace(item, x=0.75))),
    }


def test_each_fault_is_seen_for_what_it_is() -> None:
    scene = compose(Meaning("one", "yellow", (("circle", "red"),)), CALM)
    for attribute, fault in wrongs(scene).items():
        verdict = check(draw(fault, (256, 256)), scene)
        assert not getattr(verdict, attribute)
        others = set(ATTRIBUTES) - {attribute} - ({"position"} if attribute == "count" else set())
        assert all(getattr(verdict, other) for other in others), (attribute, verdict)
        assert verdict.right == (attribute == "size")


@pytest.mark.parametrize("kind", ["blank", "noise", "blob"])
def test_no_shape_is_seen_where_there_is_none(kind: str) -> None:
    scene = compose(Meaning("one", "white", (("circle", "red"),)), CALM)
    image = Image.new("RGB", (256, 256), "white")
    if kind == "noise":
        image = Image.effect_noise((256, 256), 120).convert("RGB")
    if kind == "blob":
        rng = random.Random(0)
        pen = ImageDraw.Draw(image)
        for _ in range(5):
            x, y = rng.uniform(60, 160), rng.uniform(60, 160)
            pen.line([(x, y), (x + rng.uniform(-50, 80), y + rng.uniform(-50, 80))], fill=COLORS["red"], width=22)
    verdict = check(image, scene)
    assert not verdict.right
    assert not verdict.shape


def test_soft_edges_and_shades_are_forgiven() -> None:
    rng = random.Random(9)
    for _ in range(20):
        scene = sample_scene(rng, "validation", "one")
        soft = draw(scene, (256, 256)).filter(ImageFilter.GaussianBlur(1.5))
        assert check(soft, expected(scene)).right


def test_a_missing_object_is_no_match() -> None:
    item = Item("star", "blue", 0.27, 0.5, 0.36, COLORS["blue"])
    two = Scene("many", "white", None, None, None, COLORS["white"], (item, replace(item, x=0.73)), CALM)
    verdict = check(draw(replace(two, items=(item,)), (256, 256)), two)
    assert (verdict.count, verdict.color, verdict.shape, verdict.right) == (False, False, False, False)
