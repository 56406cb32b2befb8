"""FLUX.2 [dev]: draws from text and from reference images. Guidance is distilled into the model."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from diffusers import Flux2Pipeline
from diffusers.pipelines.flux2.pipeline_flux2 import format_input

from handler.core.reading import Words
from handler.core.recipe import Recipe
from handler.model.families import schedulers
from handler.model.text import prompts
from handler.model.tokens import before

PIPELINE = Flux2Pipeline
DENOISER = "transformer"
SCHEDULERS = schedulers.FLOW


def encode(pipeline: Any, recipe: Recipe, tokens: int) -> dict[str, Any]:
    """Prompt embeddings (1, tokens, width)."""
    prompts.unguided(recipe)
    ((context,), _) = prompts.sides(recipe, False, partial(_told, pipeline, recipe, tokens))
    return {"prompt_embeds": context, "guidance_scale": recipe.guidance}


def room(pipeline: Any, tokens: int) -> int:
    """How many tokens of a prompt are read; what follows it is cut off first."""

    def chat(text: str) -> Sequence[int]:
        found = pipeline.tokenizer.apply_chat_template(format_input([text]), tokenize=True, return_dict=True)
        ids: Sequence[int] = found["input_ids"][0]
        return ids

    return tokens - before(chat)


def _told(pipeline: Any, recipe: Recipe, tokens: int, words: Words) -> prompts.Told:
    context, _ = pipeline.encode_prompt(prompts.spoken(recipe, words), max_sequence_length=tokens)
    return (context,)
