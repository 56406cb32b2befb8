"""Hugging Face's text to image, as its InferenceClient asks: {"inputs": PROMPT, "parameters": {...}} for one picture.

The parameters are the native fields, also by others' names. `options` are of its own servers, and change nothing here.
"""

from typing import Any

from handler.api.dialects import aliases, native
from handler.core.errors import InvalidType, InvalidValue, MissingParameter, OutOfRange, UnknownParameter
from handler.core.request import ImageRequest

render = native.render
partial, TYPE = native.partial, native.TYPE
completed = native.completed
OBJECTS = ("parameters", "options")
FIELDS = ("inputs", "model", *OBJECTS)


def parse(payload: dict[str, Any]) -> ImageRequest:
    """A body, with the model's name from the path where that has one -> ImageRequest."""
    given = {name: value for name, value in payload.items() if value is not None}
    for name in given:
        if name not in FIELDS:
            raise UnknownParameter(f"Unknown parameter: '{name:.80}'.", name[:80])
    for name in OBJECTS:
        if not isinstance(given.get(name, {}), dict):
            raise InvalidType(f"{name}: Input should be an object.", name)
    if "inputs" not in given:
        raise MissingParameter("Missing required parameter: 'inputs'.", "inputs")
    if not isinstance(given["inputs"], str):
        raise InvalidType("inputs: Input should be a string, the prompt.", "inputs")
    fields, notes = aliases.understood(given.get("parameters", {}))
    if fields.get("prompt", given["inputs"]) != given["inputs"]:  # as for an image, which is in `inputs` then
        told = "the prompt is in inputs here. A picture is made from an image at /v1/images/edits."
        raise InvalidValue(f"parameters.prompt: {told}", "parameters.prompt")
    if fields.get("n", 1) != 1:
        raise OutOfRange("n: one picture is drawn for a request here.", "n")
    named = {"model": given["model"]} if "model" in given else {}
    return ImageRequest.parse({**fields, **named, "prompt": given["inputs"]}).noting(notes)
