"""Stable Diffusion XL: the base, Turbo and Lightning. Predicts epsilon; two CLIP encoders."""

from typing import Any

from diffusers import StableDiffusionXLImg2ImgPipeline, StableDiffusionXLInpaintPipeline, StableDiffusionXLPipeline

from handler.core.recipe import Recipe
from handler.model.families import schedulers

PIPELINE = StableDiffusionXLPipeline
IMAGE_TO_IMAGE = StableDiffusionXLImg2ImgPipeline
INPAINT = StableDiffusionXLInpaintPipeline
MASK_CELL = 1
DENOISER = "unet"
SCHEDULERS = schedulers.EPSILON


def encode(pipeline: Any, recipe: Recipe, tokens: int) -> dict[str, Any]:
    """Embeddings of prompt and negative prompt, (1, 77, width) and pooled (1, width)."""
    context, negative, pooled, negative_pooled = pipeline.encode_prompt(
        recipe.prompt,
        negative_prompt=recipe.negative_prompt,  # None is zeros, which is how the base was trained
        do_classifier_free_guidance=recipe.guidance > 1,
    )
    return {
        "prompt_embeds": context,
        "negative_prompt_embeds": negative,
        "pooled_prompt_embeds": pooled,
        "negative_pooled_prompt_embeds": negative_pooled,
        "guidance_scale": recipe.guidance,
    }
