"""Files that are images in name: turned by their tag, transparent as they say, refused whatever is wrong with them."""

import contextlib
import hashlib
import io
import logging
import random
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms, PngImagePlugin
from test_codec import chunk

from handler.api import photos
from handler.api.codec import PNG_SIGNATURE
from handler.api.references import _check, kept, references
from handler.core.errors import InvalidValue, KindlingError, OutOfRange
from image_bombs import HEIC

SIDE = 64
X_RESOLUTION, GPS, ORIENTATION = 282, 0x8825, 274
TURNED = {  # what is at the top left of the stored picture, which is red there alone, is where upright
    1: (0, 0), 2: (0, -1), 3: (-1, -1), 4: (-1, 0), 5: (0, 0), 6: (0, -1), 7: (-1, -1), 8: (-1, 0),
}  # fmt: skip


def exif(orientation: object, *others: tuple[int, int, int, bytes]) -> bytes:
    """A TIFF header with entries (tag, type, count, four bytes); the orientation is a SHORT unless it is bytes."""
    given = orientation if isinstance(orientation, bytes) else struct.pack("<HHIHH", ORIENTATION, 3, 1, orientation, 0)
    entries = [given, *(struct.pack("<HHI", *entry[:3]) + entry[3] for entry in others)]
    return b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + b"".join(entries) + b"\0\0\0\0"


def photo(tags: bytes, kind: str = "JPEG") -> bytes:
    pixels = np.zeros((SIDE, 2 * SIDE, 3), np.uint8)
    pixels[:24, :24] = (255, 0, 0)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, exif=tags, quality=95, lossless=True)
    return file.getvalue()


def corner(rgb: np.ndarray) -> tuple[int, int]:
    """Which corner is red."""
    [found] = [(y, x) for y in (0, -1) for x in (0, -1) if rgb[y, x, 0] > 200]
    return found


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", TURNED)
def test_a_photo_is_turned_by_its_tag(kind: str, orientation: int) -> None:
    [found] = references([photo(exif(orientation), kind)])
    assert found.rgb.shape[:2] == ((2 * SIDE, SIDE) if orientation > 4 else (SIDE, 2 * SIDE))
    assert corner(found.rgb) == TURNED[orientation]


OTHER_TAGS = {  # that Pillow reads, and cannot write again
    "XResolution as ASCII": (X_RESOLUTION, 2, 3, b"72\0\0"),
    "XResolution over nothing": (X_RESOLUTION, 5, 1, struct.pack("<I", 8)),
    "GPS that leads nowhere": (GPS, 4, 1, struct.pack("<I", 1 << 30)),
    "of an unknown type": (0x9C9B, 99, 1, b"abcd"),
    "longer than the file": (X_RESOLUTION, 5, 1 << 28, struct.pack("<I", 8)),
}


@pytest.mark.parametrize("entry", OTHER_TAGS.values(), ids=OTHER_TAGS)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_what_else_a_camera_wrote_is_nobodys_business(kind: str, entry: tuple[int, int, int, bytes]) -> None:
    [found] = references([photo(exif(6, entry), kind)])
    assert corner(found.rgb) == TURNED[6]


@pytest.mark.parametrize(
    "value",
    [
        exif(0),
        exif(9),
        exif(struct.pack("<HHI", ORIENTATION, 2, 2) + b"6\0\0\0"),
        b"Exif\0\0II*\0",
        b"Exif\0\0rubbish",
        b"",
    ],
)
def test_an_orientation_that_makes_no_sense_is_none(value: bytes) -> None:
    [found] = references([photo(value)])
    assert found.rgb.shape[:2] == (SIDE, 2 * SIDE)


def png(depth: int, colours: int, values: np.ndarray, clear: int | None = None, more: bytes = b"") -> bytes:
    """A PNG of samples in `depth` bits, (height, width, `colours`); `clear` is transparent in each of its colours.

    `more` is written behind that.
    """
    height, width, _ = values.shape
    rows = ["".join(f"{value:0{depth}b}" for value in row.ravel()) for row in values]
    data = b"".join(b"\0" + int(row, 2).to_bytes(len(row) // 8, "big") for row in rows)
    head = struct.pack(">IIBBBBB", width, height, depth, 0 if colours == 1 else 2, 0, 0, 0)
    key = chunk(b"tRNS", struct.pack(">H", clear) * colours + more) if clear is not None else b""
    return PNG_SIGNATURE + chunk(b"IHDR", head) + key + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


KEYED = [(1, 1, 1), (2, 1, 3), (4, 1, 15), (8, 1, 255), (16, 1, 300), (8, 3, 255), (16, 3, 300), (16, 3, 65535)]


@pytest.mark.parametrize(("depth", "colours", "clear"), KEYED)
def test_a_transparent_colour_is_compared_in_all_its_bits(depth: int, colours: int, clear: int) -> None:
    """The colour beside it differs in the last bit alone."""
    values = np.full((SIDE, SIDE, colours), clear - 1)
    values[:, : SIDE // 2] = clear
    data = png(depth, colours, values, clear)
    mask = kept(data, data).kept
    assert (mask[:, : SIDE // 2] == 0).all()
    assert (mask[:, SIDE // 2 :] == 255).all()
    [image] = references([data])
    assert (image.rgb[:, : SIDE // 2] == 255).all()  # laid on white
    assert (
        image.rgb[:, SIDE // 2 :] == ((clear - 1) >> 8 if depth == 16 else 255 * (clear - 1) // ((1 << depth) - 1))
    ).all()


@pytest.mark.parametrize(("depth", "colours"), [(1, 1), (2, 1), (4, 1), (8, 1), (8, 3)])
@pytest.mark.parametrize("clear", [0, 1])
def test_of_a_transparent_colour_only_the_bits_that_samples_have_count(depth: int, colours: int, clear: int) -> None:
    """PNG specification, 11.3.2.1: the least significant are used, whatever the others are."""
    values = np.full((SIDE, SIDE, colours), 1 - clear)
    values[:, : SIDE // 2] = clear
    data = png(depth, colours, values, 0xFFFF << depth & 0xFFFF | clear)
    mask = kept(data, data).kept
    assert (mask[:, : SIDE // 2] == 0).all()
    assert (mask[:, SIDE // 2 :] == 255).all()


@pytest.mark.parametrize(("depth", "colours"), [(1, 1), (2, 1), (16, 1), (16, 3)])
def test_what_is_written_behind_a_transparent_colour_is_none(depth: int, colours: int) -> None:
    values = np.zeros((SIDE, SIDE, colours), int)
    values[:, : SIDE // 2] = 1
    mask = kept(data := png(depth, colours, values, 1, more=b"\0\0"), data).kept
    assert (mask[:, : SIDE // 2] == 0).all()
    assert (mask[:, SIDE // 2 :] == 255).all()


@pytest.mark.parametrize(("depth", "colours", "clear"), KEYED)
def test_without_one_nothing_is_transparent(depth: int, colours: int, clear: int) -> None:
    data = png(depth, colours, np.full((SIDE, SIDE, colours), clear))
    with pytest.raises(InvalidValue, match="make it transparent"):
        kept(data, data, form="alpha")


def whole(kind: str) -> bytes:
    noise = np.random.default_rng(0).integers(0, 255, (SIDE, SIDE, 4), np.uint8)
    file = io.BytesIO()
    picture = Image.fromarray(noise if kind != "JPEG" else noise[..., :3].copy())
    picture.save(file, kind, exif=exif(6, OTHER_TAGS["XResolution as ASCII"]))
    return file.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_an_image_cut_short_is_refused(kind: str) -> None:
    data = whole(kind)
    for length in range(0, len(data) * 9 // 10, len(data) // 40):
        with pytest.raises(KindlingError) as caught:
            references([data[:length]])
        assert caught.value.status in (400, 422)
        with pytest.raises(KindlingError):
            kept(data[:length], data)


DAMAGE = {  # of a PNG's data: what comes of it
    "none": lambda data: zlib.compress(data),
    "junk": lambda data: b"junk" * 10,
    "a bit": lambda data: (whole := zlib.compress(data, 0))[:1000] + bytes([whole[1000] ^ 1]) + whole[1001:],
    "the checksum": lambda data: zlib.compress(data)[:-1] + b"\0",
    "no such filter": lambda data: zlib.compress(b"\x09" + data[1:]),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_pixels_that_cannot_be_decoded_are_told_though_tags_are_read_first(name: str) -> None:
    head = struct.pack(">IIBBBBB", SIDE, SIDE, 8, 6, 0, 0, 0)
    data = DAMAGE[name](bytes((1 + 4 * SIDE) * SIDE))
    image = PNG_SIGNATURE + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    with contextlib.nullcontext() if name == "none" else pytest.raises(InvalidValue, match="image 1 is not a whole"):
        references([image])
    with contextlib.nullcontext() if name == "none" else pytest.raises(InvalidValue, match="mask: the file is not"):
        kept(image, image if name == "none" else whole("PNG"))
    with contextlib.nullcontext() if name == "none" else pytest.raises(InvalidValue, match="image 1 is not a whole"):
        kept(image if name == "none" else whole("PNG"), image)  # the mask is not to blame


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_no_damage_is_more_than_a_refusal(kind: str) -> None:
    """Bytes set at random, most of them in the headers: drawn from, or refused, but never a crash."""
    data, chance = whole(kind), random.Random(1)
    for _ in range(150):
        spoilt = bytearray(data)
        for _ in range(chance.randint(1, 4)):
            spoilt[chance.randrange(min(len(data), chance.choice((64, 256, len(data)))))] = chance.randrange(256)
        assert refusal(bytes(spoilt), data) in (None, 400, 422)


def refusal(spoilt: bytes, image: bytes) -> int | None:
    """The status of the refusal of `spoilt`, as an image or as a mask, if it is refused."""
    try:
        references([spoilt])
        kept(spoilt, image)
    except KindlingError as error:
        return error.status
    return None


def bomb(width: int, height: int, *chunks: bytes) -> bytes:
    head = struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 0)
    return PNG_SIGNATURE + chunk(b"IHDR", head) + b"".join(chunks) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def test_bombs_are_refused_unpacked() -> None:
    for size in ((20_000, 20_000), (10_000, 10_000), (1 << 31, 1), (4097, 4097)):
        with pytest.raises(KindlingError) as caught:
            references([bomb(*size)])
        assert caught.value.status in (400, 422)
    with pytest.raises(OutOfRange, match="too large"):
        references([bomb(20_000, 20_000)])
    packed = zlib.compress(bytes(2 * PngImagePlugin.MAX_TEXT_CHUNK))
    for part in (b"zTXt", b"iCCP"):
        with pytest.raises(InvalidValue):
            references([bomb(SIDE, SIDE, chunk(part, b"a\0\0" + packed))])


def test_nothing_is_said_of_what_is_wrong_with_a_file() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        references([photo(exif(6, OTHER_TAGS["longer than the file"]))])


def plain(width: int, height: int, mode: str = "RGB") -> bytes:
    file = io.BytesIO()
    Image.new(mode, (width, height)).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize(
    ("size", "fits"),
    [
        ((64, 64), True), ((63, 64), False), ((64, 63), False), ((64, 512), True), ((512, 64), True),
        ((64, 513), False), ((513, 64), False), ((4096, 4096), True), ((4097, 4096), False), ((4096, 4097), False),
        ((8192, 2048), True), ((8193, 2048), False),
    ],
)  # fmt: skip
def test_how_large_and_how_long_an_image_may_be(size: tuple[int, int], fits: bool) -> None:
    with pytest.raises(OutOfRange) if not fits else contextlib.nullcontext() as caught:
        _check(Image.new("1", size), "mask: the file")
    assert fits or (caught and caught.value.param) == "mask"


def test_the_first_image_comes_as_small_as_it_is_looked_at() -> None:
    found = references([plain(128, 128), plain(128, 128)], most=64 * 64)
    assert [each.rgb.shape for each in found] == [(64, 64, 3), (128, 128, 3)]
    assert [each.sha256 for each in found] == [hashlib.sha256(plain(128, 128)).hexdigest()] * 2
    [exactly], [one_more] = references([plain(128, 64)], most=128 * 64), references([plain(128, 64)], most=128 * 64 - 1)
    assert (exactly.rgb.shape, one_more.rgb.shape) == ((64, 128, 3), (63, 127, 3))


def test_a_mask_comes_to_its_images_size_and_is_somewhere_transparent() -> None:
    found = kept(plain(128, 64, "RGBA"), plain(128, 64), most=64 * 32)
    assert (found.kept.shape, found.kept.max()) == ((32, 64), 0)
    assert found.sha256 == hashlib.sha256(plain(128, 64, "RGBA")).hexdigest()
    assert kept(plain(64, 128, "RGBA"), plain(128, 64)).kept.shape == (64, 128)
    with pytest.raises(InvalidValue, match="make it transparent, or white on black") as caught:
        kept(plain(128, 64), plain(128, 64))
    assert caught.value.param == "mask"


def test_an_edge_of_a_mask_never_overshoots() -> None:
    half = Image.new("RGBA", (256, 256), (0, 0, 0, 255))
    half.paste((0, 0, 0, 0), (0, 0, 100, 256))
    file = io.BytesIO()
    half.save(file, "PNG")
    row = kept(file.getvalue(), plain(256, 256), most=64 * 64).kept[0].astype(int)
    assert (np.diff(row) >= 0).all()
    assert (row[0], row[-1]) == (0, 255)


def test_pillow_says_nothing_of_what_is_in_a_photo() -> None:
    logging.getLogger("PIL").setLevel(logging.DEBUG)
    references([plain(64, 64)])
    assert logging.getLogger("PIL").level == logging.INFO


def file_of(image: Image.Image, kind: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def display_p3() -> bytes:
    """A profile with Display P3's primaries, made of LittleCMS' sRGB: matrix profiles differ in three tags alone.

    The primaries, adapted to D50, are those of Apple's profile (ICC.1:2022, 9.2.46; s15Fixed16).
    """
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    columns = {
        b"rXYZ": (0.51512, 0.2412, -0.00105),
        b"gXYZ": (0.29198, 0.69225, 0.04189),
        b"bXYZ": (0.1571, 0.06657, 0.78407),
    }
    for tag, values in columns.items():
        entry = profile.index(tag, 128)
        at = int.from_bytes(profile[entry + 4 : entry + 8]) + 8
        profile = profile[:at] + struct.pack(">3i", *(round(value * 65536) for value in values)) + profile[at + 12 :]
    return profile.replace("sRGB".encode("utf-16-be"), "Wide".encode("utf-16-be"))


RED_IN_P3 = (234, 51, 35)  # what sRGB's pure red is in Display P3


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "AVIF"])
@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_colours_come_as_srgb_whatever_profile_they_have(kind: str, mode: str) -> None:
    if (kind, mode) == ("JPEG", "RGBA"):
        return
    image = Image.new(mode, (SIDE, SIDE), RED_IN_P3)
    options = {"quality": 100} | ({"lossless": True} if kind == "WEBP" else {})
    found = references([file_of(image, kind, icc_profile=display_p3(), **options)])[0].rgb.astype(int)
    assert abs(found - (255, 0, 0)).max() <= 4
    plainly = references([file_of(image, kind, **options)])[0].rgb.astype(int)
    assert abs(plainly - RED_IN_P3).max() <= 4


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_a_profile_may_be_as_large_as_a_printers(kind: str) -> None:
    profile = display_p3() + bytes(3 << 20)
    image = Image.new("RGB", (SIDE, SIDE), RED_IN_P3)
    assert references([file_of(image, kind, icc_profile=profile)])[0].rgb.shape == (SIDE, SIDE, 3)


def test_a_profile_that_is_srgbs_or_none_changes_nothing() -> None:
    image = Image.new("RGB", (SIDE, SIDE), RED_IN_P3)
    own = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for profile in (own, b"no profile", own[:200], ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()):
        assert (references([file_of(image, "PNG", icc_profile=profile)])[0].rgb == RED_IN_P3).all()


def test_grey_of_16_bits_with_a_transparent_value_is_grey_on_white() -> None:
    grey = np.full((SIDE, SIDE), 40_000, np.uint16)
    grey[:8] = 0
    found = references([file_of(Image.fromarray(grey), "PNG", transparency=0)])[0].rgb
    assert (found[:8] == 255).all()
    assert (found[8:] == 40_000 >> 8).all()


def large(width: int, height: int, **options: object) -> bytes:
    """A JPEG that is red, and blue below and to the right of its middle."""
    image = Image.new("RGB", (width, height), "red")
    image.paste((0, 0, 255), (width // 2, height // 2, width, height))
    return file_of(image, "JPEG", quality=50, **options)


@pytest.mark.parametrize("options", [{}, {"progressive": True}])
def test_a_photo_of_24_million_pixels_is_shrunk_while_it_is_decoded(options: dict[str, object]) -> None:
    data = large(5712, 4284, exif=exif(6), **options)
    [found] = references([data])
    assert found.sha256 == hashlib.sha256(data).hexdigest()
    height, width, _ = found.rgb.shape
    assert (width < height, height * width <= 1024 * 1024) == (True, True)
    assert abs(width * 5712 - height * 4284) < 5712
    corners = found.rgb[[2, 2, -3, -3], [2, -3, 2, -3]].astype(int)
    assert abs(corners - np.array([(255, 0, 0), (255, 0, 0), (0, 0, 255), (255, 0, 0)])).max() <= 8


def claims(size: tuple[int, int], data: bytes) -> bytes:
    """A JPEG whose header says another size."""
    at = next(i for i in range(len(data)) if data[i : i + 2] in (b"\xff\xc0", b"\xff\xc2")) + 5
    return data[:at] + struct.pack(">HH", size[1], size[0]) + data[at + 4 :]


@pytest.mark.parametrize(
    ("size", "options", "most"),
    [((15_000, 14_001), {}, 210), ((8000, 8001), {"progressive": True}, 64), ((65_000, 65_000), {}, 210)],
)
def test_how_large_a_jpeg_may_be(size: tuple[int, int], options: dict[str, object], most: int) -> None:
    with pytest.raises(OutOfRange, match=f"at most {most} million"):
        references([claims(size, large(64, 64, **options))])


def test_which_jpegs_are_kept_whole_while_they_are_decoded() -> None:
    line, whole = large(64, 64), large(64, 64, progressive=True)
    assert [photos.buffered(data) for data in (line, whole, line[:2], b"", b"\xff\xd8\xff\xff" + line[3:])] == [
        False, True, True, True, False
    ]  # fmt: skip
    scan = line.index(b"\xff\xda")
    assert photos.buffered(line[: scan + 4] + b"\x01" + line[scan + 5 :])  # the first of three


def test_a_heic_as_telephones_take_it_is_read() -> None:
    found = references([HEIC])[0].rgb.astype(int)
    assert found.shape == (64, 128, 3)
    assert abs(found[:, :56] - (200, 30, 30)).max() <= 8
    assert abs(found[:, 72:] - (20, 20, 220)).max() <= 8


@pytest.mark.parametrize("length", [12, 40, 200, len(HEIC) // 2])
def test_a_part_of_a_heic_is_none(length: int) -> None:
    with pytest.raises(InvalidValue, match="is not a whole PNG, JPEG, WebP, AVIF or HEIC file"):
        references([HEIC[:length]])


def test_a_heic_that_says_it_is_huge_is_not_decoded() -> None:
    size = struct.pack(">II", 128, 64)
    assert size in HEIC
    with pytest.raises(KindlingError, match="is too large; send at most 16 million pixels"):
        references([HEIC.replace(size, struct.pack(">II", 60_000, 60_000))])
