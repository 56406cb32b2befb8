"""Pixels to bytes. PNG by our own writer: Sub filter and Intel's ISA-L deflate, about 30 times Pillow's default.

A large picture is deflated in stripes, side by side on several cores, and is still one zlib stream for any reader.
Where the stripes begin is fixed by the picture's size alone, so that every machine makes the same bytes of it.

The PNG carries the recipe as JSON in an iTXt chunk, so that `read_parameters` can make the picture again.
"""

import io
import json
import os
import struct
import zlib
from collections.abc import Iterator, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

from handler.core.errors import InvalidValue
from handler.core.recipe import Recipe
from handler.core.request import Format
from handler.core.untrusted import parse

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
KEYWORD = b"kindling"
ISAL_LEVEL = 1
ZLIB_HEADER = b"\x78\x01"  # deflate with a window of 32 KiB, fastest (RFC 1950, 2.2)
STRIPE = 1 << 18  # bytes of filtered rows: about a millisecond of deflate; 1024 x 1024 has 13
THREADS = 8
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


def size_of(data: bytes) -> tuple[int, int]:
    """Width and height of a picture in a file."""
    from PIL import Image

    with Image.open(io.BytesIO(data)) as picture:
        return picture.size


def parameters_of(recipe: Recipe, facts: Mapping[str, str], version: str) -> dict[str, Any]:
    """What decides a picture, which its PNG says: the recipe, the worker's `facts`, our version."""
    return {**recipe.described(), **facts, "version": version}


def _png(rgb: Any, parameters: dict[str, Any] | None) -> bytes:
    height, width, _ = rgb.shape
    header = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    text = _chunk(b"iTXt", KEYWORD + b"\0\0\0\0\0" + _text(parameters)) if parameters else []
    return b"".join([PNG_SIGNATURE, *header, *text, *_chunk(b"IDAT", *_deflated(rgb)), *_chunk(b"IEND")])


def inscribed(png: bytes, texts: Mapping[str, str]) -> bytes:
    """A PNG with more text in it, which is ASCII, by keyword: before its pixels, as ComfyUI's page looks for it."""
    head = len(PNG_SIGNATURE) + 25  # and IHDR, whose size never changes
    said = [_chunk(b"tEXt", keyword.encode() + b"\0" + text.encode("ascii")) for keyword, text in texts.items()]
    return b"".join([png[:head], *(part for chunk in said for part in chunk), png[head:]])


def _deflated(rgb: Any) -> list[bytes]:
    """The pieces of a zlib stream (RFC 1950) of the filtered rows."""
    from isal import isal_zlib

    rows = _filtered(rgb)
    deep = max(1, STRIPE // rows.shape[1])
    *stripes, last = (rows[top : top + deep].data for top in range(0, len(rows), deep))
    others = _pool().map(_stripe, stripes) if stripes else ()
    ending = _stripe(last, isal_zlib.Z_FINISH)
    adler = struct.pack(">I", isal_zlib.adler32(rows.data))
    return [ZLIB_HEADER, *(piece for stripe in others for piece in stripe), *ending, adler]


def _stripe(rows: Any, end: int = zlib.Z_SYNC_FLUSH) -> tuple[bytes, bytes]:
    """Raw deflate of some rows; flushed, it ends with a whole byte, so that more may follow."""
    from isal import isal_zlib

    deflate = isal_zlib.compressobj(ISAL_LEVEL, wbits=-zlib.MAX_WBITS)
    return deflate.compress(rows), deflate.flush(end)


@cache
def _pool() -> Executor:
    return ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1), "deflate")


os.register_at_fork(after_in_child=_pool.cache_clear)  # threads stay behind


def _filtered(rgb: Any) -> Any:
    """Every row as the bytes' differences from their left neighbours, behind the filter's number."""
    import numpy

    height, width, channels = rgb.shape
    rows = numpy.empty((height, 1 + width * channels), numpy.uint8)
    rows[:, 0] = 1  # filter type Sub: each byte minus its left neighbour (PNG specification, 9.2)
    flat = rgb.reshape(height, -1)
    rows[:, 1 : 1 + channels] = flat[:, :channels]
    numpy.subtract(flat[:, channels:], flat[:, :-channels], out=rows[:, 1 + channels :])
    return rows


def _text(parameters: dict[str, Any]) -> bytes:
    return json.dumps(parameters, ensure_ascii=False, sort_keys=True).encode()


def _chunk(kind: bytes, *parts: bytes) -> list[bytes]:
    """One chunk of a PNG, in pieces, for nothing is copied before the whole file is."""
    from isal import isal_zlib  # its CRC takes a sixteenth of zlib's time

    crc = isal_zlib.crc32(kind)
    for part in parts:
        crc = isal_zlib.crc32(part, crc)
    return [struct.pack(">I", sum(map(len, parts))), kind, *parts, struct.pack(">I", crc)]


def read_parameters(path: Path) -> dict[str, Any]:
    """The parameters a picture carries; InvalidValue if there are none or they are damaged."""
    try:
        found = parse(dict(_texts(path.read_bytes()))[KEYWORD])
        if isinstance(found, dict):
            return found
    except (KeyError, ValueError, struct.error):  # no such text, no PNG or no JSON, half a chunk
        pass
    raise InvalidValue(f"{path} carries no Kindling parameters; only PNGs made by Kindling with metadata on do.")


def _texts(data: bytes) -> list[tuple[bytes, bytes]]:
    """Keyword and text of every iTXt chunk whose checksum is right."""
    if not data.startswith(PNG_SIGNATURE):
        raise ValueError("not a PNG")
    found = []
    for kind, body, crc in chunks(data):
        if kind == b"iTXt" and len(body) <= MAX_PARAMETERS and crc == zlib.crc32(body, zlib.crc32(kind)):
            keyword, _, rest = bytes(body).partition(b"\0")
            found.append((keyword, rest[4:]))
    return found


def chunks(data: bytes) -> Iterator[tuple[bytes, memoryview, int]]:
    """Of every chunk of a PNG its kind, what is in it, and the checksum that it says; struct.error at half a one."""
    at = len(PNG_SIGNATURE)
    while at + 12 <= len(data):
        size, kind = struct.unpack_from(">I4s", data, at)
        (crc,) = struct.unpack_from(">I", data, at + 8 + size)
        yield kind, memoryview(data)[at + 8 : at + 8 + size], crc
        at += 12 + size
