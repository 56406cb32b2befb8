"""Z-Image: a single-stream transformer over picture and text together, with Qwen3 as its text encoder."""

from functools import partial
from typing import Any

from diffusers import ZImageImg2ImgPipeline, ZImageInpaintPipeline, ZImagePipeline

from handler.core.reading import Words
from handler.core.recipe import Recipe
from handler.model.families import schedulers
from handler.model.text import prompts
from handler.model.tokens import before, chat

PIPELINE = ZImagePipeline
IMAGE_TO_IMAGE = ZImageImg2ImgPipeline
INPAINT = ZImageInpaintPipeline
MASK_CELL = 1
DENOISER = "transformer"
SCHEDULERS = schedulers.FLOW


def encode(pipeline: Any, recipe: Recipe, tokens: int) -> dict[str, Any]:
    """Prompt embeddings, unpadded: (length, width) in a list of one; with guidance those of the negative one too.

    That only comes with a `Sampling`. diffusers' scale is by how much it goes beyond the prompt: one less.
    """
    cfg = recipe.sampling.cfg if recipe.sampling else 1.0
    (embeds,), (negative,) = prompts.sides(recipe, cfg > 1, partial(_told, pipeline, recipe, tokens))
    arguments = {"prompt_embeds": [embeds], "guidance_scale": cfg - 1}
    return arguments if negative is None else arguments | {"negative_prompt_embeds": [negative]}


def room(pipeline: Any, tokens: int) -> int:
    """How many tokens of a prompt are read; what follows it is cut off first."""
    return tokens - before(partial(chat, pipeline.tokenizer))


def _told(pipeline: Any, recipe: Recipe, tokens: int, words: Words) -> prompts.Told:
    said = [prompts.spoken(recipe, words)]
    [embeds], _ = pipeline.encode_prompt(said, do_classifier_free_guidance=False, max_sequence_length=tokens)
    return (embeds,)
