"""On a GPU: nothing in the step loop waits for all it was told, so that it never idles, and stages are its own time.

The one wait there is, for the event of the step before, is none that torch's debug mode sees.
"""

import time
from typing import Any

import pytest
import torch
from conftest import PATIENT

from handler import ImageRequest, Worker

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


@pytest.mark.parametrize("precision", ["bf16", "fp8", "int8-dynamic"])
def test_no_step_waits_for_the_gpu(precision: str) -> None:
    worker = Worker.boot(PATIENT.model_copy(update={"precision": precision, "compile": "off", "device": "cuda"}))
    recipe = worker.spec.recipe(ImageRequest(prompt="a red circle", seed=1, num_inference_steps=8))

    def strict(done: int, *_: Any) -> None:
        torch.cuda.set_sync_debug_mode("default" if done == 8 else "error")

    try:
        worker.generate(recipe, strict)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_stages_add_up_to_what_the_picture_takes() -> None:
    """Denoising is most of it. By the clock of the launches it would be next to nothing, and decoding all the rest."""
    worker = Worker.boot(PATIENT.model_copy(update={"compile": "off", "device": "cuda"}))
    recipe = worker.spec.recipe(ImageRequest(prompt="a red circle", seed=1, num_inference_steps=8))
    worker.generate(recipe)
    ends: list[float] = []
    start = time.perf_counter()
    _, stages = worker.generate(recipe, lambda *_: ends.append(time.perf_counter() - start))
    took = time.perf_counter() - start
    assert list(stages) == ["encode", "denoise", "decode"]
    assert 0.5 * took < sum(stages.values()) <= took
    assert stages["denoise"] > stages["decode"]
    assert ends[-1] > 0.5 * stages["denoise"]  # its last step was told when the one before had been computed
