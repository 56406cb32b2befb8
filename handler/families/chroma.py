"""Chroma: FLUX.1 [schnell] made smaller and trained anew with classifier-free guidance; T5 alone reads the prompt."""

from typing import Any

from diffusers import ChromaPipeline

from handler.families import schedulers
from handler.request import Recipe

PIPELINE = ChromaPipeline
DENOISER = "transformer"
SCHEDULERS = schedulers.FLOW


def encode(pipeline: Any, recipe: Recipe, tokens: int) -> dict[str, Any]:
    """Embeddings of prompt and negative prompt, (1, tokens, width), and which of the tokens count."""
    context, _, mask, negative, _, negative_mask = pipeline.encode_prompt(
        recipe.prompt,
        negative_prompt=recipe.negative_prompt,
        do_classifier_free_guidance=recipe.guidance > 1,
        max_sequence_length=tokens,
    )
    return {
        "prompt_embeds": context,
        "prompt_attention_mask": mask,
        "negative_prompt_embeds": negative,
        "negative_prompt_attention_mask": negative_mask,
        "guidance_scale": recipe.guidance,
    }
