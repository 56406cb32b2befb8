"""One file of ComfyUI's folders, as /view shows it: as it is, smaller, or one of its channels."""

import contextlib
import io
import json
import math
import mimetypes
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from handler.api import codec
from handler.api.dialects.comfy import pictured
from handler.api.references import upright
from handler.core.errors import InvalidValue

ANNOTATED = re.compile(r"(.*?) ?\[(output|input|temp)\]")
PREVIEW = re.compile("(webp|jpeg)(?:;([0-9]{1,3}))?")
QUALITY = 90
LONGEST = 16383  # pixels a side of a preview: WebP has no more
CHANNELS = ("rgba", "rgb", "a")
SHOWN = ("image/png", "image/jpeg", "image/webp", "image/gif", "image/bmp", "image/avif", "text/plain")
DOWNLOADED = "application/octet-stream"  # what a browser would run, or is not known


@dataclass(frozen=True, slots=True)
class Shown:
    """A file's bytes and media type; `attached` is what a browser shall not open itself."""

    data: bytes
    media: str
    attached: bool = False


def annotated(filename: str, folder: str) -> tuple[str, str]:
    """Name and folder, for a name may say its folder itself: `x.png [output]`."""
    found = ANNOTATED.fullmatch(filename)
    return (found[1], found[2]) if found else (filename, folder)


def shown(data: bytes, filename: str, preview: str, channel: str) -> Shown:
    """What a browser gets. InvalidValue where a picture is asked for, and this is none. For a thread."""
    if not preview and channel in ("", "rgba"):
        media = mimetypes.guess_type(filename)[0] or DOWNLOADED
        return Shown(data, media) if media in SHOWN else Shown(data, DOWNLOADED, attached=True)
    if channel not in ("", *CHANNELS):
        raise InvalidValue(f"channel can be {', '.join(CHANNELS)}.", "channel")
    picture = _opened(data)
    if channel == "a":
        picture = _alpha(picture)
    elif channel == "rgb":
        picture = picture.convert("RGB")
    if not preview:
        return Shown(_encoded(picture, "png"), "image/png")
    found = PREVIEW.fullmatch(preview)
    form, quality = (found[1], int(found[2] or QUALITY)) if found else ("webp", QUALITY)
    form = "webp" if "a" in channel else form
    picture = picture.convert("RGB") if form == "jpeg" else picture
    picture.thumbnail((LONGEST, LONGEST))
    return Shown(_encoded(picture, form, quality=min(quality, 100)), f"image/{form}")


def masked(original: bytes, mask: bytes) -> bytes:
    """`original` as a PNG with the alpha channel of `mask`, scaled to it. For a thread."""
    picture, alpha = _opened(original).convert("RGBA"), _opened(mask).convert("RGBA").getchannel("A")
    picture.putalpha(alpha.resize(picture.size))
    return codec.inscribed(_encoded(picture, "png"), dict(_graphs(original)))


def _graphs(data: bytes) -> Iterator[tuple[str, str]]:
    """What of the texts that a picture carries is JSON, in ASCII."""
    for name, text in pictured.texts(data).items():
        with contextlib.suppress(ValueError, RecursionError):
            yield name, json.dumps(json.loads(text))


def _opened(data: bytes) -> Any:
    """A picture that is not too large, decoded."""
    return upright(data, "filename", 1, math.inf)


def _alpha(picture: Any) -> Any:
    from PIL import Image

    made = Image.new("RGBA", picture.size)
    made.putalpha(picture.getchannel("A") if picture.mode == "RGBA" else Image.new("L", picture.size, 255))
    return made


def _encoded(picture: Any, form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, form, **options)
    return buffer.getvalue()
