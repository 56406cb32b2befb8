"""Stable Diffusion 3.5: two CLIP encoders and T5, classifier-free guidance."""

from typing import Any

from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline

from handler.families import schedulers
from handler.request import Recipe

PIPELINE = StableDiffusion3Pipeline
DENOISER = "transformer"
SCHEDULERS = schedulers.FLOW
SD3Transformer2DModel._repeated_blocks = ["JointTransformerBlock"]  # type: ignore[attr-defined]  # diffusers names none


def encode(pipeline: Any, recipe: Recipe, tokens: int) -> dict[str, Any]:
    """Embeddings of prompt and negative prompt, (1, tokens + 77, width) and pooled (1, width)."""
    context, negative, pooled, negative_pooled = pipeline.encode_prompt(
        recipe.prompt,
        prompt_2=None,
        prompt_3=None,
        negative_prompt=recipe.negative_prompt,
        do_classifier_free_guidance=recipe.guidance > 1,
        max_sequence_length=tokens,
    )
    return {
        "prompt_embeds": context,
        "negative_prompt_embeds": negative,
        "pooled_prompt_embeds": pooled,
        "negative_pooled_prompt_embeds": negative_pooled,
        "guidance_scale": recipe.guidance,
    }
