"""Chroma: FLUX.1 [schnell] made smaller and trained anew with classifier-free guidance; T5 alone reads the prompt."""

import functools
from typing import Any

import torch
from diffusers import ChromaImg2ImgPipeline, ChromaInpaintPipeline, ChromaPipeline
from diffusers.configuration_utils import FrozenDict
from diffusers.models.transformers.transformer_chroma import ChromaCombinedTimestepTextProjEmbeddings
from torch.nn.functional import pad

from handler.core.reading import Words
from handler.core.recipe import Recipe
from handler.model.families import schedulers
from handler.model.text import prompts
from handler.model.text.encoders import t5


class Inpaint(ChromaInpaintPipeline):
    """diffusers', which as of 0.42.1 asks Chroma's transformer for a setting that only FLUX.1's has."""

    transformer: Any

    def __call__(self, **arguments: Any) -> Any:
        transformer, config = self.transformer, self.transformer.config
        transformer._internal_dict = FrozenDict({**config, "guidance_embeds": False})
        try:
            return super().__call__(**arguments)  # type: ignore[misc]
        finally:
            transformer._internal_dict = config


@functools.wraps(ChromaCombinedTimestepTextProjEmbeddings.forward)
def _embedded(self: Any, timestep: torch.Tensor) -> torch.Tensor:
    """diffusers' (batch,) -> (batch, places, width), but its guidance of zero does not come from the CPU each time."""
    steps, guidance = self.time_proj(timestep), self.guidance_proj(torch.zeros_like(timestep))
    both = torch.cat([steps.to(timestep.dtype), guidance.to(timestep.dtype)], dim=1)
    places = self.mod_proj.to(timestep).repeat(len(timestep), 1, 1)
    return torch.cat([both.unsqueeze(1).repeat(1, places.shape[1], 1), places], dim=-1)


PIPELINE = ChromaPipeline
IMAGE_TO_IMAGE = ChromaImg2ImgPipeline
INPAINT = Inpaint
MASK_CELL = 1
UNSEEN = -200.0  # of what is filled up, in the mask: its square is finite in fp16, and no picture sees it
DENOISER = "transformer"
SCHEDULERS = schedulers.FLOW
ChromaCombinedTimestepTextProjEmbeddings.forward = _embedded  # type: ignore[method-assign]


def encode(pipeline: Any, recipe: Recipe, tokens: int) -> dict[str, Any]:
    """Embeddings of prompt and negative prompt, (1, tokens, width), and which of the tokens count.

    With a `Reading` there are just those of the words, as in ComfyUI, however many.
    """
    if recipe.reading:
        return _read(pipeline, recipe)
    context, _, mask, negative, _, negative_mask = pipeline.encode_prompt(
        recipe.prompt,
        negative_prompt=recipe.negative_prompt,
        do_classifier_free_guidance=recipe.cfg > 1,
        max_sequence_length=tokens,
    )
    return {
        "prompt_embeds": context,
        "prompt_attention_mask": mask,
        "negative_prompt_embeds": negative,
        "negative_prompt_attention_mask": negative_mask,
        "guidance_scale": recipe.cfg,
    }


def _read(pipeline: Any, recipe: Recipe) -> dict[str, Any]:
    """Sides are filled up, for diffusers takes only those of one length; what is filled up does not count."""
    encoder = t5(pipeline, "", 1, ended=False)

    def told(words: Words) -> prompts.Told:
        return prompts.encoded([encoder], [words.t5], recipe)[0]

    (context, _), (negative, _) = prompts.sides(recipe, recipe.cfg > 1, told)
    length = max(each.shape[1] for each in (context, negative) if each is not None)
    (context, mask), (negative, negative_mask) = _filled(context, length), _filled(negative, length)
    return {
        "prompt_embeds": context,
        "prompt_attention_mask": mask,
        "negative_prompt_embeds": negative,
        "negative_prompt_attention_mask": negative_mask,
        "guidance_scale": recipe.cfg,
    }


def _filled(context: torch.Tensor | None, length: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Diffusers adds the mask, query's times key's, to attention's scores, where a 0 beside ones would hide nothing."""
    if context is None:
        return None, None
    missing = length - context.shape[1]
    return pad(context, (0, 0, 0, missing)), pad(torch.ones_like(context[..., 0]), (0, missing), value=UNSEEN)
