"""Stable Diffusion 1.5 as its repository has it: old names of weights, a safety checker, no revision in its row."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import PATIENT, unwarmed
from safetensors.torch import load_file, save_file

import tiny
from handler import MODELS, Api, Engine, ImageRequest, Worker
from handler.__main__ import main
from handler.api import codec
from handler.cli import generate
from handler.cli.models import state
from handler.core.recipe import Reference
from handler.core.version import __version__
from handler.model.compiling import artifacts
from handler.model.families import edits
from handler.model.hardware import Hardware
from handler.volume.hubcache import HUB_CACHE
from handler.volume.listing import INDEX
from handler.volume.sources import weights_folder

SPEC = MODELS["sd1.5"]
RENAMED = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}  # of the VAE's attention, since
CHECKER = {
    "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
    "feature_extractor": ["transformers", "CLIPImageProcessor"],
    "requires_safety_checker": True,
}


def as_on_the_hub(volume: Path) -> Path:
    """A hub cache with the repository's only snapshot, in fp16, as far as its keys and its list of components go."""
    snapshot = volume / HUB_CACHE / f"models--{SPEC.repository.replace('/', '--')}" / "snapshots" / tiny.COMMIT
    tiny.build(SPEC).to(torch.float16).save_pretrained(snapshot)
    index = json.loads((snapshot / INDEX).read_text())
    (snapshot / INDEX).write_text(json.dumps(index | CHECKER))
    (snapshot / "safety_checker").mkdir()
    (snapshot / "safety_checker/config.json").write_text("{}")
    vae = load_file(snapshot / "vae/diffusion_pytorch_model.safetensors")
    for new, old in RENAMED.items():
        vae = {name.replace(f"attentions.0.{new}.", f"attentions.0.{old}."): tensor for name, tensor in vae.items()}
    assert any("query" in name for name in vae)
    save_file(vae, snapshot / "vae/diffusion_pytorch_model.safetensors")
    encoder = load_file(snapshot / "text_encoder/model.safetensors")
    [prefix] = {name.split("embeddings.")[0] for name in encoder if "token_embedding" in name}
    encoder[f"{prefix}embeddings.position_ids"] = torch.arange(77)[None]
    save_file(encoder, snapshot / "text_encoder/model.safetensors", {"format": "pt"})
    return snapshot


@pytest.fixture(scope="module")
def volume(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("volume")
    as_on_the_hub(found)
    return found


def booted(volume: Path, precision: str) -> Worker:
    update = {"model": SPEC.id, "volume": volume, "precision": precision, "compile": "off"}
    with unwarmed():
        return Worker.boot(PATIENT.model_copy(update=update))


@pytest.fixture(scope="module")
def worker(volume: Path) -> Iterator[Worker]:
    with booted(volume, "fp32") as worker:
        yield worker


def drawn(worker: Worker, **fields: Any) -> Any:
    request = ImageRequest(
        **{"prompt": "a ring", "width": 64, "height": 64, "seed": 1, "num_inference_steps": 2} | fields
    )
    return worker.generate(SPEC.recipe(request))[0]


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_old_names_of_weights_are_known(precision: str, worker: Worker, volume: Path) -> None:
    """Cast one by one, or as they lie in the file."""
    ours = worker if precision == "fp32" else booted(volume, precision)
    theirs = tiny.build(SPEC).to(torch.float16).to(torch.float32 if precision == "fp32" else torch.float16)
    for name, part in theirs.components.items():
        if isinstance(part, torch.nn.Module):
            found = getattr(ours._pipeline, name).state_dict()
            assert all(torch.equal(found[key], weight) for key, weight in part.state_dict().items())


def test_the_safety_checker_is_neither_loaded_nor_missed(worker: Worker) -> None:
    """Edits are told too that there is none."""
    edit = SPEC.recipe(ImageRequest(prompt="x", images=(b"x",)), (Reference(np.zeros((64, 64, 3), np.uint8), "x"),))
    for recipe in (SPEC.recipe(ImageRequest(prompt="x")), edit):
        pipeline = edits.pipeline_for(recipe, worker._family, worker._pipeline)
        assert pipeline.safety_checker is None
        assert not pipeline.config.requires_safety_checker


def test_all_that_tells_a_picture_names_the_volumes_commit(worker: Worker, volume: Path) -> None:
    assert SPEC.revision == ""
    assert worker.spec.revision == tiny.COMMIT
    assert drawn(worker).recipe.revision == tiny.COMMIT
    assert tiny.COMMIT in worker.ledger.weights
    hardware = Hardware("cpu", "CPU", "fp32", "")
    assert artifacts.fingerprint(worker.spec, hardware)["revision"] == tiny.COMMIT
    assert tiny.COMMIT[:8] in weights_folder(worker.spec, volume, "int8").name
    settings = PATIENT.model_copy(update={"model": SPEC.id, "volume": volume})
    assert state(SPEC, settings, hardware).revision == tiny.COMMIT
    engine = Engine(settings, boot=lambda *_: worker)
    engine.start()
    engine.wait_booted()
    try:
        [image] = asyncio.run(Api(engine).call("/generate", {"prompt": "x", "width": 64, "height": 64})).body["images"]
    finally:
        engine.stop()
    assert image["parameters"]["revision"] == tiny.COMMIT


def test_a_picture_is_made_again_at_its_commit(
    worker: Worker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pixels = drawn(worker)
    made, again = tmp_path / "made.png", tmp_path / "again.png"
    parameters = codec.parameters_of(pixels.recipe, worker.facts, __version__)
    made.write_bytes(codec.encode(pixels.rgb, "png", 100, parameters))
    monkeypatch.setattr(generate, "booted", lambda *_: worker)
    assert main(["generate", "--from", str(made), "-o", str(again)]) == 0
    assert "otherwise" not in capsys.readouterr().err
    assert again.read_bytes() == made.read_bytes()
    made.write_bytes(codec.encode(pixels.rgb, "png", 100, parameters | {"revision": "0" * 40}))
    assert main(["generate", "--from", str(made), "-o", str(again)]) == 0
    assert f"revision was {'0' * 40} and is {tiny.COMMIT}" in capsys.readouterr().err


def test_models_tells_the_commit(
    volume: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("KINDLING_VOLUME", str(volume))
    assert main(["models"]) == 0
    [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("sd1.5 ")]
    assert f"fetched at {tiny.COMMIT[:8]}" in line
