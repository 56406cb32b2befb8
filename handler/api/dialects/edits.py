"""OpenAI's image edits: its Images API, with images to work from, and a mask that says where.

The images come as `image` or, in newer clients' JSON, as `images`; each as bytes, a data URL, base64 or an object with
the data URL as its `image_url`.
"""

from collections.abc import Sequence
from typing import Any

from handler.api.dialects import openai
from handler.core.errors import InvalidType, InvalidValue, MissingParameter, Unsupported
from handler.core.request import ImageRequest

render = openai.render
TYPE = "image_edit"


def parse(payload: dict[str, Any]) -> ImageRequest:
    """The body of an OpenAI edit -> ImageRequest."""
    fields = {name: value for name, value in payload.items() if value is not None}
    if "markup" in fields:
        raise Unsupported("'markup' is not supported; say where with a mask.", "markup")
    if not isinstance(fields.pop("input_fidelity", ""), str):  # strength says more
        raise InvalidType("input_fidelity: Input should be a string.", "input_fidelity")
    images = _images(fields)
    if "mask" in fields:
        fields["mask"] = _content(fields["mask"], "mask")
    return openai.parse({**fields, "images": images})


def _images(fields: dict[str, Any]) -> list[Any]:
    """Those of `image` or `images`, which this takes out of `fields`."""
    given = {name: fields.pop(name) for name in ("image", "images") if name in fields}
    if len(given) > 1:
        raise InvalidValue("Send the images as 'image' or as 'images', not as both.", "images")
    for name, value in given.items():
        images = list(value) if isinstance(value, Sequence) and not isinstance(value, str | bytes) else [value]
        if images:
            return [_content(image, name) for image in images]
    raise MissingParameter("Missing required parameter: 'image'.", "image")


def _content(value: Any, name: str) -> Any:
    """What an object has instead of the file itself."""
    if not isinstance(value, dict):
        return value
    if {key for key in value if value[key] is not None} != {"image_url"}:
        raise Unsupported(f"{name}: an object should have just image_url, with the image as a data URL.", name)
    return value["image_url"]


def partial(request: ImageRequest, data: bytes, size: tuple[int, int], index: int) -> dict[str, Any]:
    """OpenAI's event for a partial picture of an edit."""
    return {**openai.partial(request, data, size, index), "type": f"{TYPE}.partial_image"}


def completed(body: dict[str, Any]) -> list[dict[str, Any]]:
    """OpenAI's last event of an edit, for each picture."""
    return [{**event, "type": f"{TYPE}.completed"} for event in openai.completed(body)]
