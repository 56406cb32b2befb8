"""On a GPU: nothing in the step loop waits for it, so that the CPU runs ahead and the GPU never idles."""

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
