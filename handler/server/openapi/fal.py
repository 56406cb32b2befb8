"""What fal's clients send, and get."""

from typing import Any

from handler.api.dialects.aliases import SIZES
from handler.server.openapi.schema import COUNT, NULL, NUMBER, TEXT, Schema, array, closed, whole

SENT: Schema = {"not": NULL}
SIZE: Schema = {"enum": [*SIZES, "auto", None], "description": "Or an object with width and height."}
INSIDE: Schema = {"type": ["boolean", "null"], "default": False, "description": "Whether pictures come as data URLs."}
ONE_SIZE: Schema = {"not": {"required": ["image_size", "width"], "properties": {"image_size": SENT, "width": SENT}}}
IMAGE = whole({"url": TEXT, "content_type": TEXT, "width": COUNT, "height": COUNT})
ANSWER: dict[str, Schema] = {
    "images": array(IMAGE),
    "timings": whole({"inference": NUMBER | {"description": "Seconds."}}),
    "seed": COUNT | {"description": "Of the first picture."},
    "has_nsfw_concepts": array({"type": "boolean", "description": "Nobody looks: false."}),
    "prompt": TEXT,
}
RARE = ("delivery", "unknown_words", "notes")


def request(native: dict[str, Schema], rules: list[Schema], words: dict[str, Any]) -> Schema:
    """A body with the `native` fields and fal's, but for the model, which the path names."""
    fields = native | {"image_size": SIZE, "sync_mode": INSIDE}
    del fields["model"]
    return closed(fields, ("prompt",), [*rules, ONE_SIZE]) | words
