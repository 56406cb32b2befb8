"""Stable Diffusion XL: the base, Turbo and Lightning. Predicts epsilon; two CLIP encoders."""

from dataclasses import replace
from typing import Any

import torch
from diffusers import StableDiffusionXLImg2ImgPipeline, StableDiffusionXLInpaintPipeline, StableDiffusionXLPipeline

from handler.core.reading import Reading, Sizes, Words
from handler.core.recipe import Recipe
from handler.model.families import schedulers
from handler.model.text import prompts
from handler.model.text.encoders import CLIP_G, CLIP_L, clip

PIPELINE = StableDiffusionXLPipeline
IMAGE_TO_IMAGE = StableDiffusionXLImg2ImgPipeline
INPAINT = StableDiffusionXLInpaintPipeline
MASK_CELL = 1
DENOISER = "unet"
SCHEDULERS = schedulers.EPSILON


def encode(pipeline: Any, recipe: Recipe, tokens: int) -> dict[str, Any]:
    """Embeddings of prompt and negative prompt, (1, 77, width) and pooled (1, width).

    In chunks, or with a `Reading`, there may be several times 77, and with that also what is said of sizes.
    """
    if recipe.reading:
        return _read(pipeline, recipe)
    if recipe.long_prompts == "chunked":
        return _read(pipeline, replace(recipe, reading=Reading(zeros=recipe.negative_prompt is None)))
    context, negative, pooled, negative_pooled = pipeline.encode_prompt(
        recipe.prompt,
        negative_prompt=recipe.negative_prompt,  # None is zeros, which is how the base was trained
        do_classifier_free_guidance=recipe.cfg > 1,
    )
    return {
        "prompt_embeds": context,
        "negative_prompt_embeds": negative,
        "pooled_prompt_embeds": pooled,
        "negative_pooled_prompt_embeds": negative_pooled,
        "guidance_scale": recipe.cfg,
    }


def _read(pipeline: Any, recipe: Recipe) -> dict[str, Any]:
    both = [clip(pipeline, "", CLIP_L, -2, normed=False), clip(pipeline, "_2", CLIP_G, -2, normed=False)]

    def encode(words: Words) -> prompts.Told:
        (left, _), (right, pooled) = prompts.encoded(both, [words.l, words.g], recipe)
        return torch.cat([left, right], dim=-1), pooled

    (context, pooled), (negative, negative_pooled) = prompts.sides(recipe, recipe.cfg > 1, encode)
    context, negative = prompts.repeated(context, negative)
    return {
        "prompt_embeds": context,
        "negative_prompt_embeds": negative,
        "pooled_prompt_embeds": pooled,
        "negative_pooled_prompt_embeds": negative_pooled,
        "guidance_scale": recipe.cfg,
        **_sizes(recipe),
    }


def _sizes(recipe: Recipe) -> dict[str, tuple[int, int]]:
    """What the U-Net is told of sizes, as (height, width); where nothing is said, those of the picture.

    diffusers knows one place of the crop for both prompts where it works from an image.
    """
    reading = recipe.reading
    if not reading or not (reading.sizes or reading.negative_sizes):
        return {}
    width, height = recipe.size
    own = Sizes(width=width, height=height, crop_w=0, crop_h=0, target_width=width, target_height=height)
    told = {"": reading.sizes or own, "negative_": reading.negative_sizes or own}
    return {
        side + name: value
        for side, sizes in told.items()
        for name, value in (
            ("original_size", (sizes.height, sizes.width)),
            ("crops_coords_top_left", (sizes.crop_h, sizes.crop_w)),
            ("target_size", (sizes.target_height, sizes.target_width)),
        )
    }
