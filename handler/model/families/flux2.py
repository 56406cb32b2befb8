"""FLUX.2 [dev]: draws from text and from reference images. Guidance is distilled into the model."""

from typing import Any

from diffusers import Flux2Pipeline

from handler.core.recipe import Recipe
from handler.model.families import schedulers

PIPELINE = Flux2Pipeline
DENOISER = "transformer"
SCHEDULERS = schedulers.FLOW


def encode(pipeline: Any, recipe: Recipe, tokens: int) -> dict[str, Any]:
    """Prompt embeddings (1, tokens, width)."""
    context, _ = pipeline.encode_prompt(recipe.prompt, max_sequence_length=tokens)
    return {"prompt_embeds": context, "guidance_scale": recipe.guidance}
