"""Stable Diffusion 3.5: two CLIP encoders and T5, classifier-free guidance."""

from typing import Any

from diffusers import (
    SD3Transformer2DModel,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusion3InpaintPipeline,
    StableDiffusion3Pipeline,
)

from handler.core.recipe import Recipe
from handler.model.families import schedulers


class Inpaint(StableDiffusion3InpaintPipeline):
    """diffusers', which as of 0.42.1 forgets the VAE's shift when it decodes: huggingface/diffusers#13611."""

    vae: Any

    def __call__(self, **arguments: Any) -> Any:
        vae, shift = self.vae, self.vae.config.shift_factor
        decode = vae.decode
        vae.decode = lambda latents, **options: decode(latents + shift, **options)
        try:
            return super().__call__(**arguments)  # type: ignore[misc]
        finally:
            del vae.decode


PIPELINE = StableDiffusion3Pipeline
IMAGE_TO_IMAGE = StableDiffusion3Img2ImgPipeline
INPAINT = Inpaint
MASK_CELL = 1
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
