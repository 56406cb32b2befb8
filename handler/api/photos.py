"""What an image file is, not decoded yet: large JPEGs at a reduced scale, colours as sRGB, others by their names."""

import io
from typing import Any

MAX_PIXELS = 4096 * 4096  # that are ever decoded of one image
MAX_JPEG = 210 * 10**6  # pixels of a JPEG that is read line by line, as the largest sensors' are
MAX_BUFFERED = 64 * 10**6  # of one whose coefficients are all kept meanwhile, up to 6 bytes a pixel
SCALES = (1, 2, 4, 8)  # at which libjpeg decodes
TAKEN = "PNG, JPEG, WebP, AVIF or HEIC"
JPEG = b"\xff\xd8\xff"
FRAMES = (*range(0xC0, 0xC4), *range(0xC5, 0xC8), *range(0xC9, 0xCC), *range(0xCD, 0xD0))  # SOF0 to SOF15 (T.81, B.1)
SCAN = 0xDA
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
    """Pillow's image of a file; whatever Pillow raises if it is none. Its bounds are no matter of this."""
    from PIL import Image
    from PIL.JpegImagePlugin import JpegImageFile

    if data.startswith(JPEG):  # past Image.open, which knows of no reduced scale, and warns of what is large
        return JpegImageFile(io.BytesIO(data))
    if data.startswith(HEIC, 4) and b"avif" not in data[8:64]:
        import pi_heif  # libheif without its encoders

        pi_heif.register_heif_opener(thumbnails=False)
        return Image.open(io.BytesIO(data), formats=("HEIF",))
    return Image.open(io.BytesIO(data), formats=("PNG", "WEBP", "AVIF"))


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
    at, components = 2, 0
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4])
        if marker == 0xFF:  # a fill byte
            at += 1
            continue
        if marker == SCAN:
            return data[at + 4 : at + 5] != bytes([components])
        if marker in FRAMES:
            components = data[at + 9] if len(data) > at + 9 else 0
            if marker not in (0xC0, 0xC1):
                return True
        at += 2 + length
    return True


def srgb(image: Any, profile: bytes | None) -> Any:
    """`image` in sRGB, as RGB; as it is where the file has no profile of its colours, or one that does not fit."""
    from PIL import ImageCms

    if not profile:
        return image
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "sRGB" in ImageCms.getProfileDescription(source):
            return image
        return ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ValueError):
        return image


def kind(data: bytes) -> str:
    """What a file is that is not taken; empty where its first bytes are of no such kind."""
    return next((name for at, starts, name in KINDS if data.startswith(starts, at)), "")
