"""The GPU measurement, as far as a CPU shows it: models as large as the real ones, and sides that draw and tell."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT

import tiny
from handler import MODELS

BENCHMARKS = ROOT / "benchmarks"
T5_XXL, VAE, CLIP_L, CLIP_G = 4_762_310_656, 83_819_683, 123_060_480, 694_659_840
PARAMETERS = {  # counted on the libraries' classes with the real models' configuration files
    "flux-schnell": 11_891_178_560 + T5_XXL + CLIP_L + VAE,
    "flux-dev": 11_901_408_320 + T5_XXL + CLIP_L + VAE,
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
    out = subprocess.run(
        [*command, "--pictures", "1", "--sides", *sides], env=environment, capture_output=True, text=True, check=True
    )
    found = json.loads(out.stdout.splitlines()[-1])
    assert [(row["model"], row["side"], row["steps"]) for row in found["rows"]] == [("sdxl-turbo", s, 1) for s in sides]
    for row in found["rows"]:
        assert row["turns"]
        assert row["plan"].startswith("EAGER")
        assert row["tflop"] > 0
        assert all(row[name] > 0 for name in ("picture_s", "png_s", "load_s", "peak_gb"))
