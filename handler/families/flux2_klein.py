"""FLUX.2 [klein]: the small, distilled FLUX.2, with Qwen3 as its text encoder. Takes reference images."""

from typing import Any

from diffusers import Flux2KleinInpaintPipeline, Flux2KleinPipeline

from handler.families import schedulers
from handler.request import Recipe

PIPELINE = Flux2KleinPipeline
INPAINT = Flux2KleinInpaintPipeline
DENOISER = "transformer"
SCHEDULERS = schedulers.FLOW


def encode(pipeline: Any, recipe: Recipe, tokens: int) -> dict[str, Any]:
    """Prompt embeddings (1, tokens, width). The distilled model has no guidance to set: 1 is none."""
    context, _ = pipeline.encode_prompt(recipe.prompt, max_sequence_length=tokens)
    return {"prompt_embeds": context, "guidance_scale": 1.0}
