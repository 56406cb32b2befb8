"""Stable Diffusion 3.5: two CLIP encoders and T5, classifier-free guidance."""

from functools import partial
from typing import Any

import torch
from diffusers import (
    SD3Transformer2DModel,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusion3InpaintPipeline,
    StableDiffusion3Pipeline,
)
from torch.nn.functional import pad

from handler.core.reading import Words
from handler.core.recipe import Recipe
from handler.model.families import schedulers
from handler.model.text import prompts
from handler.model.text.encoders import CLIP_G, CLIP_L, clip, t5


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
LEAST = 77  # tokens of T5 in ComfyUI


def encode(pipeline: Any, recipe: Recipe, tokens: int) -> dict[str, Any]:
    """Embeddings of prompt and negative prompt, (1, tokens + 77, width) and pooled (1, width).

    With a `Reading`, as many tokens of T5 as there are, but at least `LEAST`, after several times 77.
    """
    if recipe.reading:
        return _read(pipeline, recipe)
    context, negative, pooled, negative_pooled = pipeline.encode_prompt(
        recipe.prompt,
        prompt_2=None,
        prompt_3=None,
        negative_prompt=recipe.negative_prompt,
        do_classifier_free_guidance=recipe.cfg > 1,
        max_sequence_length=tokens,
    )
    return {
        "prompt_embeds": context,
        "negative_prompt_embeds": negative,
        "pooled_prompt_embeds": pooled,
        "negative_pooled_prompt_embeds": negative_pooled,
        "guidance_scale": recipe.cfg,
    }


def _read(pipeline: Any, recipe: Recipe) -> dict[str, Any]:
    one, other = prompts.of_one_length(
        lambda least: prompts.sides(recipe, recipe.cfg > 1, partial(_told, pipeline, recipe, least)), LEAST
    )
    clips = prompts.repeated(one[1], other[1])
    context, negative = (
        side[0] if part is None else torch.cat([pad(part, (0, side[0].shape[-1] - part.shape[-1])), side[0]], dim=1)
        for part, side in zip(clips, (one, other), strict=True)
    )
    return {
        "prompt_embeds": context,
        "negative_prompt_embeds": negative,
        "pooled_prompt_embeds": one[2],
        "negative_pooled_prompt_embeds": other[2],
        "guidance_scale": recipe.cfg,
    }


def _told(pipeline: Any, recipe: Recipe, least: int, words: Words) -> prompts.Told:
    """T5's hidden states, those of both CLIPs beside each other, and their pooled outputs."""
    encoders = [
        clip(pipeline, "", CLIP_L, -2, normed=False),
        clip(pipeline, "_2", CLIP_G, -2, normed=False),
        t5(pipeline, "_3", least),
    ]
    (left, pooled), (right, pooled_2), (context, _) = prompts.encoded(encoders, [words.l, words.g, words.t5], recipe)
    return context, torch.cat([left, right], dim=-1), torch.cat([pooled, pooled_2], dim=-1)
