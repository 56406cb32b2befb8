import io
import struct
import subprocess
import sys
import threading
import tracemalloc
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT
from isal import isal_zlib
from PIL import Image, JpegImagePlugin

from handler import MODELS, ImageRequest
from handler.api import codec
from handler.api.codec import PNG_SIGNATURE, encode, parameters_of, read_parameters
from handler.core.errors import InvalidValue

RNG = np.random.default_rng(0)
RECIPE = MODELS["spark"].recipe(ImageRequest(prompt='naïve "红" \u0000 circle', seed=3))
PARAMETERS = parameters_of(RECIPE, {"precision": "fp32", "plan": "EAGER", "vae": ""}, "0.1.0")


@pytest.mark.parametrize("shape", [(64, 64), (1, 1), (3, 257), (300, 2), (2048, 65)])
@pytest.mark.parametrize("kind", ["noise", "flat"])
def test_png_is_lossless_for_any_reader(shape: tuple[int, int], kind: str) -> None:
    rgb = RNG.integers(0, 256, (*shape, 3), np.uint8) if kind == "noise" else np.full((*shape, 3), 77, np.uint8)
    image = Image.open(io.BytesIO(encode(rgb, "png", 100, PARAMETERS)))
    image.load()
    assert image.mode == "RGB"
    assert np.array_equal(np.asarray(image), rgb)


def test_flat_pictures_stay_small() -> None:
    assert len(encode(np.zeros((1024, 1024, 3), np.uint8), "png", 100, None)) < 40_000


def drawn(height: int, width: int) -> np.ndarray:
    """Smooth, with grain: about as hard to compress as what a model draws."""
    coarse = Image.fromarray(RNG.integers(0, 256, (height // 32 + 1, width // 32 + 1, 3), np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    return np.clip(smooth + RNG.normal(0, 3, smooth.shape), 0, 255).astype(np.uint8)


LARGE = drawn(1024, 1024)


def stream_of(png: bytes) -> bytes:
    """What its only IDAT chunk holds."""
    at = png.index(b"IDAT")
    (size,) = struct.unpack(">I", png[at - 4 : at])
    assert png[at + 4 + size + 4 + 4 :].startswith(b"IEND")
    return png[at + 4 : at + 4 + size]


@pytest.mark.parametrize("shape", [(1024, 1024), (257, 2047), (100_000, 1), (2, 100_000)])
def test_stripes_are_one_stream_for_any_reader(shape: tuple[int, int]) -> None:
    """Also with rows longer than a stripe, and with a last stripe of one row; zlib compares the checksum of all."""
    rgb = LARGE if shape == (1024, 1024) else RNG.integers(0, 256, (*shape, 3), np.uint8)
    png = encode(rgb, "png", 95, None)
    rows = np.frombuffer(zlib.decompress(stream_of(png)), np.uint8).reshape(shape[0], -1)
    assert (rows[:, 0] == 1).all()
    assert (np.cumsum(rows[:, 1:].reshape(*shape, 3), axis=1, dtype=np.uint8) == rgb).all()
    with Image.open(io.BytesIO(png)) as image:
        assert np.array_equal(np.asarray(image), rgb)


def test_stripes_are_deflated_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both of two wait for each other: one after the other they would break the barrier."""
    both, stripe = threading.Barrier(2, timeout=20), codec._stripe
    monkeypatch.setattr(codec, "_stripe", lambda *given: (both.wait(), stripe(*given))[1])
    rgb = LARGE[: codec.STRIPE // (1 + 3 * 1024) + 1]
    with Image.open(io.BytesIO(encode(rgb, "png", 95, None))) as image:
        assert np.array_equal(np.asarray(image), rgb)


def test_the_bytes_are_the_same_on_every_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    made = set()
    for cores in (1, 2, 5):
        with ThreadPoolExecutor(cores) as pool:
            monkeypatch.setattr(codec, "_pool", lambda pool=pool: pool)
            made.add(encode(LARGE, "png", 95, PARAMETERS))
    assert len(made) == 1


def test_where_stripes_begin_is_part_of_the_format(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the next version makes other bytes of the same picture."""
    sizes, stripe = list[int](), codec._stripe
    monkeypatch.setattr(codec, "_stripe", lambda rows, *end: (sizes.append(len(rows)), stripe(rows, *end))[1])
    encode(LARGE, "png", 95, None)
    assert sorted(sizes) == [1024 - 12 * 85, *[85] * 12]


def test_small_pictures_stay_on_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codec, "_pool", None)
    encode(LARGE[:256, :256], "png", 95, None)


def test_a_forked_process_has_threads_of_its_own() -> None:
    """Those of the one it comes from are not in it."""
    script = """
import os, numpy
from handler.api.codec import encode
rgb = numpy.zeros((1024, 1024, 3), numpy.uint8)
made = encode(rgb, "png", 95, None)
if child := os.fork():
    os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
os._exit(encode(rgb, "png", 95, None) != made)
"""
    command = [sys.executable, "-W", "ignore", "-c", f"import signal; signal.alarm(20)\n{script}"]
    assert subprocess.run(command, cwd=ROOT, check=False).returncode == 0


def test_stripes_cost_no_size_and_few_copies() -> None:
    """Of the picture's bytes, before as after deflate: what it grows to while it is made."""
    once = isal_zlib.compress(codec._filtered(LARGE).data, codec.ISAL_LEVEL)
    encode(LARGE, "png", 95, None)  # imports are no copies
    tracemalloc.start()
    png: Any = encode(LARGE, "png", 95, None)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(png) < 1.01 * len(once)
    assert peak < 4 * len(png)


@pytest.mark.parametrize("form", ["jpeg", "webp"])
def test_lossy_formats_obey_quality(form: str) -> None:
    smooth = np.asarray(Image.fromarray(RNG.integers(0, 256, (8, 8, 3), np.uint8)).resize((128, 128)))
    small, large = (encode(smooth, form, q, None) for q in (10, 95))  # type: ignore[arg-type]
    assert len(small) < len(large)
    image = Image.open(io.BytesIO(large))
    assert image.format == form.upper()
    assert np.abs(np.asarray(image).astype(int) - smooth).mean() < 4


@pytest.mark.parametrize(("quality", "sampling"), [(0, 2), (89, 2), (90, 0), (100, 0)])
def test_good_jpegs_keep_all_of_their_colours(quality: int, sampling: int) -> None:
    image = Image.open(io.BytesIO(encode(np.zeros((16, 16, 3), np.uint8), "jpeg", quality, None)))
    assert JpegImagePlugin.get_sampling(image) == sampling  # 0 is 4:4:4, 2 is 4:2:0


def test_recoding_is_encoding_anew() -> None:
    rgb = RNG.integers(0, 256, (8, 8, 3), np.uint8)
    png = encode(rgb, "png", 100, PARAMETERS)
    assert codec.recode(png, "jpeg", 50) == encode(rgb, "jpeg", 50, None)
    assert codec.recode(png, "png", 50) == encode(rgb, "png", 100, None)


def test_parameters_are_written_in_one_way() -> None:
    """So that equal pictures are equal files, whatever the order in which things were put together."""
    data = encode(np.zeros((1, 1, 3), np.uint8), "png", 100, {"b": 1, "a": "é"})
    assert chunk(b"iTXt", b"kindling\0\0\0\0\0" + '{"a": "é", "b": 1}'.encode()) in data
    assert data.index(b"IHDR") < data.index(b"iTXt") < data.index(b"IDAT")
    assert parameters_of(RECIPE, {"plan": "EAGER"}, "1") == RECIPE.described() | {"plan": "EAGER", "version": "1"}


@pytest.mark.parametrize(("more", "reads"), [(0, True), (1, False)])
def test_how_long_parameters_may_be(more: int, reads: bool, tmp_path: Path) -> None:
    text = b"kindling\0\0\0\0\0" + b'{"a": 1}'
    (tmp_path / "a.png").write_bytes(PNG_SIGNATURE + chunk(b"iTXt", text.ljust(1_000_000 + more)) + chunk(b"IEND", b""))
    if reads:
        assert read_parameters(tmp_path / "a.png") == {"a": 1}
    else:
        with pytest.raises(InvalidValue, match="no Kindling parameters"):
            read_parameters(tmp_path / "a.png")


def test_parameters_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(encode(np.zeros((8, 8, 3), np.uint8), "png", 100, PARAMETERS))
    found = read_parameters(path)
    assert found == PARAMETERS | {"size": [256, 256]}
    assert found["prompt"] == RECIPE.prompt


def test_metadata_off_leaves_nothing_behind(tmp_path: Path) -> None:
    data = encode(np.zeros((8, 8, 3), np.uint8), "png", 100, None)
    assert b"iTXt" not in data
    (tmp_path / "a.png").write_bytes(data)
    with pytest.raises(InvalidValue, match="carries no Kindling parameters"):
        read_parameters(tmp_path / "a.png")


def chunk(kind: bytes, data: bytes, crc: int | None = None) -> bytes:
    crc = zlib.crc32(kind + data) if crc is None else crc
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", crc)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"hello",
        PNG_SIGNATURE,
        PNG_SIGNATURE + b"\xff\xff\xff\xffiTXt",
        PNG_SIGNATURE + chunk(b"iTXt", b"kindling\0\0\0\0\0{}", crc=1),
        PNG_SIGNATURE + chunk(b"iTXt", b"kindling\0\0\0\0\0[1"),
        PNG_SIGNATURE + chunk(b"iTXt", b"kindling\0\0\0\0\0[1]"),
        PNG_SIGNATURE + chunk(b"iTXt", b"kindling\0\0\0\0\0\xff"),
        PNG_SIGNATURE + struct.pack(">I", 9) + b"iTXtkind",
        b"\x89PNG\n\n\x1a\n" + chunk(b"iTXt", b"kindling\0\0\0\0\0{}"),  # sent as text
    ],
)
def test_damaged_pictures_get_a_clear_error(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.png").write_bytes(data)
    with pytest.raises(InvalidValue, match=r"a\.png"):
        read_parameters(tmp_path / "a.png")
