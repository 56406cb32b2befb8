"""Kindling's own shape: `ImageRequest`'s fields in, pictures with everything about them out."""

from collections.abc import Sequence
from typing import Any

from handler.api.dialects import openai
from handler.catalog.spec import ModelSpec
from handler.core.recipe import Picture
from handler.core.request import ImageRequest

parse = ImageRequest.parse
partial = openai.partial


def render(request: ImageRequest, spec: ModelSpec, pictures: Sequence[Picture], seconds: float) -> dict[str, Any]:
    """`images`, each with its bytes in base64 or its URL, format, seed, recipe and seconds per stage."""
    images = [
        {
            **openai.carried(picture),
            "format": picture.format,
            "seed": picture.recipe.seed,
            "parameters": picture.recipe.described(),
            "stages_s": {name: round(value, 4) for name, value in picture.stages.items()},
        }
        for picture in pictures
    ]
    return {
        "images": images,
        "model": request.model or spec.id,
        "inference_ms": round(seconds * 1000, 1),
        "plan": pictures[0].plan,
        "usage": openai.usage(pictures),
        "prompt_tokens": openai.prompt_tokens(pictures),
        "peak_memory_mb": openai.peak(pictures),
        **openai.delivery(pictures),
    }


def completed(body: dict[str, Any]) -> list[dict[str, Any]]:
    """The last event of a stream: the whole rendered answer."""
    return [{"type": "image_generation.completed", **body}]
