"""Z-Image: a single-stream transformer over picture and text together, with Qwen3 as its text encoder."""

from typing import Any

from diffusers import ZImageImg2ImgPipeline, ZImageInpaintPipeline, ZImagePipeline

from handler.core.recipe import Recipe
from handler.model.families import schedulers

PIPELINE = ZImagePipeline
IMAGE_TO_IMAGE = ZImageImg2ImgPipeline
INPAINT = ZImageInpaintPipeline
MASK_CELL = 1
DENOISER = "transformer"
SCHEDULERS = schedulers.FLOW


def encode(pipeline: Any, recipe: Recipe, tokens: int) -> dict[str, Any]:
    """Prompt embeddings, unpadded: (length, width) in a list of one."""
    embeds, _ = pipeline.encode_prompt([recipe.prompt], do_classifier_free_guidance=False, max_sequence_length=tokens)
    return {"prompt_embeds": embeds, "guidance_scale": 0.0}
