"""Answers that are the picture itself, where a request's Accept header wants that more than JSON (RFC 9110, 12.5.1)."""

import re
from collections.abc import Mapping
from typing import Any

from starlette.responses import Response

from handler.api.dialects import aliases
from handler.api.pieces import File
from handler.api.reply import Reply
from handler.core.errors import InvalidValue, OutOfRange, Unsupported
from handler.core.request import Format

JSON = "application/json"
MEDIA: dict[Format, str] = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}
QUALITY = re.compile(r"[qQ]=(0(?:\.[0-9]{0,3})?|1(?:\.0{0,3})?)")
COUNTS, FORMATS = (
    (ours, *(name for name, field in aliases.NAMES.items() if field == ours)) for ours in ("n", "output_format")
)
TOLD = ("x-seed", "x-model", "x-inference-ms")  # of a picture, which has no JSON around it to say so


def forms(accept: str, pictures_first: bool = False) -> tuple[Format, ...]:
    """The formats in which the picture itself may be sent, the dearest first; none where JSON is as welcome.

    `pictures_first` are routes that send pictures then. Unsupported where it wants only pictures that we do not make.
    """
    ranges = _ranges(accept or "*/*")
    json = _quality(ranges, JSON)
    wanted = {form: _quality(ranges, media) for form, media in MEDIA.items()}
    if not any((json, *wanted.values())) and any(media.startswith("image/") for media in ranges):
        raise Unsupported(f"Accept asks for other pictures than {', '.join(MEDIA.values())}.", "Accept")
    better = [form for form in MEDIA if wanted[form] > json or (pictures_first and wanted[form] == json > 0)]
    return tuple(sorted(better, key=lambda form: -wanted[form]))


def prefers(accept: str, media: str, other: str) -> bool:
    """Whether the media type `media` is wanted more than `other`."""
    ranges = _ranges(accept)
    return _quality(ranges, media) > _quality(ranges, other)


def _ranges(accept: str) -> dict[str, float]:
    """What may come, by media range, each with its quality, 0 to 1; what is none of those is wanted."""
    found = {}
    for part in accept.split(","):
        media, *parameters = (each.strip() for each in part.split(";"))
        quality = next((match[1] for each in parameters if (match := QUALITY.fullmatch(each))), "1")
        found[media.lower()] = float(quality)
    return found


def _quality(ranges: Mapping[str, float], media: str) -> float:
    """By the most precise range that there is."""
    kind = media.partition("/")[0]
    return next((ranges[each] for each in (media, f"{kind}/*", "*/*") if each in ranges), 0.0)


def asked(payload: Any, wanted: tuple[Format, ...], within: str = "") -> Any:
    """`payload` as a request for one picture in one of these formats, if it is one at all. Raises why it cannot be.

    Its choices are in the field `within`, where that is named; such a request is for one picture, whatever it accepts.
    """
    chosen = payload.get(within, {}) if within and isinstance(payload, dict) else payload
    if chosen is None and isinstance(payload, dict):  # null counts as not sent
        chosen = {}
    if not wanted or not isinstance(chosen, dict):
        return payload
    if not within:
        _require_alone(chosen)
    chosen = _one(chosen, wanted)
    return {**payload, within: chosen} if within else chosen


def _require_alone(payload: dict[str, Any]) -> None:
    counts = [count for name in COUNTS if isinstance(count := payload.get(name), int | float)]
    if max(counts, default=1) > 1:  # what is no count, its dialect refuses
        raise OutOfRange("Accept asks for the picture itself, which is one alone: send n 1, or accept JSON.", "n")


def _one(payload: dict[str, Any], wanted: tuple[Format, ...]) -> dict[str, Any]:
    if payload.get("response_format") == "url":
        raise InvalidValue(
            "Accept asks for the picture itself, response_format for its URL: send one.",
            "response_format",
        )
    name = next((name for name in FORMATS if payload.get(name) is not None), "")
    if not name:
        return payload | {"output_format": wanted[0]}
    form = "jpeg" if payload[name] == "jpg" else payload[name]
    if form in tuple(MEDIA) and form not in wanted:  # it may be anything that JSON has
        raise InvalidValue(f"{name} is {payload[name]}, but Accept asks for {MEDIA[wanted[0]]}.", name)
    return payload


def bare(reply: Reply) -> Response:
    """A good answer with one picture as that picture, what else it says of it in the head."""
    content = reply.content
    [one] = content.get("data") or content["images"]
    file: File = one["b64_json"]
    values = (one["seed"], content["model"], content["inference_ms"])
    said = dict(zip(TOLD, map(str, values), strict=True))
    form: Format = one.get("format") or content["output_format"]
    return Response(file.data, reply.status, reply.headers | said, MEDIA[form])
