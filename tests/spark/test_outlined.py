"""The LoRA of the guides: what it is trained on, that training needs no library, and what it does to spark."""

import random
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import unwarmed
from diffusers import FluxTransformer2DModel
from PIL import Image
from torch import nn

from handler import ImageRequest, Worker
from handler.core.birth import Birth
from handler.core.loras import Wanted
from handler.core.recipe import Lora
from handler.model.adapters.applied import Applied
from handler.volume.adapters import adapters, chosen
from spark.checker import check
from spark.flow import Words
from spark.latents import NATIVE
from spark.lora import RANK, SHOWN, adapted, loss, scenes, show, write
from spark.outlined import inked, outlined
from spark.scenes import draw, held_out
from spark.train import SHIPPED

ROOT = Path(__file__).parents[2]
LIKE = 8  # prompts


def test_what_it_learns_from_is_outlined_and_still_judged_right() -> None:
    for scene in scenes(24):
        picture = outlined(scene, NATIVE)
        assert check(picture, scene).count
        assert inked(draw(scene, NATIVE)) == 0
        assert inked(picture) > 0.1


def test_it_is_shown_however_long_the_training_took(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Birth, "of_process", lambda: Birth(time.monotonic() - 4000))
    with unwarmed():
        show(ROOT / "docs/loras/outlined.safetensors", tmp_path / "shown.png")
    plain, lined = np.split(np.asarray(Image.open(tmp_path / "shown.png")).astype(int), 2)
    assert plain.shape == (256, 256 * len(SHOWN), 3)
    assert np.abs(plain - lined).mean() > 1


def test_what_was_trained_is_what_is_applied(tmp_path: Path) -> None:
    """A few steps lower the loss, and the file gives the weights that they gave."""
    torch.manual_seed(0)
    rng, some, words = random.Random(0), scenes(4), Words.load(SHIPPED)
    model = FluxTransformer2DModel.from_pretrained(SHIPPED / "transformer", torch_dtype=torch.float32)
    before = {name: weight.clone() for name, weight in model.requires_grad_(False).state_dict().items()}
    added = adapted(model)
    optimizer = torch.optim.AdamW([p for one in added.values() for p in one.parameters()], lr=1e-2)
    clean = torch.randn(4, 12, 16, 16, generator=torch.Generator().manual_seed(1)) * 0.1
    losses = []
    for _ in range(4):
        torch.manual_seed(1)
        losses.append(found := loss(model, clean, some, words, rng))
        optimizer.zero_grad()
        found.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    (tmp_path / "loras").mkdir()
    write(added, tmp_path / "loras/a.safetensors")
    plain = FluxTransformer2DModel.from_pretrained(SHIPPED / "transformer", torch_dtype=torch.float32)

    class Pipeline:
        components, _execution_device = {"transformer": plain.requires_grad_(False)}, torch.device("cpu")

    Applied(Pipeline()).apply(chosen([Wanted("a")], tmp_path))
    for name, module in model.named_modules():
        if name in added and isinstance(module, nn.Linear):
            assert torch.allclose(plain.get_submodule(name).weight, module.weight, atol=1e-3), name
    unchanged = [name for name, weight in plain.state_dict().items() if torch.equal(weight, before[name])]
    assert len(unchanged) == len(before) - len(added)


@pytest.fixture(scope="module")
def shipped() -> Lora:
    return replace(chosen([Wanted("outlined")], ROOT / "docs")[0], weight=1.0)


def test_the_one_of_the_guides_outlines_what_spark_draws(spark: Worker, shipped: Lora) -> None:
    prompts = [each for each in held_out(3 * LIKE, "validation", "one", "plain") if "black" not in each[0]][:LIKE]
    ink, verdicts = [], []
    for seed, (prompt, scene) in enumerate(prompts):
        recipe = spark.spec.recipe(ImageRequest(prompt=prompt, seed=seed), loras=(shipped,))
        picture = Image.fromarray(spark.generate(recipe)[0].rgb)
        ink.append(inked(picture))
        verdicts.append(check(picture, scene))
    assert np.mean(ink) > 0.15
    assert all(verdict.background and verdict.count and verdict.position for verdict in verdicts)
    assert np.mean([verdict.shape for verdict in verdicts]) > 0.5
    plain = spark.generate(replace(recipe, loras=()))[0].rgb
    assert inked(Image.fromarray(plain)) == 0


def test_the_one_of_the_guides_is_small_and_said_to_be_sparks() -> None:
    [found] = adapters(ROOT / "docs")
    assert (found.name, found.made_for, found.fault) == ("outlined", "spark/lora", "")
    assert found.bytes < 1_000_000
    assert RANK <= 8
