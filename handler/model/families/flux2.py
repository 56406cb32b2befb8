"""FLUX.2 [dev]: draws from text and from reference images. Guidance is distilled into the model."""

from functools import partial
from typing import Any

from diffusers import Flux2Pipeline

from handler.core.reading import Words
from handler.core.recipe import Recipe
from handler.model.families import schedulers
from handler.model.text import prompts

PIPELINE = Flux2Pipeline
DENOISER = "transformer"
SCHEDULERS = schedulers.FLOW


def encode(pipeline: Any, recipe: Recipe, tokens: int) -> dict[str, Any]:
    """Prompt embeddings (1, tokens, width)."""
    prompts.unguided(recipe)
    ((context,), _) = prompts.sides(recipe, False, partial(_told, pipeline, recipe, tokens))
    return {"prompt_embeds": context, "guidance_scale": recipe.guidance}


def _told(pipeline: Any, recipe: Recipe, tokens: int, words: Words) -> prompts.Told:
    context, _ = pipeline.encode_prompt(prompts.spoken(recipe, words), max_sequence_length=tokens)
    return (context,)
