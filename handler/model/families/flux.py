"""FLUX.1: [schnell], [dev] and the embedded spark. Guidance is distilled into the model: no negative prompt."""

from typing import Any

from diffusers import FluxImg2ImgPipeline, FluxInpaintPipeline, FluxPipeline

from handler.core.recipe import Recipe
from handler.model.families import schedulers

PIPELINE = FluxPipeline
IMAGE_TO_IMAGE = FluxImg2ImgPipeline
INPAINT = FluxInpaintPipeline
MASK_CELL = 1
DENOISER = "transformer"
SCHEDULERS = schedulers.FLOW


def encode(pipeline: Any, recipe: Recipe, tokens: int) -> dict[str, Any]:
    """Prompt embeddings (1, tokens, width) and pooled (1, width)."""
    context, pooled, _ = pipeline.encode_prompt(recipe.prompt, prompt_2=None, max_sequence_length=tokens)
    return {"prompt_embeds": context, "pooled_prompt_embeds": pooled, "guidance_scale": recipe.guidance}
