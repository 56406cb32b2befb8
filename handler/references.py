"""The images and the mask of a request, decoded safely. What a header gives away is checked before any pixel is."""

import hashlib
import io
import logging
import math
import struct
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from handler.errors import InvalidValue, OutOfRange
from handler.request import MIN_SIDE, ImageRequest, Mask, Reference
from handler.spec import SEEN_PIXELS, ModelSpec

MAX_PIXELS = 4096 * 4096
MAX_ASPECT = 8  # FLUX.2 takes none longer, nor smaller than MIN_SIDE
ORIENTATION, LIES = 0x0112, (5, 6, 7, 8)  # a photo's tag, and its values for one that was taken on its side


def decoded(request: ImageRequest, spec: ModelSpec) -> tuple[tuple[Reference, ...], Mask | None]:
    """The images and the mask of `request`, no larger than `spec` looks at; raises what says which cannot be used."""
    if request.mask is None:
        return references(request.images, spec.looks_at(request)), None
    mask = kept(request.mask, request.images[0], spec.looks_at(request))  # first, for it is told faster
    return references(request.images, spec.looks_at(request)), mask


def references(images: Sequence[bytes], most: int = SEEN_PIXELS) -> tuple[Reference, ...]:
    """Decode images; InvalidValue or OutOfRange says which cannot be used, and why.

    The first comes to at most so many pixels, the others, which are never drawn anew, to what is looked at.
    """
    return tuple(
        Reference(_decode(data, f"images: image {i + 1}", SEEN_PIXELS if i else most), _sha256(data))
        for i, data in enumerate(images)
    )


def kept(data: bytes, image: bytes, most: int = SEEN_PIXELS) -> Mask:
    """Decode the mask of `image`: its alpha channel. It must have one, and the image's size."""
    import numpy
    from PIL import Image, ImageOps

    with _opened(image, "images: image 1") as of, _opened(data, "mask: the file") as found:
        size, wanted = _upright_size(found), _upright_size(of)
        if size != wanted:
            both = f"it is {size[0]}x{size[1]} and its image {wanted[0]}x{wanted[1]}"
            raise InvalidValue(f"mask: {both}; send one of the image's size.", "mask")
        alpha = ImageOps.exif_transpose(found).convert("RGBA").getchannel("A")
    if alpha.getextrema()[0] == 255:
        raise InvalidValue("mask: it is opaque all over; make it transparent where the image is to change.", "mask")
    return Mask(numpy.asarray(_shrunk(alpha, most, Image.Resampling.BILINEAR)), _sha256(data))  # which never overshoots


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _decode(data: bytes, name: str, most: int) -> Any:
    """uint8 (height, width, 3), upright, on white where it is transparent."""
    import numpy
    from PIL import Image, ImageOps

    with _opened(data, name) as image:
        upright = ImageOps.exif_transpose(image)
        if upright.mode.startswith("I"):  # 16 bits of grey, which Pillow would clip to 8, not scale
            upright = Image.fromarray((numpy.asarray(upright) >> 8).astype(numpy.uint8))
        if upright.has_transparency_data:
            upright = Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright.convert("RGBA"))
        return numpy.asarray(_shrunk(upright.convert("RGB"), most, Image.Resampling.LANCZOS))


@contextmanager
def _opened(data: bytes, name: str) -> Iterator[Any]:
    """The image, not decoded yet, but checked by what its header says. Decoding it inside may fail as well."""
    from PIL import Image

    _hush()
    try:
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP")) as image:
            _check(image, name)
            yield image
    except Image.DecompressionBombError:
        raise _too_large(name) from None
    except (OSError, SyntaxError, ValueError, struct.error):  # what Pillow raises on damaged files
        raise InvalidValue(f"{name} is not a whole PNG, JPEG or WebP file.", _param(name)) from None


def _param(name: str) -> str:
    return name.partition(":")[0]


def _upright_size(image: Any) -> tuple[int, int]:
    """Width and height as `exif_transpose` would make them."""
    width, height = image.size
    return (height, width) if image.getexif().get(ORIENTATION) in LIES else (width, height)


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
        raise OutOfRange(f"{name} is {image.width}x{image.height}; send one with {needs}.", _param(name))
    if image.format != "MPO" and getattr(image, "n_frames", 1) > 1:  # MPO: a photo, with a depth map or the like
        raise InvalidValue(f"{name} is an animation; send a still picture.", _param(name))


def _shrunk(image: Any, most: int, filter_: Any) -> Any:
    """At most `most` pixels, resized as FLUX.2's pipelines would do it: what waits in the queue stays small."""
    scale = math.sqrt(most / (image.width * image.height))
    if scale >= 1:
        return image
    return image.resize((int(image.width * scale), int(image.height * scale)), filter_)


def _too_large(name: str) -> OutOfRange:
    return OutOfRange(f"{name} is too large; send at most {MAX_PIXELS // 10**6} million pixels.", _param(name))
