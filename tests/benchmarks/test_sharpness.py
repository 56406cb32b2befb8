"""The table of how well spark draws: every row is there, in the order of what can be expected."""

import importlib.util
import random
from pathlib import Path
from types import ModuleType

import pytest
import torch
from diffusers import FluxPipeline

from spark.scenes import draw, sample_scene
from spark.train import SHIPPED

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "sharpness.py"


@pytest.fixture(scope="module")
def sharpness() -> ModuleType:
    """The script as a module, which finds its neighbours as when it is run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SCRIPT.parent)
        spec = importlib.util.spec_from_file_location("sharpness", SCRIPT)
        assert spec
        assert spec.loader
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def pipeline(sharpness: ModuleType) -> FluxPipeline:
    return sharpness.load(SHIPPED)


def test_drawn_truth_then_the_round_trip_then_what_is_drawn(sharpness: ModuleType, pipeline: FluxPipeline) -> None:
    torch.manual_seed(0)
    found = sharpness.rows({"old": pipeline, "drawn": pipeline}, (256, 256), 3, "validation")
    assert list(found) == list(sharpness.SHARES)
    for row in found.values():
        assert list(row) == ["true", "coded", "old", "drawn"]
        assert row["true"]["iou"] >= row["coded"]["iou"] >= row["drawn"]["iou"] > 0.8
        assert row["true"]["edge_px"] < min(row["coded"]["edge_px"], row["drawn"]["edge_px"])
        assert row["drawn"] == row["old"]
        assert set(row["drawn"]) == {"prompts", *sharpness.QUESTIONS}
        assert row["drawn"]["prompts"] == 1


def test_as_many_pictures_as_scenes_are_judged(sharpness: ModuleType) -> None:
    scenes = [sample_scene(random.Random(i), "validation") for i in range(3)]
    pictures = [draw(scene, (256, 256)) for scene in scenes]
    assert sharpness.judged([pictures[0]] * 3, scenes)["iou"] < sharpness.judged(pictures, scenes)["iou"]
    with pytest.raises(ValueError, match="longer"):
        sharpness.judged(pictures[:2], scenes)


def test_a_sheet_shows_every_prompt_at_every_size_side_by_side(
    sharpness: ModuleType, pipeline: FluxPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sharpness, "SHOWN_SIZES", ((128, 128), (256, 128)))
    monkeypatch.setattr(sharpness, "SHOWN", len(sharpness.SHARES))
    sheet = sharpness.contact_sheet([pipeline, pipeline], "validation")
    step = sharpness.SIDE + sharpness.GAP
    assert sheet.size == (4 * step + sharpness.GAP, len(sharpness.SHARES) * step + sharpness.GAP)
    left, right = (sheet.crop((x * step + sharpness.GAP, 0, (x + 1) * step, step)) for x in (0, 1))
    assert left.tobytes() == right.tobytes()
