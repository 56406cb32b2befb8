"""Pixels to bytes. PNG by our own writer: Sub filter and Intel's ISA-L deflate, about 30 times Pillow's default.

The PNG carries the recipe as JSON in an iTXt chunk, so that `read_parameters` can make the picture again.
"""

import io
import json
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from handler.errors import InvalidValue
from handler.request import Format, Recipe

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
KEYWORD = b"kindling"
ISAL_LEVEL = 1
MAX_PARAMETERS = 1_000_000  # bytes of text a picture may carry for us to read


def encode(rgb: Any, form: Format, quality: int, parameters: dict[str, Any] | None) -> bytes:
    """Encode uint8 (height, width, 3). `quality` in percent is for JPEG and WebP, `parameters` for PNG."""
    if form == "png":
        return _png(rgb, parameters)
    from PIL import Image

    buffer = io.BytesIO()
    options = {"subsampling": 0} if form == "jpeg" and quality >= 90 else {}
    Image.fromarray(rgb).save(buffer, form, quality=quality, **options)
    return buffer.getvalue()


def recode(data: bytes, form: Format, quality: int) -> bytes:
    """An encoded picture in another format."""
    import numpy
    from PIL import Image

    with Image.open(io.BytesIO(data)) as picture:
        return encode(numpy.asarray(picture), form, quality, None)


def parameters_of(recipe: Recipe, facts: Mapping[str, str], version: str) -> dict[str, Any]:
    """What a PNG says about itself: all that its pixels depend on; `facts` are the worker's."""
    return {**recipe.described(), **facts, "version": version}


def _png(rgb: Any, parameters: dict[str, Any] | None) -> bytes:
    import numpy
    from isal import isal_zlib

    height, width, channels = rgb.shape
    rows = numpy.empty((height, 1 + width * channels), numpy.uint8)
    rows[:, 0] = 1  # filter type Sub: each byte minus its left neighbour (PNG specification, 9.2)
    flat = rgb.reshape(height, -1)
    rows[:, 1 : 1 + channels] = flat[:, :channels]
    numpy.subtract(flat[:, channels:], flat[:, :-channels], out=rows[:, 1 + channels :])
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    text = _text(parameters) if parameters else b""
    body = isal_zlib.compress(rows.data, ISAL_LEVEL)
    return PNG_SIGNATURE + _chunk(b"IHDR", header) + text + _chunk(b"IDAT", body) + _chunk(b"IEND", b"")


def _text(parameters: dict[str, Any]) -> bytes:
    value = json.dumps(parameters, ensure_ascii=False, sort_keys=True).encode()
    return _chunk(b"iTXt", KEYWORD + b"\0\0\0\0\0" + value)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(data, zlib.crc32(kind)))


def read_parameters(path: Path) -> dict[str, Any]:
    """The parameters a picture carries; InvalidValue if there are none or they are damaged."""
    try:
        text = dict(_texts(path.read_bytes()))[KEYWORD]
        found = json.loads(text)
        if isinstance(found, dict):
            return found
    except (KeyError, ValueError, struct.error):
        pass
    raise InvalidValue(f"{path} carries no Kindling parameters; only PNGs made by Kindling with metadata on do.")


def _texts(data: bytes) -> list[tuple[bytes, bytes]]:
    """Keyword and text of every iTXt chunk whose checksum is right."""
    if not data.startswith(PNG_SIGNATURE):
        raise ValueError("not a PNG")
    found, at = [], len(PNG_SIGNATURE)
    while at + 12 <= len(data):
        size, kind = struct.unpack(">I4s", data[at : at + 8])
        body = data[at + 8 : at + 8 + size]
        (crc,) = struct.unpack(">I", data[at + 8 + size : at + 12 + size])
        if kind == b"iTXt" and size <= MAX_PARAMETERS and crc == zlib.crc32(body, zlib.crc32(kind)):
            keyword, _, rest = body.partition(b"\0")
            found.append((keyword, rest[4:]))
        at += 12 + size
    return found
