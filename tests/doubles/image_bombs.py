"""Image files that ask a decoder for much more than they are: of each format, by what it has too much of."""

import base64
import functools
import io
import struct
import zlib
from collections.abc import Sequence

from PIL import Image, ImageCms

HEIC = base64.b64decode(  # red beside blue, 128x64, as libheif's encoder writes it, which is not installed here
    "AAAAHGZ0eXBoZWljAAAAAG1pZjFoZWljbWlhZgAAAVZtZXRhAAAAAAAAACFoZGxyAAAAAAAAAABwaWN0AAAAAAAAAAAAAAAAAAAA"
    "ACJpbG9jAAAAAERAAAEAAQAAAAABegABAAAAAAAAADAAAAAjaWluZgAAAAAAAQAAABVpbmZlAgAAAAABAABodmMxAAAAAA5waXRt"
    "AAAAAAABAAAA1mlwcnAAAAC3aXBjbwAAAHhodmNDAQNwAAAAkAAAAAAAHvAA/P34+AAADwNgAAEAGEABDAH//wNwAAADAJAAAAMA"
    "AAMAHroCQGEAAQArQgEBA3AAAAMAkAAAAwAAAwAeoBAgQWW6kkprm4CGgwIAAAMAMgAAAwACEGIAAQAHRAHBcrAiQAAAABNjb2xy"
    "bmNseAABAA0ABoAAAAAUaXNwZQAAAAAAAACAAAAAQAAAABBwaXhpAAAAAAMICAgAAAAXaXBtYQAAAAAAAAABAAEEgQIDBAAAADht"
    "ZGF0AAAALCgBrxOA5TPAn//wUqP/3Ws8Pwd4rVD0VzB//kH9R/UzS//Gk69s3P/wbqLM"
)
SIZE = (128, 64)  # of that
Item = tuple[int, bytes, bytes]  # number, type, and what is in it: nothing is the picture
Reference = tuple[int, Sequence[int]]  # of an item to others
OVERLAY = struct.pack(">BB4HHH4h", 0, 0, 65535, 0, 0, 65535, *SIZE, 0, 0, 0, 0)  # of two pictures, each at the corner
PNG = b"\x89PNG\r\n\x1a\n"


def told(data: bytes) -> str:
    """What becomes of a request's image: "decoded", or why not."""
    from handler.api.references import references
    from handler.core.errors import RequestError

    try:
        references([data])
    except RequestError as error:
        return error.message
    return "decoded"


def saved(image: Image.Image, form: str, **options: object) -> bytes:
    image.save(file := io.BytesIO(), form, **options)
    return file.getvalue()


def red(side: int) -> Image.Image:
    return Image.new("RGB", (side, side), "red")


def jpeg_of_scans(count: int, side: int = 4096) -> bytes:
    """A progressive JPEG with so many scans, all but the first without any data."""
    data = saved(red(side), "JPEG", progressive=True)
    second = data.index(b"\xff\xda", data.index(b"\xff\xda") + 2)
    head = data[second : second + 2 + int.from_bytes(data[second + 2 : second + 4])]
    return data[:second] + head * (count - 1) + b"\xff\xd9"


def jpeg_with(segments: bytes) -> bytes:
    """A JPEG that begins with these."""
    data = saved(red(64), "JPEG")
    return data[:2] + segments + data[2:]


def segment(marker: int, body: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def deflated(zeros: int) -> bytes:
    return zlib.compress(bytes(zeros), 9)


def png_with(before: bytes = b"", after: bytes = b"") -> bytes:
    """A PNG with these chunks before its pixels, and after them."""
    data = saved(red(64), "PNG")
    return data[:33] + before + data[33:-12] + after + data[-12:]


def webp_with(chunks: bytes) -> bytes:
    data = saved(red(64), "WEBP", lossless=True) + chunks
    return data[:4] + struct.pack("<I", len(data) - 8) + data[8:]


def profile(programs: int) -> bytes:
    """sRGB's by another name, and beside its tables a program of so many steps, all the same one, that do nothing."""
    made = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    made = made.replace("sRGB".encode("utf-16-be"), "Wide".encode("utf-16-be"))
    step = b"matf" + struct.pack(">4xHH12f", 3, 3, *(1, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0))
    program = b"mpet" + struct.pack(">4xHHI", 3, 3, programs)
    program += struct.pack(">II", 16 + 8 * programs, len(step)) * programs + step
    [count] = struct.unpack_from(">I", made, 128)
    tags = [struct.unpack_from(">4sII", made, 132 + 12 * i) for i in range(count)]
    parts = [(tag, made[at : at + size]) for tag, at, size in tags]
    parts += [(b"D2B%d" % i, program) for i in range(2)] if programs else []
    table, body, start = struct.pack(">I", len(parts)), b"", 132 + 12 * len(parts)
    for tag, part in parts:
        table += struct.pack(">4sII", tag, start + len(body), len(part))
        body += part + bytes(-len(part) % 4)
    return struct.pack(">I", start + len(body)) + made[4:128] + table + body


def box(kind: bytes, *parts: bytes) -> bytes:
    return struct.pack(">I4s", 8 + sum(map(len, parts)), kind) + b"".join(parts)


def within(data: bytes, *path: bytes) -> bytes:
    """What is in a box of boxes."""
    for kind in path:
        at = data.index(kind) - 4
        data = data[at + 8 : at + int.from_bytes(data[at : at + 4])]
    return data


def boxed(
    like: bytes, items: Sequence[Item], refers: Sequence[tuple[int, Sequence[int]]] = (), primary: int = 1
) -> bytes:
    """A HEIC or AVIF of such items; `like` is one with a single picture, which any number of items have in common."""
    is_heic = b"hvcC" in like
    coded, config = (b"hvc1", b"hvcC") if is_heic else (b"av01", b"av1C")
    width, height = struct.unpack_from(">II", within(like, b"ispe"), 4)
    data = within(like, b"mdat")
    properties = box(config, within(like, config)), box(b"ispe", struct.pack(">III", 0, width, height))
    properties += (box(b"pixi", b"\0\0\0\0\3\x08\x08\x08"),)
    numbers = [number for number, _, _ in items]
    uses = b"".join(struct.pack(">HB3B", number, 3, 0x81, 2, 3) for number in numbers)
    infe = b"".join(box(b"infe", struct.pack(">IHH4sB", 2 << 24, n, 0, kind or coded, 0)) for n, kind, _ in items)
    dimg = b"".join(box(b"dimg", struct.pack(f">HH{len(to)}H", one, len(to), *to)) for one, to in refers)
    ftyp = box(b"ftyp", *((b"heic" if is_heic else b"avif"), bytes(4), b"mif1", b"heic" if is_heic else b"avif"))

    def meta(start: int) -> bytes:
        places, at = b"", start + len(data)
        for number, _, body in items:
            places += struct.pack(">HHHII", number, 0, 1, *((at, len(body)) if body else (start, len(data))))
            at += len(body)
        return box(
            b"meta",
            bytes(4),
            box(b"hdlr", bytes(8) + b"pict" + bytes(13)),
            box(b"pitm", struct.pack(">IH", 0, primary)),
            box(b"iloc", struct.pack(">IHH", 0, 0x4400, len(items)) + places),
            box(b"iinf", struct.pack(">IH", 0, len(items)) + infe),
            box(b"iprp", box(b"ipco", *properties), box(b"ipma", struct.pack(">II", 0, len(items)) + uses)),
            *([box(b"iref", bytes(4), dimg)] if dimg else []),
        )

    head = ftyp + meta(len(ftyp) + len(meta(0)) + 8)
    return head + box(b"mdat", data, *(body for _, _, body in items))


def avif_of_items(count: int) -> bytes:
    """All the same picture."""
    return boxed(saved(red(64), "AVIF"), [(number, b"", b"") for number in range(1, count + 1)])


def heic_of_overlays(depth: int) -> bytes:
    """Two overlays of two overlays of two, and so on: to be decoded as often as two to the power of `depth`."""
    items = [(1, b"", b""), (2, b"", b"")]
    items += [(number, b"iovl", OVERLAY) for number in range(3, 2 * depth + 4)]
    refers = [(number, ((number - 3) // 2 * 2 + 1, (number - 3) // 2 * 2 + 2)) for number, _, _ in items[2:]]
    return boxed(HEIC, items, refers, primary=items[-1][0])


ENDLESS = functools.partial(heic_of_overlays, 100)
