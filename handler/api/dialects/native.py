"""Kindling's own shape: `ImageRequest`'s fields in, also by others' names, pictures with everything about them out."""

from collections.abc import Sequence
from typing import Any

from handler.api.dialects import aliases, openai
from handler.api.pieces import File
from handler.catalog.spec import ModelSpec
from handler.core.recipe import Picture
from handler.core.request import ImageRequest

partial, TYPE = openai.partial, openai.TYPE


def parse(payload: dict[str, Any]) -> ImageRequest:
    """A native body -> ImageRequest."""
    fields, notes = aliases.understood(payload)
    return ImageRequest.parse(fields).noting(notes)


def render(request: ImageRequest, spec: ModelSpec, pictures: Sequence[Picture], seconds: float) -> dict[str, Any]:
    """`images`, each with its bytes in base64 or its URL, format, seed, recipe and seconds per stage.

    One alone is there as `image` too, as fal has it, and its `seed`.
    """
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
    alone = {"image": addressed(pictures[0]), "seed": pictures[0].recipe.seed} if len(pictures) == 1 else {}
    return {
        "images": images,
        **alone,
        "model": request.model or spec.id,
        "inference_ms": round(seconds * 1000, 1),
        "plan": pictures[0].plan,
        "usage": openai.usage(pictures),
        "prompt_tokens": openai.prompt_tokens(pictures),
        **openai.unknown_words(pictures),
        "peak_memory_mb": openai.peak(pictures),
        **openai.delivery(pictures),
        **({"notes": list(request.notes)} if request.notes else {}),
    }


def addressed(picture: Picture) -> dict[str, Any]:
    """A picture as a file with an address: in the object store, or a data URL."""
    width, height = picture.recipe.size
    media = f"image/{picture.format}"
    url = picture.url or File(picture.data, f"data:{media};base64,")
    return {"url": url, "content_type": media, "width": width, "height": height}


def completed(body: dict[str, Any]) -> list[dict[str, Any]]:
    """The last event of a stream: the whole rendered answer."""
    return [{"type": "image_generation.completed", **body}]
