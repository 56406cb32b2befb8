"""The texts in which a picture carries its graph: of a PNG, its text chunks; of WebP and JPEG, its EXIF.

Only what says of itself that it is `prompt` or `workflow` is read, no pixel, and at most `LONGEST` bytes of a text.
"""

import struct
import zlib
from collections.abc import Iterator
from itertools import islice
from typing import Final

from handler.api.codec import PNG_SIGNATURE

NAMES: Final = ("prompt", "workflow")
LONGEST: Final = 16 << 20  # bytes of a text, and of all that are kept
MOST_PARTS: Final = 200_000  # chunks, segments or entries that are looked at
MOST_TEXTS: Final = 16  # that are read: each may have to be inflated
EXIF_POINTER: Final = 0x8769
USER_COMMENT: Final = 0x9286
TEXTS: Final = (1, 2, 7)  # types of entries that have bytes
CODES: Final = {b"ASCII\0\0\0": "utf-8", b"UNICODE\0": "utf-16", b"\0\0\0\0\0\0\0\0": "utf-8"}


def is_picture(data: bytes) -> bool:
    """Whether it is a PNG, a WebP or a JPEG."""
    return data.startswith((PNG_SIGNATURE, b"\xff\xd8\xff")) or (data[:4] == b"RIFF" and data[8:12] == b"WEBP")


def texts(data: bytes) -> dict[str, bytes]:
    """What a picture has as `prompt` and `workflow`: JSON, or what somebody wrote there. Never fails."""
    found: dict[str, bytes] = {}
    pairs = _of_png(data) if data.startswith(PNG_SIGNATURE) else _of_exif(_exif(data))
    for name, text in islice(pairs, MOST_TEXTS):
        if name in NAMES and text and name not in found:
            found[name] = text
    return found


def _of_png(data: bytes) -> Iterator[tuple[str, bytes]]:
    for kind, body in _chunks(data):
        if kind in (b"tEXt", b"zTXt", b"iTXt"):
            name, _, rest = body.partition(b"\0")
            if name.decode("latin-1") in NAMES:
                yield name.decode("latin-1"), _text(kind, rest)
        elif kind == b"eXIf":
            yield from _of_exif(body)


def _chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """A PNG's, as far as they are whole."""
    at = len(PNG_SIGNATURE)
    for _ in range(MOST_PARTS):
        if at + 8 > len(data):
            return
        size, kind = struct.unpack_from(">I4s", data, at)
        if at + 8 + size > len(data):
            return
        yield kind, data[at + 8 : at + 8 + size]
        at += 12 + size


def _text(kind: bytes, rest: bytes) -> bytes:
    """What follows a keyword: as it is, deflated, or with its language before it (PNG 11.3.3)."""
    if kind == b"tEXt":
        return rest.decode("latin-1").encode() if not _is_utf8(rest) else rest
    if kind == b"zTXt":
        return _inflated(rest[1:])
    _, _, after = rest[2:].partition(b"\0")
    _, _, text = after.partition(b"\0")
    return _inflated(text) if rest[:1] == b"\1" else text


def _is_utf8(text: bytes) -> bool:
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True


def _inflated(packed: bytes) -> bytes:
    """Empty if it is no zlib stream, or a longer one than anybody's graph."""
    inflate = zlib.decompressobj()
    try:
        text = inflate.decompress(packed, LONGEST)
    except zlib.error:
        return b""
    return b"" if inflate.unconsumed_tail else text


def _exif(data: bytes) -> bytes:
    """A WebP's or JPEG's; empty if it has none."""
    if data[:4] == b"RIFF":
        return next((body for kind, body in _riff(data) if kind == b"EXIF"), b"")
    return next((body[6:] for body in _segments(data) if body.startswith(b"Exif\0\0")), b"")


def _riff(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    at = 12
    for _ in range(MOST_PARTS):
        if at + 8 > len(data):
            return
        kind, size = struct.unpack_from("<4sI", data, at)
        yield kind, data[at + 8 : at + 8 + size]
        at += 8 + size + size % 2


def _segments(data: bytes) -> Iterator[bytes]:
    """A JPEG's APP1, up to where its pixels begin."""
    at = 2
    for _ in range(MOST_PARTS):
        if at + 4 > len(data):
            return
        mark, size = struct.unpack_from(">HH", data, at)
        if not 0xFFC0 <= mark <= 0xFFFE or mark == 0xFFDA or size < 2:
            return
        if mark == 0xFFE1:
            yield data[at + 4 : at + 2 + size]
        at += 2 + size


def _of_exif(exif: bytes) -> Iterator[tuple[str, bytes]]:
    """Entries that begin with `prompt:` or `workflow:`, as ComfyUI writes them into Model and Make."""
    exif = exif.removeprefix(b"Exif\0\0")
    order = {b"II": "<", b"MM": ">"}.get(exif[:2])
    if order is None or len(exif) < 8:
        return
    for tag, value in _entries(exif, order):
        if tag == USER_COMMENT:
            code = CODES.get(value[:8])
            value = value[8:].decode(code or "utf-8", "replace").encode() if code else value
        name, colon, text = value.partition(b":")
        if colon and (said := name.decode("latin-1").strip().lower()) in NAMES:
            yield said, text.rstrip(b"\0").strip()
        elif value.lstrip().startswith(b"{"):
            yield "prompt", value.rstrip(b"\0").strip()


def _entries(exif: bytes, order: str) -> Iterator[tuple[int, bytes]]:
    """Of the first directory and its Exif one (TIFF 6.0, section 2)."""
    todo, seen, left = [struct.unpack_from(order + "I", exif, 4)[0]], set[int](), len(exif)
    while todo and len(seen) < 2:
        start = todo.pop()
        if start in seen or start + 2 > len(exif):
            continue
        seen.add(start)
        count = struct.unpack_from(order + "H", exif, start)[0]
        for at in range(start + 2, min(start + 2 + 12 * count, len(exif) - 11), 12):
            tag, kind, size, where = struct.unpack_from(order + "HHII", exif, at)
            if tag == EXIF_POINTER:
                todo.append(where)
            elif kind in TEXTS and left >= 0:  # else they lie over each other
                value = exif[at + 8 : at + 8 + size] if size <= 4 else exif[where : where + size]
                left -= len(value)
                yield tag, value
