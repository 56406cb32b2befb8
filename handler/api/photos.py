"""What an image file is, not decoded yet: large JPEGs at a reduced scale, colours as sRGB, others by their names."""

import io
from typing import Any

from handler.api.containers import FRAMES, JPEG, SCAN, TooMuch, require, segments
from handler.api.decoding import ISOLATED, begin
from handler.api.isolated import ORIENTATION, Exhausted, decoded
from handler.core.errors import NotReady

MAX_PIXELS = 4096 * 4096  # that are ever decoded of one image
MAX_JPEG = 210 * 10**6  # pixels of a JPEG that is read line by line, as the largest sensors' are
MAX_BUFFERED = 64 * 10**6  # of one whose coefficients are all kept meanwhile, up to 6 bytes a pixel
SCALES = (1, 2, 4, 8)  # at which libjpeg decodes
TAKEN = "PNG, JPEG, WebP, AVIF or HEIC"
UNSTARTED = "This worker has no process now to decode HEIC and AVIF; try again, or send a PNG, JPEG or WebP file."
HEIC = (b"ftypheic", b"ftypheix", b"ftyphevc", b"ftypheim", b"ftypmif1", b"ftypmsf1")
KINDS = (  # what is not taken: where its first bytes are, which, and its name
    (0, (b"GIF8",), "a GIF"),
    (0, (b"BM",), "a BMP"),
    (0, (b"II*\0", b"MM\0*"), "a TIFF"),
    (0, (b"8BPS",), "a Photoshop file"),
    (0, (b"%PDF",), "a PDF"),
    (0, (b"<svg", b"<?xml"), "an SVG"),
    (0, (b"\xff\x0a", b"\0\0\0\x0cJXL "), "a JPEG XL"),
)


def opened(data: bytes) -> Any:
    """Pillow's image of a file; TooMuch, or whatever Pillow raises if it is none. Pixels are no matter of this.

    HEIC and AVIF are decoded there and then.
    """
    image = _opened(data)
    require("bytes of colour profile", len(image.info.get("icc_profile") or b""))
    return image


def _opened(data: bytes) -> Any:
    from PIL import Image
    from PIL.JpegImagePlugin import JpegImageFile

    if data.startswith(JPEG):  # past Image.open, which knows of no reduced scale, and warns of what is large
        return JpegImageFile(io.BytesIO(data))
    if data.startswith(b"ftyp", 4):
        return _isolated(data)
    return Image.open(io.BytesIO(data), formats=("PNG", "WEBP"))


def _isolated(data: bytes) -> Any:
    """Of HEIC or AVIF; without its pixels where it has several frames."""
    from PIL import Image

    until, is_heic = begin(ISOLATED), data.startswith(HEIC, 4) and b"avif" not in data[8:64]
    try:
        found = decoded(data, is_heic, MAX_PIXELS, lambda: until.left_s)
    except Exhausted:
        raise TooMuch("seconds of work for a decoder") from None
    except (OSError, RuntimeError):  # the latter where there is no thread to watch it
        raise NotReady(UNSTARTED) from None
    if found.size[0] * found.size[1] > MAX_PIXELS:
        raise Image.DecompressionBombError
    whole = found.frames == 1
    image: Any = Image.frombytes(found.mode, found.size, found.pixels) if whole else Image.new("1", found.size)
    image.n_frames, image.info["icc_profile"] = found.frames, found.icc
    image.getexif()[ORIENTATION] = found.orientation
    return image


def most_pixels(image: Any, data: bytes) -> int:
    """How many pixels an image may say it has."""
    if image.format != "JPEG":
        return MAX_PIXELS
    return MAX_BUFFERED if buffered(data) else MAX_JPEG


def reduce(image: Any) -> None:
    """Let a JPEG of more than `MAX_PIXELS` be decoded at the largest scale that has no more."""
    width, height = image.size
    scale = next((each for each in SCALES if -(-width // each) * -(-height // each) <= MAX_PIXELS), SCALES[-1])
    if scale > 1 and image.format == "JPEG":
        image.draft(None, (width // scale, height // scale))


def buffered(data: bytes) -> bool:
    """Whether a JPEG has several scans, as progressive ones do, so that nothing is decoded before all was read."""
    components = b""
    for marker, segment in segments(data):
        if marker == SCAN:
            return segment[4:5] != components
        if marker in FRAMES:
            components = segment[9:10]
            if marker not in (0xC0, 0xC1):
                return True
    return True


def srgb(image: Any, profile: bytes | None) -> Any:
    """`image` in sRGB, as RGB; as it is where the file has no profile of its colours, or one that does not fit."""
    from PIL import ImageCms

    if not profile:
        return image
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(_tables_alone(profile)))
        if "sRGB" in ImageCms.getProfileDescription(source):
            return image
        return ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ValueError):
        return image


def _tables_alone(profile: bytes) -> bytes:
    """A profile without what it has in D2Bx, which readers may ignore (ICC.1:2022, 8.3 and 9.2.20): a program of any
    length, that LittleCMS would run for each colour."""
    found, count = bytearray(profile), int.from_bytes(profile[128:132])
    for at in range(132, min(132 + 12 * count, len(profile)), 12):
        if found[at : at + 3] == b"D2B":
            found[at] = ord("x")
    return bytes(found)


def kind(data: bytes) -> str:
    """What a file is that is not taken; empty where its first bytes are of no such kind."""
    return next((name for at, starts, name in KINDS if data.startswith(starts, at)), "")
