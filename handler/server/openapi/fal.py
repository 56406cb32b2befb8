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
RARE = ("delivery", "notes")


def requests(native: dict[str, Schema], rules: list[Schema], words: dict[str, Any]) -> dict[str, Schema]:
    """Bodies with the `native` fields and fal's; where the path names the model, without that."""
    fields = native | {"image_size": SIZE, "sync_mode": INSIDE}
    nameless = {name: schema for name, schema in fields.items() if name != "model"}
    bodies = {"FalRequest": fields, "FalModelRequest": nameless}
    return {name: closed(each, ("prompt",), [*rules, ONE_SIZE]) | words for name, each in bodies.items()}
