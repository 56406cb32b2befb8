"""What of an image file its decoder gets: its pixels, colours and orientation, within `MOST`; and none of the rest.

A few bytes can ask a decoder for hours: scans and chunks that bring nothing, profiles that are programs. Such is
counted here, in one pass that decodes nothing. What it cannot follow goes on as it is, for the decoder to refuse.
"""

import re
import struct
from collections.abc import Iterator, Mapping

PNG = b"\x89PNG\r\n\x1a\n"
JPEG = b"\xff\xd8\xff"
MOST: Mapping[str, int] = {
    "scans": 64,  # a progressive JPEG has 10, of CMYK 18 (libjpeg-turbo, jcparam.c); mozjpeg tries 64, and keeps fewer
    "parts": 100_000,  # segments, chunks or boxes; libpng cuts 50 MB of pixels into 6,400 chunks
    "bytes of metadata": 1 << 20,  # of each kind that a JPEG has in several segments: Exif needs 64 KiB
    "bytes of colour profile": 8 << 20,  # a printer's has 0.5 to 3 MB
    "bytes of index": 64 << 10,  # of the items of HEIC and AVIF, 45 each; a telephone's photo has 50 to 300 of them
    "seconds of work for a decoder": 10,  # of HEIC and AVIF, as isolated.py has it
}
WINDOW = 1 << 20  # bytes that are searched without a pause, in which other threads stand still
MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")  # of a JPEG, but fill, data, and restarts, which stand between data
END, SCAN = 0xD9, 0xDA
BARE = (0x01, 0xD8, END)  # markers without a length: TEM, SOI, EOI (T.81, table B.1)
FRAMES = (*range(0xC0, 0xC4), *range(0xC5, 0xC8), *range(0xC9, 0xCC), *range(0xCD, 0xD0))  # SOF0 to SOF15
TABLES = (0xC4, 0xCC, 0xDB, 0xDD)  # DHT, DAC, DQT, DRI
METADATA = {  # of a JPEG: by marker, how it begins; JFIF's and Adobe's say how colours are meant
    0xE0: (b"JFIF\0",),
    0xE1: (b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0"),
    0xE2: (b"ICC_PROFILE\0",),
    0xEE: (b"Adobe",),
}
CHUNKS = (b"IHDR", b"PLTE", b"tRNS", b"iCCP", b"eXIf", b"acTL", b"fcTL", b"IDAT", b"IEND")
TEXTS = (b"XML:com.adobe.xmp\0", b"Raw profile type exif\0")  # in which some programs say how a PNG is turned
WEBP = (b"VP8 ", b"VP8L", b"VP8X", b"ALPH", b"ICCP", b"EXIF", b"XMP ", b"ANIM", b"ANMF")
INDEX = (b"iinf", b"iloc", b"iref", b"ipma", b"moov")
FAMILIES = {b"meta": 4, b"iprp": 0, b"ipco": 0}  # boxes that are looked into, and bytes before their first one


class TooMuch(Exception):
    """What a file has too much of: "more than 64 scans"."""

    def __init__(self, what: str) -> None:
        super().__init__(f"more than {MOST[what]:,} {what}")


def require(what: str, found: int) -> None:
    """Raise TooMuch if that is more than `MOST` says."""
    if found > MOST[what]:
        raise TooMuch(what)


def needed(data: bytes) -> bytes:
    """The same image without the parts that no pixel, colour or orientation needs. Raises TooMuch."""
    if data.startswith(JPEG):
        return b"".join(_jpeg(data))
    if data.startswith(PNG):
        return b"".join(_png(data))
    if data.startswith(b"RIFF") and data.startswith(b"WEBP", 8):
        body = b"".join(_webp(data))
        return b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WEBP" + body
    if data.startswith(b"ftyp", 4):
        _look(data, 0, len(data), _Count())
    return data


class _Count:
    """How much there was of what, so far."""

    def __init__(self) -> None:
        self._found: dict[str, int] = {}

    def add(self, what: str, more: int = 1) -> None:
        self._found[what] = self._found.get(what, 0) + more
        require(what, self._found[what])


def segments(data: bytes) -> Iterator[tuple[int, bytes]]:
    """The markers of a JPEG up to its end, each with all that belongs to it: of a scan, its pixels."""
    count, at = _Count(), 2
    while (at := _marker(data, at)) < len(data):
        count.add("parts")
        marker = data[at + 1]
        end = at + 2
        if marker not in BARE:
            end += max(2, int.from_bytes(data[at + 2 : at + 4]))
        if marker == SCAN:
            count.add("scans")
            end = _marker(data, end)
        yield marker, data[at:end]
        if marker == END:
            return
        at = end


def _marker(data: bytes, at: int) -> int:
    """Where the next marker is, or the end."""
    for start in range(at, len(data), WINDOW):
        if found := MARKER.search(data, start, start + WINDOW + 1):
            return found.start()
    return len(data)


def _jpeg(data: bytes) -> Iterator[bytes]:
    count = _Count()
    yield data[:2]
    for marker, segment in segments(data):
        known = next((name for name in METADATA.get(marker, ()) if segment.startswith(name, 4)), None)
        if known:
            count.add("bytes of colour profile" if marker == 0xE2 else "bytes of metadata", len(segment))
        if known or marker in (*FRAMES, *TABLES, SCAN, END):
            yield segment


def _png(data: bytes) -> Iterator[bytes]:
    """Every chunk that is needed, as it is: damaged ones are the decoder's to refuse."""
    count, at, once = _Count(), len(PNG), set[bytes]()
    yield PNG
    while at < len(data):
        count.add("parts")
        size, kind = int.from_bytes(data[at : at + 4]), data[at + 4 : at + 8]
        name = next((text for text in TEXTS if data.startswith(text, at + 8)), kind)
        if kind == b"IDAT" or (name not in once and (kind in CHUNKS or name in TEXTS)):
            once.add(name)
            yield data[at : at + 12 + size]
        if kind == b"IEND":
            return
        at += 12 + size


def _webp(data: bytes) -> Iterator[bytes]:
    count, at = _Count(), 12
    while at + 8 <= len(data):
        count.add("parts")
        kind, size = struct.unpack_from("<4sI", data, at)
        if kind in WEBP:
            yield data[at : at + 8 + size + size % 2]
        at += 8 + size + size % 2


def _look(data: bytes, at: int, end: int, count: _Count) -> None:
    """Count the boxes between `at` and `end` (ISO/IEC 14496-12, 4.2), and the index in them."""
    while at + 8 <= end:
        count.add("parts")
        size, kind = int.from_bytes(data[at : at + 4]), data[at + 4 : at + 8]
        head = 16 if size == 1 else 8
        size = int.from_bytes(data[at + 8 : at + 16]) if size == 1 else size or end - at
        if kind in INDEX:
            count.add("bytes of index", size)
        if kind in FAMILIES:
            _look(data, at + head + FAMILIES[kind], min(end, at + size), count)
        at += max(size, head)
