"""Pictures of the embedded model as who uses diffusers draws them: what the servers beside this file serve."""

import base64
import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

WEIGHTS = Path(__file__).parents[2] / "handler/weights/spark"
TOKENS = 32  # that the model was trained with; more would only slow it down
ROUTE = "/v1/images/generations"
# Installed for Kindling; diffusers, transformers and accelerate would import them, and who serves only these has none.
KINDLINGS = ("boto3", "cache_dit", "gguf", "scipy", "skimage", "torchao")


def hide() -> None:
    """Let this process find only what such a server would have installed."""
    sys.modules.update(dict.fromkeys(KINDLINGS))  # type: ignore[arg-type]


def loaded(compiled: bool = False) -> Any:
    """The pipeline, on one thread if OMP_NUM_THREADS says so; its transformer compiled as diffusers' guide does it.

    Not the VAE: on a CPU Kindling's is not compiled either.
    """
    import torch
    from diffusers import FluxPipeline

    pipeline = FluxPipeline.from_pretrained(WEIGHTS, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    if compiled:
        pipeline.transformer = torch.compile(pipeline.transformer, fullgraph=True)
    return pipeline


def drawn(pipeline: Any, prompts: Sequence[str], n: int, seeds: Sequence[int], size: str, steps: int) -> list[Any]:
    """`n` pictures of each prompt, which is read once; a seed for each picture, all of them at once."""
    import torch

    width, height = map(int, size.split("x"))
    found: list[Any] = pipeline(
        list(prompts),
        width=width,
        height=height,
        num_images_per_prompt=n,
        num_inference_steps=steps,
        guidance_scale=0.0,
        max_sequence_length=TOKENS,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
    ).images
    return found


def answer(images: Sequence[Any]) -> dict[str, Any]:
    """As OpenAI's API has it."""
    return {"data": [{"b64_json": encoded(image)} for image in images]}


def encoded(image: Any) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def port() -> int:
    return int(os.environ["PORT"])
