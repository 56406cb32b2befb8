"""On a GPU: FLUX.1 of full size, with random weights, draws in the memory of a smaller card."""

import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import PATIENT, ROOT

from handler import ImageRequest, Worker
from handler.core.host import host_memory
from handler.model.hardware import Hardware, detect

GIB = 1 << 30
DISK_GB, HOST_GB = 40, 48  # for the weights in bf16, and for what waits or is being rounded
pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
    pytest.mark.skipif(host_memory() < HOST_GB * 1e9, reason=f"needs {HOST_GB} GB of host memory"),
]


@pytest.fixture(scope="module")
def volume(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A volume with flux-schnell."""
    folder = tmp_path_factory.mktemp("volume")
    if shutil.disk_usage(folder).free < DISK_GB * 1e9:
        pytest.skip(f"needs {DISK_GB} GB of disk")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        import random_models

        random_models.write("flux-schnell", folder)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Make this GPU one of so many GiB."""

    def capped(gib: int) -> None:
        def smaller(*given: Any) -> Hardware:
            return dataclasses.replace(detect(*given), memory_gb=gib * GIB / 1e9)

        monkeypatch.setattr("handler.worker.worker.detect", smaller)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.set_per_process_memory_fraction(gib * GIB / torch.cuda.get_device_properties(0).total_memory)

    yield capped
    torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.parametrize(
    ("precision", "mode", "gib"), [("fp8", "encoders", 22), ("bf16", "blocks", 22), ("bf16", "blocks", 8)]
)
def test_flux_draws_on_a_small_card(precision: str, mode: str, gib: int, volume: Path, card: Any) -> None:
    if precision == "fp8" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("FP8 needs compute capability 8.9")
    card(gib)
    update = {"model": "flux-schnell", "volume": volume, "precision": precision, "compile": "off"}
    worker = Worker.boot(PATIENT.model_copy(update=update))
    assert worker.memory.mode == mode
    waiting = worker._pipeline.text_encoder_2.encoder.block[0].layer[0].SelfAttention.k
    tensor = next(iter(waiting.buffers()), None) if precision == "fp8" else waiting.weight
    assert tensor is not None
    assert tensor.is_pinned()
    recipe = worker.spec.recipe(ImageRequest(prompt="a red circle", seed=1))
    first, stages = worker.generate(recipe)
    assert first.rgb.shape == (1024, 1024, 3)
    assert (worker.generate(recipe)[0].rgb == first.rgb).all()
    peak = torch.cuda.max_memory_reserved()
    assert peak <= gib * GIB
    print(
        f"{precision}, {mode}, {gib} GiB: peak {peak / GIB:.1f} GiB, {stages}, planned {worker.memory.needs_gb:.1f} GB"
    )
