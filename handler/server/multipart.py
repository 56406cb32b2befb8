"""Forms with files (multipart/form-data), as clients send images to edit: read under limits, and never to disk."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from python_multipart.multipart import parse_options_header
from starlette.datastructures import Headers

from handler.core.attachments import MAX_REFERENCES
from handler.core.errors import InvalidValue
from handler.core.request import ImageRequest
from handler.core.untrusted import Malformed, number, parse

MEDIA = "multipart/form-data"
FILES = MAX_REFERENCES + 1  # and a mask
FIELDS = 64
HEAD, BOUNDARY = 8 << 10, 200  # bytes of a part's head, and of what is between the parts
CHARSETS = (b"utf-8", b"utf8", b"us-ascii")
LISTS = ("image", "images")  # what may come more than once, also as image[] or image[0]
INDEX = re.compile(r"\[[0-9]{0,9}\]$")
JOINED = "loras"  # what may come as one text with commas, or more than once
NESTED = ("loras", "sampling", "reading", "step_cache")  # what may come as JSON
MEANT = ("prompt", "negative_prompt")  # what says something though it is empty
NUMBERS = {  # the fields that are no text
    name
    for name, field in ImageRequest.model_fields.items()
    if field.annotation in (int, float, bool, int | None, float | None)
}


@dataclass(frozen=True, slots=True)
class Part:
    """A field of a form. If it is a file it has a `filename`, which may be empty."""

    name: str
    data: bytes = field(repr=False)
    filename: str | None = None

    @property
    def text(self) -> str:
        """What it says, if it is no file."""
        return _text(self.data, f"'{self.name:.80}'", self.name[:80])


def parts(headers: Headers, body: bytes) -> list[Part]:
    """The fields of a form, in order; InvalidValue if it is none. For a thread: a form may be large."""
    _, said = parse_options_header(headers.get("content-type", ""))
    boundary = said.get(b"boundary", b"")
    if not 0 < len(boundary) <= BOUNDARY:
        raise InvalidValue(f"Send a form, as {MEDIA} with its boundary.")
    if said.get(b"charset", CHARSETS[0]).lower() not in CHARSETS:
        raise _unreadable("send it as UTF-8")
    return [*_parts(body, b"\r\n--" + boundary)] if body else []


def _parts(body: bytes, edge: bytes) -> Iterator[Part]:
    start = len(edge) - 2 if body.startswith(edge[2:]) else len(edge) if body.startswith(edge) else 0
    if not start:
        raise _unreadable("it does not begin with its boundary")
    first, *others = body[start:].split(edge, FILES + FIELDS + 1)
    files = fields = 0
    for piece in (first, *others):
        if piece.startswith(b"--"):
            return
        part = _part(piece)
        files, fields = files + (part.filename is not None), fields + (part.filename is None)
        if files > FILES or fields > FIELDS:
            most, what = (FILES, "files") if files > FILES else (FIELDS, "fields")
            raise _unreadable(f"Too many {what}; it may have {most}")
        yield part
    raise _unreadable("it was cut short, for its last boundary is missing")


def _part(piece: bytes) -> Part:
    """What is between two boundaries: a head, an empty line, the data."""
    start = piece.find(b"\r\n")
    end = piece.find(b"\r\n\r\n", start, start + HEAD)
    if start < 0:
        raise _unreadable("it was cut short, for its last boundary is missing")
    if end < 0 or piece[:start].strip(b" \t"):
        raise _unreadable(f"a part has no head of at most {HEAD >> 10} kB")
    lines = [line.partition(b":") for line in piece[start + 2 : end].split(b"\r\n")]
    head = {name.strip().lower(): value.strip() for name, _, value in lines}
    _, said = parse_options_header(head.get(b"content-disposition", b""))
    if b"name" not in said:
        raise _unreadable("a part has no name")
    filename = _text(said[b"filename"], "a file's name") if b"filename" in said else None
    return Part(_text(said[b"name"], "a field's name"), piece[end + 4 :], filename)


def _text(data: bytes, what: str, param: str | None = None) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise _unreadable(f"{what} is not UTF-8", param) from None


def _unreadable(why: str, param: str | None = None) -> InvalidValue:
    return InvalidValue(f"The form cannot be read: {why}.", param)


def read(headers: Headers, body: bytes) -> dict[str, Any]:
    """The fields of a form as JSON would have them: files as bytes, numbers as numbers. InvalidValue if it is none.

    Browsers and form builders send empty fields and files for what was left out; so these count as not sent. For a
    thread.
    """
    fields: dict[str, Any] = {}
    for part in parts(headers, body):
        name = INDEX.sub("", part.name)
        value = typed(name, part.text) if part.filename is None else part.data
        if not value and isinstance(value, str | bytes) and name not in MEANT:
            continue
        if name in LISTS:
            fields.setdefault(name, []).append(value)
        elif name == JOINED and isinstance(value, str) and isinstance(fields.get(name, ""), str):
            fields[name] = f"{fields[name]},{value}" if name in fields else value
        elif name == JOINED and isinstance(value, list | dict) and isinstance(fields.get(name, []), list):
            fields[name] = [*fields.get(name, ()), *(value if isinstance(value, list) else [value])]
        elif name in fields:
            raise InvalidValue(f"'{name:.80}' appears twice.", name[:80])
        else:
            fields[name] = value
    return fields


def typed(name: str, text: str) -> Any:
    """`text` as the type that the field has; as it is where that fails, for the field's check to refuse it by name."""
    try:
        if name in NUMBERS:
            return parse(text.lower(), number)  # some clients spell True
        return parse(text, number) if name in NESTED and text.lstrip().startswith(("{", "[")) else text
    except Malformed:
        return text
