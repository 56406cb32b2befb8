"""FLUX.1: [schnell], [dev] and the embedded spark. Guidance is distilled into the model: no negative prompt.

But with a `Sampling`, which may ask for classifier-free guidance beside it.
"""

from functools import partial
from typing import Any

from diffusers import FluxImg2ImgPipeline, FluxInpaintPipeline, FluxPipeline

from handler.core.reading import Words
from handler.core.recipe import Recipe
from handler.model.families import schedulers
from handler.model.text import prompts
from handler.model.text.encoders import CLIP_L, clip, t5

PIPELINE = FluxPipeline
IMAGE_TO_IMAGE = FluxImg2ImgPipeline
INPAINT = FluxInpaintPipeline
MASK_CELL = 1
DENOISER = "transformer"
SCHEDULERS = schedulers.FLOW
LEAST = 256  # tokens of T5 in ComfyUI; FLUX attends to padding, so another length is another picture


def encode(pipeline: Any, recipe: Recipe, tokens: int) -> dict[str, Any]:
    """Prompt embeddings (1, tokens, width), of more tokens where a `Reading` finds more, and pooled (1, width)."""
    cfg = recipe.sampling.cfg if recipe.sampling else 1.0
    read = _read if recipe.reading else _encoded
    (context, pooled), (negative, negative_pooled) = prompts.of_one_length(
        lambda least: prompts.sides(recipe, cfg > 1, partial(read, pipeline, recipe, least)),
        min(tokens, LEAST) if recipe.reading else tokens,
    )
    return {
        "prompt_embeds": context,
        "negative_prompt_embeds": negative,
        "pooled_prompt_embeds": pooled,
        "negative_pooled_prompt_embeds": negative_pooled,
        "guidance_scale": recipe.guidance,
        "true_cfg_scale": cfg,
    }


def _encoded(pipeline: Any, _: Recipe, tokens: int, words: Words) -> prompts.Told:
    context, pooled, _ = pipeline.encode_prompt(words.t5, prompt_2=None, max_sequence_length=tokens)
    return context, pooled


def _read(pipeline: Any, recipe: Recipe, least: int, words: Words) -> prompts.Told:
    both = [clip(pipeline, "", CLIP_L), t5(pipeline, "_2", least)]
    (_, pooled), (context, _) = prompts.encoded(both, [words.l, words.t5], recipe)
    return context, pooled
