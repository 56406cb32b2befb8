"""The GPU measurement, as far as a CPU shows it: models as large as the real ones, and sides that draw and tell."""

import contextlib
import json
import multiprocessing
import os
import sys
import threading
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT

import forked
import tiny
from handler import MODELS

BENCHMARKS = ROOT / "benchmarks"
T5_XXL, VAE, CLIP_L, CLIP_G = 4_762_310_656, 83_819_683, 123_060_480, 694_659_840
PARAMETERS = {  # counted on the libraries' classes with the real models' configuration files
    "flux-schnell": 11_891_178_560 + T5_XXL + CLIP_L + VAE,
    "flux-dev": 11_901_408_320 + T5_XXL + CLIP_L + VAE,
    "sd1.5": 859_520_964 + CLIP_L + 83_653_863,
    "sdxl-turbo": 2_567_463_684 + CLIP_L + CLIP_G + 83_653_863,
    "sd3.5-large": 8_056_627_520 + 123_650_304 + CLIP_G + T5_XXL + VAE,
    "flux2-dev": 32_223_281_152 + 24_011_361_280 + 84_046_115,
    "z-image-turbo": 6_154_908_736 + 4_022_468_096 + VAE,
}


@pytest.fixture
def random_models(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import random_models

    return random_models


@pytest.mark.parametrize("model", PARAMETERS)
def test_random_models_are_as_large_as_the_real_ones(model: str, random_models: Any) -> None:
    parts = [random_models.made(part) for part in random_models.CONFIGS[model][1].values()]
    modules = [part for part in parts if isinstance(part, torch.nn.Module)]
    assert sum(p.numel() for module in modules for p in module.parameters()) == PARAMETERS[model]
    assert {p.dtype for module in modules for p in module.parameters()} == {torch.bfloat16}


def test_sides_take_turns_and_tell(tmp_path: Path) -> None:
    tiny.write(MODELS["sdxl-turbo"], tmp_path)
    sides = ["diffusers", "kindling-eager"]
    command = [sys.executable, BENCHMARKS / "latency.py", "--models", "sdxl-turbo", "--volume", tmp_path]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    out = forked.run(
        [*command, "--pictures", "1", "--sides", *sides], env=environment, capture_output=True, text=True, check=True
    )
    found = json.loads(out.stdout.splitlines()[-1])
    assert [(row["model"], row["side"], row["steps"]) for row in found["rows"]] == [("sdxl-turbo", s, 1) for s in sides]
    for row in found["rows"]:
        assert row["turns"]
        assert row["plan"].startswith("EAGER")
        assert row["tflop"] > 0
        assert all(row[name] > 0 for name in ("picture_s", "png_s", "load_s", "peak_gb"))


@pytest.fixture
def latency(random_models: Any) -> Any:
    import latency

    return latency


def playing(*early: str) -> Any:
    """In place of `process`: sides that answer at once; those in `early` end after their second picture."""

    def answer(pipe: Connection, side: str) -> None:
        pipe.send({"plan": "COMPILED: now"})
        for drawn, _ in enumerate(iter(pipe.recv, None)):
            if side in early and drawn == 2:
                return pipe.close()
            pipe.send((0.5, 0.1))
        pipe.send(1.0)
        if side == "diffusers":
            pipe.send(9.0)
        return pipe.close()

    @contextlib.contextmanager
    def process(side: str, model: str, volume: Path) -> Iterator[Connection]:
        ours, theirs = multiprocessing.Pipe()
        thread = threading.Thread(target=answer, args=(theirs, side))
        thread.start()
        yield ours
        ours.close()
        thread.join()

    return process


def test_a_side_that_ends_early_does_not_take_the_others_along(
    latency: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latency, "process", playing("kindling-eager"))
    sides = ["diffusers", "kindling-eager", "kindling-compiled"]
    rows = latency.measure(MODELS["flux-schnell"], tmp_path, sides, 2)
    assert "error" in rows["kindling-eager"]
    assert "picture_s" not in rows["kindling-eager"]
    for side in ("diffusers", "kindling-compiled"):
        assert "error" not in rows[side]
        assert (rows[side]["picture_s"], rows[side]["tflop"]) == (0.5, 9)


def test_the_floor_is_that_of_what_is_multiplied(latency: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "RATES", {"CPU": latency.HOPPER})
    rows: dict[str, dict[str, Any]] = {p: {"precision": p} for p in ("bf16", "int8", "fp8-tensor", "int8-dynamic")}
    latency.tell_floors(rows | (ended := {"ended": dict[str, Any]()}), 1450 * 790)
    assert {name: row.get("floor_s") for name, row in rows.items()} == {
        "bf16": 1450, "int8": 1450, "fp8-tensor": 790, "int8-dynamic": None,
    }  # fmt: skip
    assert ended["ended"].keys() == {"tflop"}


@pytest.mark.parametrize(
    ("side", "row", "told"),
    [
        ("kindling-fp8", {"plan": "EAGER: compiling failed"}, "not compiled: EAGER: compiling failed"),
        ("kindling-compiled", {"error": "its process ended early"}, "its process ended early"),
        ("kindling-compiled", {"plan": "COMPILED: HIT"}, ""),
        ("kindling-eager", {"plan": "EAGER: KINDLING_COMPILE=off"}, ""),
        ("diffusers", {"plan": "EAGER: diffusers"}, ""),
    ],
)
def test_a_side_called_compiled_that_is_not_is_told(
    side: str, row: dict[str, str], told: str, latency: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(latency, "compare", lambda *_: [{"model": "spark", "side": side, **row}])
    monkeypatch.setattr(latency.random_models, "write", lambda *_: None)
    monkeypatch.setattr("sys.argv", ["latency.py", "--models", "flux-schnell", "--volume", str(tmp_path)])
    assert latency.main() == bool(told)
    assert capsys.readouterr().err == (f"spark {side}: {told}\n" if told else "")
