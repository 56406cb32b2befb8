import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from handler import MODELS, ImageRequest
from handler.codec import PNG_SIGNATURE, encode, parameters_of, read_parameters
from handler.errors import InvalidValue

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


@pytest.mark.parametrize("form", ["jpeg", "webp"])
def test_lossy_formats_obey_quality(form: str) -> None:
    smooth = np.asarray(Image.fromarray(RNG.integers(0, 256, (8, 8, 3), np.uint8)).resize((128, 128)))
    small, large = (encode(smooth, form, q, None) for q in (10, 95))  # type: ignore[arg-type]
    assert len(small) < len(large)
    image = Image.open(io.BytesIO(large))
    assert image.format == form.upper()
    assert np.abs(np.asarray(image).astype(int) - smooth).mean() < 4


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
    ],
)
def test_damaged_pictures_get_a_clear_error(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.png").write_bytes(data)
    with pytest.raises(InvalidValue, match=r"a\.png"):
        read_parameters(tmp_path / "a.png")
