"""Reference images: the files of a request, decoded safely. What a header gives away is checked before any pixel is."""

import hashlib
import io
import logging
import struct
import warnings
from collections.abc import Sequence
from typing import Any

from handler.errors import InvalidValue, OutOfRange
from handler.request import MIN_SIDE, Reference

MAX_PIXELS = 4096 * 4096
MAX_ASPECT = 8  # FLUX.2 takes none longer, nor smaller than MIN_SIDE
SEEN_PIXELS = 1024 * 1024  # FLUX.2 looks at no more


def references(images: Sequence[bytes]) -> tuple[Reference, ...]:
    """Decode the images of a request; InvalidValue or OutOfRange says which one cannot be used, and why."""
    return tuple(Reference(_decode(data, f"images: image {i + 1}"), _sha256(data)) for i, data in enumerate(images))


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _decode(data: bytes, name: str) -> Any:
    """uint8 (height, width, 3), upright, on white where it is transparent. Looks at the header before it decodes."""
    import numpy
    from PIL import Image, ImageOps

    _hush()
    try:
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP")) as image:
            _check(image, name)
            upright = ImageOps.exif_transpose(image)
            if upright.mode.startswith("I"):  # 16 bits of grey, which Pillow would clip to 8, not scale
                upright = Image.fromarray((numpy.asarray(upright) >> 8).astype(numpy.uint8))
            if upright.has_transparency_data:
                upright = Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright.convert("RGBA"))
            return numpy.asarray(_shrunk(upright.convert("RGB")))
    except Image.DecompressionBombError:
        raise _too_large(name) from None
    except (OSError, SyntaxError, ValueError, struct.error):  # what Pillow raises on damaged files
        raise InvalidValue(f"{name} is not a whole PNG, JPEG or WebP file.", "images") from None


def _hush() -> None:
    """Keep what Pillow says of damaged files, and at level debug of a photo's metadata, out of the log."""
    warnings.filterwarnings("ignore", module=r"PIL\.")
    logging.getLogger("PIL").setLevel(logging.INFO)


def _check(image: Any, name: str) -> None:
    """Refuse by what the header says."""
    short, long = sorted(image.size)
    if short * long > MAX_PIXELS:
        raise _too_large(name)
    if short < MIN_SIDE or long > MAX_ASPECT * short:
        needs = f"each side at least {MIN_SIDE} pixels and at most {MAX_ASPECT} times the other"
        raise OutOfRange(f"{name} is {image.width}x{image.height}; send one with {needs}.", "images")
    if image.format != "MPO" and getattr(image, "n_frames", 1) > 1:  # MPO: a photo, with a depth map or the like
        raise InvalidValue(f"{name} is an animation; send a still picture.", "images")


def _shrunk(image: Any) -> Any:
    """At most `SEEN_PIXELS`, resized as FLUX.2's pipelines would do it: what waits in the queue stays small."""
    from PIL import Image

    scale = (SEEN_PIXELS / (image.width * image.height)) ** 0.5
    if scale >= 1:
        return image
    return image.resize((int(image.width * scale), int(image.height * scale)), Image.Resampling.LANCZOS)


def _too_large(name: str) -> OutOfRange:
    return OutOfRange(f"{name} is too large; send at most {MAX_PIXELS // 10**6} million pixels.", "images")
