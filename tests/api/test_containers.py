"""Files whose parts would keep a decoder busy: refused before it begins, or decoded without those parts."""

import base64
import io
import itertools
import os
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image

import image_bombs as bombs
from handler.api import isolated
from handler.api.containers import MOST, needed
from handler.api.isolated import Exhausted
from handler.api.references import references
from handler.core.errors import InvalidValue, NotReady, OutOfRange
from serving import ROOT

EXIF = b"Exif\0\0II*\0\x08\0\0\0\0\0"
EXTENDED = b"http://ns.adobe.com/xmp/extension/\0"
PARTS = MOST["parts"]
MEBIBYTE = b"\xff\xe2" + (65535).to_bytes(2) + b"ICC_PROFILE\0" + bytes(65521)  # a sixteenth of it
TOO_MUCH: dict[str, tuple[Callable[[], bytes], str]] = {
    "scans of a JPEG": (lambda: bombs.jpeg_of_scans(8000), "64 scans"),
    "scans, one too many": (lambda: bombs.jpeg_of_scans(65), "64 scans"),
    "comments of a JPEG": (lambda: bombs.jpeg_with(bombs.segment(0xFE, b"") * PARTS), "100,000 parts"),
    "tables of a JPEG": (lambda: bombs.jpeg_with(b"\xff\xdb\0\x02" * PARTS), "100,000 parts"),
    "Exif of a JPEG": (lambda: bombs.jpeg_with(bombs.segment(0xE1, EXIF + bytes(65000)) * 17), "bytes of metadata"),
    "profile of a JPEG": (lambda: bombs.jpeg_with(MEBIBYTE * 129), "bytes of colour profile"),
    "profile of a WebP": (
        lambda: bombs.saved(bombs.red(64), "WEBP", icc_profile=bombs.profile(0) + bytes(8 << 20)),
        "bytes of colour profile",
    ),
    "profile of an AVIF": (
        lambda: bombs.saved(bombs.red(64), "AVIF", icc_profile=bombs.profile(0) + bytes(8 << 20)),
        "bytes of colour profile",
    ),
    "pixels of a PNG": (lambda: bombs.png_with(bombs.png_chunk(b"IDAT", b"") * PARTS), "100,000 parts"),
    "texts of a PNG": (lambda: bombs.png_with(bombs.png_chunk(b"tEXt", b"a\0b") * PARTS), "100,000 parts"),
    "what follows in a PNG": (lambda: bombs.png_with(after=bombs.png_chunk(b"prVt", b"") * PARTS), "100,000 parts"),
    "chunks of a WebP": (lambda: bombs.webp_with(b"JUNK\0\0\0\0" * PARTS), "100,000 parts"),
    "items of an AVIF": (lambda: bombs.avif_of_items(65_000), "65,536 bytes of index"),
    "boxes of an AVIF": (lambda: bombs.avif_of_items(1) + bombs.box(b"free") * PARTS, "100,000 parts"),
    "frames of an AVIF": (lambda: bombs.avif_of_items(1) + bombs.box(b"moov", bytes(65536)), "65,536 bytes of index"),
}


@pytest.mark.parametrize(("make", "told"), TOO_MUCH.values(), ids=TOO_MUCH)
def test_what_has_too_much_is_refused_by_what_it_is(make: Callable[[], bytes], told: str) -> None:
    with pytest.raises(OutOfRange, match=f"^images: image 1 has more than .*{told}; save it anew") as caught:
        references([make()])
    assert (caught.value.param, len(caught.value.message) < 150) == ("images", True)


UNREAD: dict[str, Callable[[], bytes]] = {  # what editors and cameras leave, and what only looks like it
    "Photoshop's": lambda: bombs.jpeg_with(bombs.segment(0xED, b"Photoshop 3.0\0" + bytes(65000)) * 300),
    "XMP in many parts": lambda: bombs.jpeg_with(bombs.segment(0xE1, EXTENDED + bytes(65000)) * 300),
    "fill": lambda: bombs.jpeg_with(b"\xff" * 20_000_000),
    "a film behind a JPEG": lambda: bombs.jpeg_with(b"") + b"\xff\xda\0\x08" * 99_999,
    "compressed texts": lambda: bombs.png_with(
        b"".join(bombs.png_chunk(b"zTXt", b"%d\0\0" % i + bombs.deflated(1 << 20)) for i in range(64))
    ),
    "a text that is huge": lambda: bombs.png_with(bombs.png_chunk(b"zTXt", b"a\0\0" + bombs.deflated(1 << 28))),
    "many a profile of a PNG": lambda: bombs.png_with(
        bombs.png_chunk(b"iCCP", b"a\0\0" + bombs.deflated(1 << 20)) * 1000
    ),
    "empty pixels": lambda: bombs.png_with(bombs.png_chunk(b"IDAT", b"") * 10_000),
    "unknown chunks": lambda: bombs.webp_with(b"JUNK\0\0\0\0" * 10_000),
    "unknown boxes": lambda: bombs.avif_of_items(1) + bombs.box(b"free") * 10_000,
}


@pytest.mark.parametrize("make", UNREAD.values(), ids=UNREAD)
def test_what_no_pixel_needs_reaches_no_decoder(make: Callable[[], bytes]) -> None:
    data = make()
    assert abs(references([data])[0].rgb.astype(int) - (255, 0, 0)).max() <= 8
    assert len(needed(data)) < 130_000 or b"ftyp" in data[:8]


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
def test_of_what_is_as_it_should_be_nothing_is_lost(form: str) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (96, 80, 3), np.uint8))
    options = {"progressive": True, "restart_marker_blocks": 3} if form == "JPEG" else {"lossless": True}
    data = bombs.saved(noise, form, exif=EXIF, icc_profile=bombs.profile(0), **options)
    assert needed(data) == data


def test_colours_are_as_adobes_segment_says_whatever_comes_before_it() -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    data = bombs.saved(image, "JPEG")
    tables = data[data.index(b"\xff\xdb") :]  # without JFIF's, which would say that they are YCbCr
    data = data[:2] + bombs.segment(0xEE, b"Another's") + bombs.segment(0xEE, b"Adobe\0d\0\0\0\0\0") + tables
    with Image.open(io.BytesIO(data)) as whole:
        assert (references([data])[0].rgb == np.asarray(whole)).all()


def test_as_many_scans_as_any_encoder_makes_are_read() -> None:
    assert references([bombs.jpeg_of_scans(64, side=64)])[0].rgb.shape == (64, 64, 3)


def test_a_profile_is_read_by_its_tables_and_no_program_of_it_runs() -> None:
    """Of 100,000 steps for each of 36,000 colours."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    plain, bomb = (bombs.saved(image, "WEBP", lossless=True, icc_profile=bombs.profile(n)) for n in (0, 100_000))
    assert (references([bomb])[0].rgb == references([plain])[0].rgb).all()


def test_what_never_ends_is_ended_by_the_seconds_that_it_may_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isolated, "CPU_S", 1)
    with pytest.raises(OutOfRange, match="image 1 has more than 10 seconds of work for a decoder; save it anew"):
        references([bombs.ENDLESS()])


def test_what_nobody_waits_for_is_ended() -> None:
    looks = itertools.chain([9.0, 9.0, 9.0], itertools.repeat(0.0))
    with pytest.raises(Exhausted):
        isolated.decoded(bombs.ENDLESS(), True, 1 << 24, lambda: next(looks))


def test_a_file_that_fills_a_pipe_and_takes_a_while_is_read() -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (2048, 2048, 4), np.uint8))
    data = bombs.saved(noise, "AVIF", speed=10, quality=90, subsampling="4:4:4")
    assert len(data) > 8_000_000
    assert references([data])[0].rgb.shape == (1024, 1024, 3)


def test_what_takes_too_much_memory_ends_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    data = bombs.saved(bombs.red(4096), "AVIF", speed=10)
    assert isolated.decoded(data, False, 1 << 24, lambda: 60.0).size == (4096, 4096)
    monkeypatch.setattr(isolated, "BYTES", 160 << 20)
    with pytest.raises((Exhausted, ValueError)):
        isolated.decoded(data, False, 1 << 24, lambda: 60.0)


def test_the_process_that_decodes_has_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    """It begins with this environment alone, by which it finds what this process imports."""
    monkeypatch.setenv("KINDLING_API_KEYS", "a-secret")
    begun = threading.Event()

    class Begun(subprocess.Popen[bytes]):
        def __init__(self, command: list[str], env: dict[str, str], **options: object) -> None:
            assert env.keys() <= {*isolated.KEPT, "PYTHONPATH", "MALLOC_ARENA_MAX"}
            begun.set()
            super().__init__(command, env=env, **options)  # type: ignore[call-overload]

    monkeypatch.setattr(subprocess, "Popen", Begun)
    assert references([bombs.HEIC])[0].rgb.shape == (64, 128, 3)
    assert begun.is_set()


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_what_is_stopped_with_the_service_is_no_fault_of_the_image(monkeypatch: pytest.MonkeyPatch, how: int) -> None:
    class Stopped(subprocess.Popen[bytes]):
        def communicate(self, *args: Any, **options: Any) -> tuple[bytes, bytes]:
            self.send_signal(how)
            return super().communicate(*args, **options)

    monkeypatch.setattr(subprocess, "Popen", Stopped)
    with pytest.raises(NotReady, match="no process now to decode HEIC and AVIF; try again, or send a PNG"):
        references([bombs.HEIC])


def test_what_a_terminal_tells_a_server_reaches_no_process_of_its(monkeypatch: pytest.MonkeyPatch) -> None:
    groups = []

    class Begun(subprocess.Popen[bytes]):
        def communicate(self, *args: Any, **options: Any) -> tuple[bytes, bytes]:
            groups.append(os.getpgid(self.pid))
            return super().communicate(*args, **options)

    monkeypatch.setattr(subprocess, "Popen", Begun)
    assert references([bombs.HEIC])[0].rgb.shape == (64, 128, 3)
    assert groups
    assert os.getpgrp() not in groups


def test_where_no_process_can_be_started_the_image_has_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/no/python")
    with pytest.raises(NotReady, match="try again, or send a PNG"):
        references([bombs.HEIC])


@pytest.mark.parametrize("size", [(5000, 4000), (16_320, 12_240)])  # the latter is a telephone's 200 megapixels
def test_what_has_too_many_pixels_is_told_so_however_many(size: tuple[int, int]) -> None:
    avif = bombs.saved(Image.new("RGB", bombs.SIZE), "AVIF")
    for data in (bombs.HEIC, avif):
        grown = data.replace(struct.pack(">II", *bombs.SIZE), struct.pack(">II", *size))
        with pytest.raises(OutOfRange, match="image 1 is too large; send at most 16 million pixels"):
            references([grown])


def test_it_is_found_from_anywhere(tmp_path: object) -> None:
    """Without the folder of the sources as the current one, in an interpreter that has it in its path alone."""
    code = "import sys,base64; sys.path.insert(0, sys.argv[1]); from handler.api.references import references"
    code += "; print(references([base64.b64decode(sys.argv[2])])[0].rgb.shape)"
    command = [sys.executable, "-c", code, str(ROOT), base64.b64encode(bombs.HEIC).decode()]
    out = subprocess.run(command, cwd=str(tmp_path), capture_output=True, text=True, check=True)
    assert out.stdout == "(64, 128, 3)\n"


def test_half_a_container_is_no_image() -> None:
    for whole in (bombs.png_with(), bombs.jpeg_with(b""), bombs.webp_with(b""), bombs.avif_of_items(1), bombs.HEIC):
        for length in range(len(whole) // 2):
            needed(whole[:length])
        with pytest.raises(InvalidValue, match="is not a whole PNG"):
            references([whole[: len(whole) // 2]])
