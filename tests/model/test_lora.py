"""LoRAs that belong to a model: fused exactly, and refused by name when they do not fit."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import PATIENT, unwarmed
from safetensors.torch import save_file

import tiny
from handler import MODELS, ImageRequest, Worker
from handler.cli.bake import publish_weights
from handler.core.errors import StartError
from handler.model.loading.lora import fuse
from handler.volume.manifest import write_manifest

SPEC = MODELS["qwen-image-lightning"]
LAYER = "transformer_blocks.0.attn.to_q"


def lora(rank: int = 2, width: int = 32, layer: str = LAYER) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    down, up = torch.randn(rank, width, generator=generator), torch.randn(width, rank, generator=generator)
    return {
        f"{layer}.lora_down.weight": down,
        f"{layer}.lora_up.weight": up,
        f"{layer}.alpha": torch.tensor(1.0),
    }


def put(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, folder / SPEC.grafts[0].path)
    write_manifest(folder, {"model": SPEC.id})


def test_fusing_adds_the_scaled_product() -> None:
    weights, parts = {f"{LAYER}.weight": torch.ones(32, 32), "other.weight": torch.ones(2)}, lora()
    fuse(weights, parts)
    product = parts[f"{LAYER}.lora_up.weight"] @ parts[f"{LAYER}.lora_down.weight"]
    assert torch.allclose(weights[f"{LAYER}.weight"], 1 + product / 2)
    assert (weights["other.weight"] == 1).all()
    without_alpha = {name: part for name, part in parts.items() if not name.endswith("alpha")}
    weights = {f"{LAYER}.weight": torch.zeros(32, 32)}
    fuse(weights, without_alpha)
    assert torch.allclose(weights[f"{LAYER}.weight"], product)


@pytest.mark.parametrize(
    ("parts", "named"),
    [
        (lora(layer="transformer_blocks.9.attn.to_q"), "transformer_blocks.9.attn.to_q"),
        ({**lora(), f"{LAYER}.dora_scale": torch.ones(1)}, f"{LAYER}.dora_scale"),
    ],
)
def test_a_key_that_fits_nothing_is_named(parts: dict[str, torch.Tensor], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        fuse({f"{LAYER}.weight": torch.ones(32, 32)}, parts)


def test_a_worker_fuses_the_lora_of_its_model_and_bakes_the_sum(tmp_path: Path) -> None:
    folder = tiny.write(SPEC, tmp_path)
    settings = PATIENT.model_copy(update={"model": SPEC.id, "volume": tmp_path})
    recipe = SPEC.recipe(ImageRequest(prompt="a red circle", width=128, height=128, seed=1))
    with unwarmed():
        before = Worker.boot(settings).generate(recipe)[0].rgb
        put(folder, lora())
        worker = Worker.boot(settings)
    after = worker.generate(recipe)[0].rgb
    assert (before != after).any()

    target = publish_weights(worker, tmp_path)
    assert target
    assert not [*target.glob("*/lora.safetensors")]
    with unwarmed():
        baked = Worker.boot(settings)
    assert baked.ledger.weights == str(target)
    assert np.array_equal(baked.generate(recipe)[0].rgb, after)


@pytest.mark.parametrize("bad", [lora(layer="strange"), lora(width=8)])
def test_a_lora_that_does_not_fit_fails_the_boot(tmp_path: Path, bad: dict[str, torch.Tensor]) -> None:
    put(tiny.write(SPEC, tmp_path), bad)
    with pytest.raises(StartError, match=r"LoRA in .*transformer does not fit"):
        Worker.boot(PATIENT.model_copy(update={"model": SPEC.id, "volume": tmp_path}))
