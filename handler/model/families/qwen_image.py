"""Qwen-Image and its Lightning distillation: Qwen2.5-VL as text encoder, classifier-free guidance."""

from functools import partial
from typing import Any

from diffusers import (
    AutoencoderKLQwenImage,
    QwenImageImg2ImgPipeline,
    QwenImageInpaintPipeline,
    QwenImagePipeline,
)

from handler.core.reading import Words
from handler.core.recipe import Recipe
from handler.model.families import schedulers
from handler.model.text import prompts


def _clear_cache(vae: Any) -> None:
    """diffusers', which walks encoder and decoder twice a decode, to count modules whose number it has noted."""
    known = vae._cached_conv_counts
    vae._conv_num, vae._conv_idx, vae._feat_map = known["decoder"], [0], [None] * known["decoder"]
    vae._enc_conv_num, vae._enc_conv_idx, vae._enc_feat_map = known["encoder"], [0], [None] * known["encoder"]


PIPELINE = QwenImagePipeline
IMAGE_TO_IMAGE = QwenImageImg2ImgPipeline
INPAINT = QwenImageInpaintPipeline
MASK_CELL = 1
DENOISER = "transformer"
SCHEDULERS = schedulers.FLOW
AutoencoderKLQwenImage.clear_cache = _clear_cache  # type: ignore[attr-defined]


def encode(pipeline: Any, recipe: Recipe, tokens: int) -> dict[str, Any]:
    """Embeddings of prompt and, with guidance, of the negative prompt, unpadded: (1, length, width)."""
    unsaid = "" if recipe.reading else " "  # as its makers do without a negative prompt
    told = partial(_told, pipeline, recipe, tokens)
    (context,), (negative,) = prompts.sides(recipe, recipe.cfg > 1, told, unsaid)
    arguments = {"prompt_embeds": context, "true_cfg_scale": recipe.cfg, "max_sequence_length": tokens}
    return arguments if negative is None else arguments | {"negative_prompt_embeds": negative}


def room(pipeline: Any, tokens: int) -> int:
    """How many tokens of a prompt are read: what stands before it does not count, what follows is cut off first."""
    return tokens


def _told(pipeline: Any, recipe: Recipe, tokens: int, words: Words) -> prompts.Told:
    context, _ = pipeline.encode_prompt(prompts.spoken(recipe, words), max_sequence_length=tokens)
    return (context,)
