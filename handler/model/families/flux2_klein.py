"""FLUX.2 [klein]: the small, distilled FLUX.2, with Qwen3 as its text encoder. Takes reference images."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from diffusers import Flux2KleinInpaintPipeline, Flux2KleinPipeline
from PIL import Image

from handler.core.reading import Words
from handler.core.recipe import Recipe
from handler.model.families import schedulers
from handler.model.text import prompts
from handler.model.tokens import before, chat


class Inpaint(Flux2KleinInpaintPipeline):
    """diffusers', which as of 0.42.1 crops all references to the shape of the first, and shrinks none of several.

    Here each comes as it comes without a mask: at its own shape, of at most a megapixel.
    """

    vae_scale_factor: int
    image_processor: Any

    def __call__(self, image_reference: Sequence[Image.Image] = (), **arguments: Any) -> Any:
        self._references = [self._prepared(image) for image in image_reference]
        return super().__call__(**arguments)  # type: ignore[misc]

    def prepare_image_latents(self, images: list[torch.Tensor], *rest: Any) -> Any:
        return super().prepare_image_latents([*images, *self._references], *rest)  # type: ignore[misc]

    def _prepared(self, image: Image.Image) -> Any:
        """As `Flux2KleinPipeline` does it."""
        seen, token = self.image_processor._resize_if_exceeds_area(image), 2 * self.vae_scale_factor
        width, height = (side // token * token for side in seen.size)
        return self.image_processor.preprocess(seen, height=height, width=width, resize_mode="crop")


PIPELINE = Flux2KleinPipeline
INPAINT = Inpaint
MASK_CELL = 2  # its pipeline brings the mask to tokens, the others to latents
DENOISER = "transformer"
SCHEDULERS = schedulers.FLOW


def encode(pipeline: Any, recipe: Recipe, tokens: int) -> dict[str, Any]:
    """Prompt embeddings (1, tokens, width). The distilled model has no guidance to set: 1 is none."""
    prompts.unguided(recipe)
    ((context,), _) = prompts.sides(recipe, False, partial(_told, pipeline, recipe, tokens))
    return {"prompt_embeds": context, "guidance_scale": 1.0}


def room(pipeline: Any, tokens: int) -> int:
    """How many tokens of a prompt are read; what follows it is cut off first."""
    return tokens - before(partial(chat, pipeline.tokenizer))


def _told(pipeline: Any, recipe: Recipe, tokens: int, words: Words) -> prompts.Told:
    context, _ = pipeline.encode_prompt(prompts.spoken(recipe, words), max_sequence_length=tokens)
    return (context,)
