"""OpenAI's Images API, with the extensions that RunInfra established (steps, guidance, scheduler, seed, ...).

Fields that change nothing here are accepted and ignored; fields that would change the answer are refused by
name rather than ignored. Null counts as not sent, as the official clients send it.
"""

import re
import time
from collections.abc import Sequence
from typing import Any

from handler.api.pieces import File
from handler.catalog.spec import ModelSpec
from handler.core.errors import InvalidType, InvalidValue, OutOfRange, Unsupported
from handler.core.recipe import Picture
from handler.core.request import MAX_SIDE, MIN_SIDE, ImageRequest
from handler.model.text.unknown import MOST
from handler.volume.adapters import Adapter

IGNORED = ("user", "safety_identifier", "moderation", "style")
ACCEPTED: dict[str, tuple[Any, ...]] = {  # field -> the values that need nothing from us
    "background": ("auto", "opaque"),
}
WHY = {
    "background": "background can be 'auto' or 'opaque'; these models draw no transparency.",
}
UNSUPPORTED = ("complexity", "frame_count", "frame_duration_ms", "svg")
SIZE = re.compile(r"(0|[1-9][0-9]{0,8})[xX*](0|[1-9][0-9]{0,8})")  # as the schema spells it, without zeros before
SIDES = ("width", "height")
TYPE = "image_generation"  # of events, what it is that is being done


def parse(payload: dict[str, Any]) -> ImageRequest:
    """An OpenAI request body -> ImageRequest."""
    fields = {name: value for name, value in payload.items() if value is not None}
    for name in UNSUPPORTED:
        if name in fields:
            raise Unsupported(f"'{name}' is not supported.", name)
    for name, allowed in ACCEPTED.items():
        value = fields.pop(name, allowed[0])
        if not any(value == ok and type(value) is type(ok) for ok in allowed):
            raise Unsupported(WHY[name], name)
    for name in IGNORED:
        if not isinstance(fields.pop(name, ""), str):
            raise InvalidType(f"{name}: Input should be a string.", name)
    size = sides(fields.pop("size", "auto"))
    if any(fields.get(side, size[side]) != size[side] for side in size):
        raise InvalidValue("size says another size than width and height; send one of them.", "size")
    try:
        return ImageRequest.parse(fields | size)
    except OutOfRange as error:
        if size and error.param in SIDES:
            raise OutOfRange(f"size: each side should be {MIN_SIDE} to {MAX_SIDE} pixels.", "size") from None
        raise


def sides(size: Any) -> dict[str, int]:
    """Width and height of a `size`; none where it is 'auto'."""
    if not isinstance(size, str):
        raise InvalidType("size: Input should be a string such as '1024x1024' or 'auto'.", "size")
    if size == "auto":
        return {}
    match = SIZE.fullmatch(size)
    if match is None:
        raise InvalidValue(f"size should be 'WIDTHxHEIGHT' in pixels or 'auto', got {size[:40]!r}.", "size")
    return dict(zip(SIDES, map(int, match.groups()), strict=True))


def render(request: ImageRequest, spec: ModelSpec, pictures: Sequence[Picture], seconds: float) -> dict[str, Any]:
    """OpenAI's ImagesResponse plus seeds, inference_ms, width, height, model and plan."""
    width, height = pictures[0].recipe.size
    return {
        "created": int(time.time()),
        "data": [{**carried(picture), "seed": picture.recipe.seed} for picture in pictures],
        "background": "opaque",
        "output_format": request.output_format,
        "quality": request.quality or "auto",
        "size": f"{width}x{height}",
        "inference_ms": round(seconds * 1000, 1),
        "width": width,
        "height": height,
        "model": request.model or spec.id,
        "plan": pictures[0].plan,
        "usage": usage(pictures),
        "prompt_tokens": prompt_tokens(pictures),
        **unknown_words(pictures),
        "peak_memory_mb": peak(pictures),
        **delivery(pictures),
    }


def usage(pictures: Sequence[Picture]) -> dict[str, Any]:
    """OpenAI's count of tokens: of a request's prompts, which all its pictures share. Pictures are no tokens here."""
    text = pictures[0].tokens.given
    details = {"text_tokens": text, "image_tokens": 0}
    return {"input_tokens": text, "input_tokens_details": details, "output_tokens": 0, "total_tokens": text}


def prompt_tokens(pictures: Sequence[Picture]) -> dict[str, int]:
    """How many tokens of a request's prompts were read, of how many."""
    return {"given": pictures[0].tokens.given, "read": pictures[0].tokens.read}


def unknown_words(pictures: Sequence[Picture]) -> dict[str, list[str]]:
    """Those of a request's prompts that the model does not know, where there are any and its row can tell."""
    words = dict.fromkeys(word for picture in pictures for word in picture.tokens.unknown)
    return {"unknown_words": list(words)[:MOST]} if words else {}


def peak(pictures: Sequence[Picture]) -> float:
    """The most memory that the worker has needed so far in MB, of 1024 times 1024 bytes as SGLang's are."""
    return round(max(picture.peak_bytes for picture in pictures) / 2**20, 2)


def carried(picture: Picture) -> dict[str, str | File]:
    """A picture as its URL, where it has one, or as its bytes."""
    return {"url": picture.url} if picture.url else {"b64_json": File(picture.data)}


def delivery(pictures: Sequence[Picture]) -> dict[str, str]:
    """What to say where the object store did not take every picture that it should have."""
    why = next((picture.undelivered for picture in pictures if picture.undelivered), "")
    told = f"The object store did not take every picture: {why}. Those without a url are here as base64."
    return {"delivery": told} if why else {}


def partial(request: ImageRequest, data: bytes, size: tuple[int, int], index: int) -> dict[str, Any]:
    """OpenAI's event for a partial picture; `size` is its own, smaller than what is being drawn."""
    return {
        "type": f"{TYPE}.partial_image",
        "partial_image_index": index,
        "b64_json": File(data).text(),
        "created_at": int(time.time()),
        "background": "opaque",
        "output_format": request.output_format,
        "quality": request.quality or "auto",
        "size": f"{size[0]}x{size[1]}",
    }


def completed(body: dict[str, Any]) -> list[dict[str, Any]]:
    """OpenAI's last event, for each picture of a rendered answer, with our extensions to it."""
    shared = {name: value for name, value in body.items() if name not in ("created", "data")}
    kind = {"type": f"{TYPE}.completed", "created_at": body["created"]}
    return [{**kind, **picture, **shared} for picture in body["data"]]


def models(names: Sequence[str], loras: Sequence[Adapter] = ()) -> dict[str, Any]:
    """The answer to GET /v1/models: the one model this worker serves, under each of its names, and its LoRAs.

    Those are an extension: the names that a request may have in `loras`, and what each was made for.
    """
    usable = [
        {"name": lora.name, "made_for": lora.made_for, "trigger_words": list(lora.trigger_words)}
        for lora in loras
        if not lora.fault
    ]
    return {"object": "list", "data": [model(name) for name in names], "loras": usable}


def model(name: str) -> dict[str, Any]:
    """One entry of the model list."""
    owner = name.rpartition("/")[0] or "kindling"
    return {"id": name, "object": "model", "created": 0, "owned_by": owner}
