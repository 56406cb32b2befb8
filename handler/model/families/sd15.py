"""Stable Diffusion 1.5, which thousands of checkpoints are made from. Predicts epsilon; one CLIP encoder.

Its safety checker is not loaded: that makes pictures black, which are an error here, without a word to the caller. Who
serves pictures to others looks at them with a filter of their own choice, as with every model of the catalogue.
"""

from functools import partial
from typing import Any

from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline, StableDiffusionPipeline

from handler.core.reading import Words
from handler.core.recipe import Recipe
from handler.model.families import schedulers
from handler.model.text import prompts
from handler.model.text.encoders import CLIP_L, Encoder, clip

PIPELINE = StableDiffusionPipeline
IMAGE_TO_IMAGE = StableDiffusionImg2ImgPipeline
INPAINT = StableDiffusionInpaintPipeline
WITHOUT = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
MASK_CELL = 1
DENOISER = "unet"
SCHEDULERS = schedulers.EPSILON


def encode(pipeline: Any, recipe: Recipe, tokens: int) -> dict[str, Any]:
    """Embeddings of prompt and negative prompt, (1, 77, width); no negative prompt is an empty one.

    In chunks, or with a `Reading`, there may be several times 77.
    """
    if recipe.reading or recipe.long_prompts == "chunked":
        return _read(pipeline, recipe)
    context, negative = pipeline.encode_prompt(
        recipe.prompt,
        device=pipeline._execution_device,
        num_images_per_prompt=1,
        do_classifier_free_guidance=recipe.cfg > 1,
        negative_prompt=recipe.negative_prompt,
    )
    return {"prompt_embeds": context, "negative_prompt_embeds": negative, "guidance_scale": recipe.cfg}


def _read(pipeline: Any, recipe: Recipe) -> dict[str, Any]:
    encoder = clip(pipeline, "", CLIP_L)
    (context, _), (negative, _) = prompts.sides(recipe, recipe.cfg > 1, partial(_told, encoder, recipe))
    context, negative = prompts.repeated(context, negative)
    return {"prompt_embeds": context, "negative_prompt_embeds": negative, "guidance_scale": recipe.cfg}


def _told(encoder: Encoder, recipe: Recipe, words: Words) -> prompts.Told:
    return prompts.encoded([encoder], [words.l], recipe)[0]
