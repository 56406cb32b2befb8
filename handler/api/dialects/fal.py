"""fal's models: the names of their fields, and their answer, which has each picture at an address of its own.

The fields are the native ones, also by others' names. `sync_mode` is whether the address is a data URL, with all of the
picture in it.
"""

from collections.abc import Sequence
from typing import Any

from handler.api.dialects import aliases, native, openai
from handler.catalog.spec import ModelSpec
from handler.core.errors import InvalidType
from handler.core.recipe import Picture
from handler.core.request import ImageRequest

partial, TYPE = native.partial, native.TYPE
completed = native.completed


def parse(payload: dict[str, Any]) -> ImageRequest:
    """A body, with the model's name from the path where that has one -> ImageRequest."""
    fields = {name: value for name, value in payload.items() if value is not None}
    inside = fields.pop("sync_mode", False)
    if not isinstance(inside, bool):
        raise InvalidType("sync_mode: Input should be true or false.", "sync_mode")
    ours, notes = aliases.understood(fields)
    return ImageRequest.parse({"response_format": "b64_json" if inside else "url", **ours}).noting(notes)


def render(request: ImageRequest, spec: ModelSpec, pictures: Sequence[Picture], seconds: float) -> dict[str, Any]:
    """`images` with their addresses, the first one's seed, seconds, the prompt; nobody looks for what is not safe."""
    return {
        "images": [native.addressed(picture) for picture in pictures],
        "timings": {"inference": round(seconds, 4)},
        "seed": pictures[0].recipe.seed,
        "has_nsfw_concepts": [False] * len(pictures),
        "prompt": request.prompt,
        **openai.unknown_words(pictures),
        **openai.delivery(pictures),
        **({"notes": list(request.notes)} if request.notes else {}),
    }
