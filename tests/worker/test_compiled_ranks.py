"""Several processes that draw one picture run code that one of them compiled, all of them or none."""

import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import PATIENT, unwarmed

import tiny
from handler import MODELS, ImageRequest, Settings, Worker, outlook
from handler.catalog.spec import ModelSpec
from handler.core.errors import StartError
from handler.model.compiling import artifacts
from handler.model.hardware import Hardware
from handler.model.runner import sound
from handler.model.split import COMPILED

ALIKE = 2  # of 255, as in test_ranks.py
LEAN = MODELS["flux-schnell"]
SIZES = [(256, 256), (128, 96), (384, 320)]
CANNOT = "A process that draws with this one cannot."
GPU = Hardware("cuda", "a GPU", "bf16", "", 80, (9, 0))


@contextmanager
def booted(volume: Path, **fields: Any) -> Iterator[Worker]:
    with unwarmed(), Worker.boot(PATIENT.model_copy(update={"volume": volume, **fields})) as worker:
        yield worker


def drawn(worker: Worker) -> list[Any]:
    """At sizes that the code was and was not compiled at, each twice: what is left of one picture meets the next."""
    fields: dict[str, Any] = {"prompt": "a large red star", "seed": 3, "num_inference_steps": 4}
    asked = [ImageRequest(width=width, height=height, **fields) for width, height in SIZES * 2]
    return [sound(worker.generate(worker.spec.recipe(each)))[0].rgb.astype(int) for each in asked]


def alike(found: list[Any], alone: list[Any]) -> bool:
    return all(np.abs(one - other).max() <= ALIKE for one, other in zip(found, alone, strict=True))


def bound(worker: Worker) -> bool:
    return any("forward" in vars(block) for block in worker.denoiser.single_transformer_blocks)


@pytest.fixture
def lean(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny FLUX.1 has blocks of one kind, the smaller one: that is a third of what compiling both takes."""
    made = tiny.BUILDERS[LEAN.family]

    def cut(spec: ModelSpec) -> Any:
        pipeline = made(spec)
        pipeline.transformer.transformer_blocks = torch.nn.ModuleList()
        pipeline.transformer.register_to_config(num_layers=0)
        return pipeline

    monkeypatch.setitem(tiny.BUILDERS, LEAN.family, cut)


def refused(_: Path) -> None:
    raise StartError(CANNOT)


@pytest.mark.parametrize(
    "spec", [LEAN, pytest.param(MODELS["spark"], marks=pytest.mark.judge)], ids=lambda spec: spec.id
)
def test_code_that_one_compiled_is_run_by_all_and_restored_by_the_next_start(
    compiler: None, lean: None, spec: ModelSpec, tmp_path: Path
) -> None:
    asked = {"model": spec.id, "precision": "fp32"}
    if not spec.embedded:
        tiny.write(spec, tmp_path)
    with booted(tmp_path, compile="off", **asked) as worker:
        alone = drawn(worker)
    with booted(tmp_path, compile="on", ulysses_degree=2, **asked) as worker:
        assert (worker.found.outcome, worker.ledger.plan, bound(worker)) == ("MISS", "COMPILED", True)
        assert alike(drawn(worker), alone)
        folder = worker.publish(tmp_path)
    with zipfile.ZipFile(folder / artifacts.PACKAGE) as file:
        codes = [file.read(name).decode() for name in file.namelist() if name.endswith(("wrapper.cpp", ".json"))]
    assert any(f'"{COMPILED}"' in code for code in codes)  # the same group in every start
    with booted(tmp_path, ulysses_degree=2, **asked) as worker:
        assert (worker.found.outcome, worker.ledger.plan, bound(worker)) == ("HIT", "COMPILED", True)
        assert alike(drawn(worker), alone)
        spec, hardware = worker.spec, worker.hardware
        other = artifacts.look(spec, replace(hardware, shared=""), tmp_path)
        assert (other.outcome, "shared is none, was ulysses 2, ring 1" in other.reason) == ("STALE", True)
        found = artifacts.restore(worker.denoiser, spec, hardware, tmp_path, share=refused)
        assert (found.outcome, found.reason, bound(worker)) == ("ERROR", CANNOT, False)


@pytest.mark.parametrize(
    ("model", "fields", "why"),
    [
        ("flux-dev", {"ulysses_degree": 2}, ""),
        ("flux-dev", {"ulysses_degree": 3}, "wants prompts that they can split evenly"),  # which have 512 tokens
        ("flux-dev", {"ring_degree": 2}, "ring attention is not compiled"),
        ("qwen-image", {"ulysses_degree": 2}, "wants prompts that they can split evenly"),
        ("qwen-image", {}, ""),
    ],
)
def test_what_several_gpus_draw_without_compiled_code_says_why(model: str, fields: dict[str, int], why: str) -> None:
    eager = outlook(Settings(model=model, **fields), MODELS[model], GPU).eager  # type: ignore[arg-type]
    assert (eager.reason if eager else "").endswith(why)
    assert bool(eager) == bool(why)
