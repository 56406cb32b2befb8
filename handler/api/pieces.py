"""JSON that has files in it, written piece by piece: base64 and JSON of whole pictures would hold up all threads.

A picture of 2048x2048 may have 16 MB. Python's encoders hold its lock for 0.2 s over that, whatever thread they run in.
"""

import binascii
import json
import secrets
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

PIECE = 3 << 16  # bytes of a file whose base64 is one piece: 0.2 ms; a multiple of 3, so that only the last is padded


@dataclass(frozen=True, slots=True)
class File:
    """In the place of a string: a file, which is its base64 in JSON, behind `head`."""

    data: bytes = field(repr=False)
    head: str = ""

    @property
    def size(self) -> int:
        """How many characters that are."""
        return len(self.head) + -(-len(self.data) // 3) * 4

    def text(self) -> str:
        """All of them."""
        return b"".join(self.pieces()).decode()

    def pieces(self) -> Iterator[bytes]:
        """The same, in pieces."""
        if self.head:
            yield self.head.encode()
        for start in range(0, len(self.data), PIECE):
            yield binascii.b2a_base64(memoryview(self.data)[start : start + PIECE], newline=False)


def plain(value: Any) -> Any:
    """`value` with strings in the place of files."""
    if isinstance(value, File):
        return value.text()
    if isinstance(value, dict):
        return {name: plain(each) for name, each in value.items()}
    return [plain(each) for each in value] if isinstance(value, list) else value


def length(value: Any) -> int:
    """Characters of `json.dumps(plain(value))`, without making it."""
    files: list[int] = []

    def named(each: File) -> str:
        files.append(each.size)
        return ""

    return len(json.dumps(value, default=named)) + sum(files)


def encoded(value: Any) -> list[bytes | File]:
    """The JSON of `value`: what is between the files, and those."""
    files: list[File] = []
    mark = secrets.token_hex(16)  # which no text in there can know

    def named(each: object) -> str:
        if not isinstance(each, File):
            raise TypeError(f"{type(each).__name__} is not JSON")
        files.append(each)
        return mark

    text = json.dumps(value, default=named, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    first, *others = (between.encode() for between in text.split(mark))
    return [first, *(part for pair in zip(files, others, strict=True) for part in pair)]


def size(parts: list[bytes | File]) -> int:
    """Bytes of all pieces."""
    return sum(part.size if isinstance(part, File) else len(part) for part in parts)


def pieces(parts: list[bytes | File]) -> Iterator[bytes]:
    """All of it, in order."""
    for part in parts:
        if isinstance(part, File):
            yield from part.pieces()
        else:
            yield part
