"""The images and the mask of a request, decoded safely. What a header gives away is checked before any pixel is."""

import contextlib
import hashlib
import io
import logging
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from handler.api import photos
from handler.api.codec import chunks
from handler.api.containers import MOST, TooMuch, needed
from handler.api.decoding import begin
from handler.api.isolated import ORIENTATION
from handler.api.photos import MAX_PIXELS, TAKEN
from handler.catalog.spec import SEEN_PIXELS, ModelSpec
from handler.core.errors import InvalidValue, KindlingError, OutOfRange
from handler.core.recipe import Mask, Reference
from handler.core.request import MIN_SIDE, ImageRequest, MaskForm

MAX_ASPECT = 8  # FLUX.2 takes none longer, nor smaller than MIN_SIDE
# Pillow's names of what turns upright what was taken otherwise, by a photo's tag.
TURNS = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM"}
TURNS_LYING = {5: "TRANSPOSE", 6: "ROTATE_270", 7: "TRANSVERSE", 8: "ROTATE_90"}
TINT = 32  # of 255: what JPEG may make of grey
ANEW = {None: "transparent, or white on black,", "alpha": "transparent", "white": "white", "black": "black"}
OWN_SPACE = ("CMYK", "L")  # modes whose colours are not RGB's
GREY, COLOUR = 0, 2  # types of a PNG that have no alpha (specification, 11.2.2)


def decoded(request: ImageRequest, spec: ModelSpec) -> tuple[tuple[Reference, ...], Mask | None]:
    """The images and the mask of `request`, no larger than `spec` looks at; raises what says which cannot be used."""
    if request.mask is None:
        return references(request.images, spec.looks_at(request)), None
    most = spec.looks_at(request)
    mask = kept(request.mask, request.images[0], most, request.mask_form)  # first, for it is told faster
    return references(request.images, most), mask


def references(images: Sequence[bytes], most: int = SEEN_PIXELS) -> tuple[Reference, ...]:
    """Decode images; InvalidValue or OutOfRange says which cannot be used, and why.

    The first comes to at most so many pixels, the others, which are never drawn anew, to what is looked at.
    """
    return tuple(
        Reference(_decode(data, f"images: image {i + 1}", SEEN_PIXELS if i else most), _sha256(data))
        for i, data in enumerate(images)
    )


def upright(data: bytes, name: str, fewest: int = MIN_SIDE, aspect: float = MAX_ASPECT) -> Any:
    """An image by itself, turned as its tag says: RGB, or RGBA if anything may be transparent; colours as stored.

    A JPEG of more than `MAX_PIXELS` is read at a half, a quarter or an eighth of its size.
    """
    with _opened(data, name, fewest, aspect) as (image, bare):
        photos.reduce(image)
        return _upright(image, bare)


def kept(data: bytes, image: bytes, most: int = SEEN_PIXELS, form: MaskForm | None = None) -> Mask:
    """Decode the mask of `image`, stretched to its size; InvalidValue if nothing of that is to be drawn anew."""
    import numpy
    from PIL import Image

    with _opened(image, "images: image 1") as (of, _):
        size = _within(_upright_size(of), most)
    with _opened(data, "mask: the file", fewest=1) as (found, bare):
        photos.reduce(found)
        mask = _stays(_upright(found, bare), form).resize(size, Image.Resampling.BILINEAR)  # which never overshoots
    if mask.getextrema()[0] == 255:
        raise InvalidValue(f"mask: it keeps all of its image; make it {ANEW[form]} where that is to change.", "mask")
    return Mask(numpy.asarray(mask), _sha256(data))


def _stays(mask: Any, form: MaskForm | None) -> Any:
    """Where a mask says that its image stays: grey, 255 where it does. `form` as `ImageRequest` has it."""
    from PIL import Image, ImageChops

    alpha: Any = mask.getchannel("A") if mask.mode == "RGBA" else Image.new("L", mask.size, 255)
    if form == "alpha" or (form is None and alpha.getextrema()[0] < 255):
        return alpha
    grey = mask.convert("L")
    tint: Any = ImageChops.difference(mask.convert("RGB"), grey.convert("RGB")).getextrema()
    if form is None and max(high for _, high in tint) > TINT:
        told = "it is neither transparent anywhere nor black and white; say what it is with mask_form"
        raise InvalidValue(f"mask: {told}.", "mask")
    return grey if form == "black" else ImageChops.invert(grey)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _decode(data: bytes, name: str, most: int) -> Any:
    """uint8 (height, width, 3), upright, in sRGB, on white where it is transparent."""
    import numpy
    from PIL import Image

    with _opened(data, name) as (image, bare):
        photos.reduce(image)
        upright = _upright(image, bare)
        profile = None if image.mode in OWN_SPACE else image.info.get("icc_profile")
        if upright.mode == "RGBA":
            upright = Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright).convert("RGB")
        return numpy.asarray(photos.srgb(_shrunk(upright, most, Image.Resampling.LANCZOS), profile))


def _upright(image: Any, data: bytes) -> Any:
    """In 8 bits, RGB or, if anything may be transparent, RGBA; turned as its tag says."""
    import numpy
    from PIL import Image

    alpha, turn = _keyed(image, data), (TURNS | TURNS_LYING).get(_orientation(image))
    if alpha:
        image.info.pop("transparency")
    if image.mode.startswith("I"):  # 16 bits of grey, which Pillow would clip to 8, not scale
        image = Image.fromarray((numpy.asarray(image) >> 8).astype(numpy.uint8))
    if image.mode in OWN_SPACE:  # a profile of ink or of grey fits no other pixels
        image = photos.srgb(image, image.info.get("icc_profile"))
    pixels = image.convert("RGBA" if image.has_transparency_data else "RGB")
    if alpha:
        pixels.putalpha(alpha)
    return pixels.transpose(Image.Transpose[turn]) if turn else pixels


def _keyed(image: Any, data: bytes) -> Any:
    """The alpha of a PNG that says which one colour is transparent, compared in all its bits; None of any other image.

    Pillow compares that colour with samples that it has cut or stretched to eight bits.
    """
    import numpy
    from PIL import Image

    key = image.info.get("transparency")
    if image.format != "PNG" or key is None:
        return None
    if data[12:16] != b"IHDR":
        raise SyntaxError("the header does not come first")
    depth, kind = data[24:26]
    if kind not in (GREY, COLOUR):
        return None
    if depth == 1:
        key = _grey_key(data)  # Pillow says only whether any bit of it is set
    clear = _samples(image, data, depth) == numpy.array(key) & ((1 << depth) - 1)
    return Image.fromarray(numpy.where(clear.all(-1) if kind == COLOUR else clear, 0, 255).astype(numpy.uint8))


def _grey_key(data: bytes) -> int:
    """All 16 bits of a grey PNG's transparent sample."""
    *_, key = (body for kind, body, _ in chunks(data) if kind == b"tRNS")
    return int.from_bytes(key[:2])


def _samples(image: Any, data: bytes, depth: int) -> Any:
    """What the file has: (height, width), or (height, width, 3) of `COLOUR`, in `depth` bits."""
    import numpy
    from PIL import Image

    found = numpy.asarray(image).astype(numpy.uint16)
    if image.mode == "RGB" and depth == 16:  # Pillow gives the upper byte, or, told that they lie otherwise, the lower
        with Image.open(io.BytesIO(data), formats=("PNG",)) as other:
            other.tile = [tile._replace(args="RGB;16L") for tile in other.tile]
            return found << 8 | numpy.asarray(other)
    return found // (255 // ((1 << depth) - 1)) if image.mode == "L" else found


@contextmanager
def _opened(data: bytes, name: str, fewest: int = MIN_SIDE, aspect: float = MAX_ASPECT) -> Iterator[tuple[Any, bytes]]:
    """The image, not decoded yet, but checked by what its parts say, and the file without those that it does not need.

    Decoding it inside may fail as well.
    """
    from PIL import Image

    _hush()
    try:
        begin()
        bare = needed(data)
        with photos.opened(bare) as image:
            _check(image, name, photos.most_pixels(image, bare), fewest, aspect)
            yield image, bare
    except KindlingError:
        raise
    except TooMuch as error:
        raise OutOfRange(f"{name} has {error}; save it anew with any editor, and send that.", _param(name)) from None
    except Image.DecompressionBombError:
        raise _too_large(name, MAX_PIXELS) from None
    except Exception:  # whatever Pillow raises, and that is much, is the file's fault
        known = photos.kind(data)
        told = f"{name} is {known}; send a {TAKEN} file." if known else f"{name} is not a whole {TAKEN} file."
        raise InvalidValue(told, _param(name)) from None


def _param(name: str) -> str:
    return name.partition(":")[0]


def _upright_size(image: Any) -> tuple[int, int]:
    width, height = image.size
    return (height, width) if _orientation(image) in TURNS_LYING else (width, height)


def _orientation(image: Any) -> int:
    """A photo's, by that tag alone; upright, 1, where it says nothing that can be read."""
    if image.format == "PNG":  # whose tags may come last: Pillow decodes it then, and complains of its pixels once
        image.load()
    with contextlib.suppress(Exception):  # of all the other tags
        if isinstance(found := image.getexif().get(ORIENTATION), int):
            return found
    return 1


def _hush() -> None:
    """Keep what Pillow says of damaged files, and at level debug of a photo's metadata, out of the log."""
    from PIL import PngImagePlugin

    # A profile counts as text there, and Pillow's 1 MB is less than a printer's has.
    PngImagePlugin.MAX_TEXT_CHUNK = MOST["bytes of colour profile"] + 1
    warnings.filterwarnings("ignore", module=r"PIL\.")
    logging.getLogger("PIL").setLevel(logging.INFO)


def _check(image: Any, name: str, most: int = MAX_PIXELS, fewest: int = MIN_SIDE, aspect: float = MAX_ASPECT) -> None:
    """Refuse by what the header says."""
    short, long = sorted(image.size)
    if short * long > most:
        raise _too_large(name, most)
    if short < fewest or long > aspect * short:
        needs = f"each side at least {fewest} pixels and at most {aspect} times the other"
        raise OutOfRange(f"{name} is {image.width}x{image.height}; send one with {needs}.", _param(name))
    if getattr(image, "n_frames", 1) > 1:
        raise InvalidValue(f"{name} is an animation; send a still picture.", _param(name))


def _shrunk(image: Any, most: int, filter_: Any) -> Any:
    """At most `most` pixels: what waits in the queue stays small."""
    size = _within(image.size, most)
    return image if size == image.size else image.resize(size, filter_)


def _within(size: tuple[int, int], most: int) -> tuple[int, int]:
    """`size`, of at most `most` pixels, as FLUX.2's pipelines would have it."""
    scale = math.sqrt(most / math.prod(size))
    return size if scale >= 1 else (int(size[0] * scale), int(size[1] * scale))


def _too_large(name: str, most: int) -> OutOfRange:
    return OutOfRange(f"{name} is too large; send at most {most // 10**6} million pixels.", _param(name))
