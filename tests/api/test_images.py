"""Reference images: every way they come in, every way they are refused, and what a picture says of them."""

import base64
import hashlib
import io
import json
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image
from test_cli import kindling
from test_codec import chunk

import tiny
from handler import MODELS, ImageRequest
from handler.api import codec, references
from handler.api.dialects import native, openai
from handler.api.pieces import plain
from handler.core.errors import InvalidType, InvalidValue, OutOfRange, RequestError
from handler.core.recipe import Picture, Reference
from serving import ROOT, Served, serving

KLEIN, DEV = MODELS["flux2-klein"], MODELS["flux2-dev"]
SECRET = "WalrusInATopHat"  # in prompts and in a photo's metadata; nobody but the caller may read it
SMOOTH = Image.fromarray(np.random.default_rng(0).integers(0, 256, (4, 6, 3), np.uint8)).resize((96, 64))
RGB = np.asarray(SMOOTH).astype(int)
RAMP = np.arange(64 * 96, dtype=np.uint16).reshape(64, 96) * 10


def saved(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def moving(form: str) -> bytes:
    return saved(SMOOTH, form, save_all=True, append_images=[SMOOTH.rotate(180)])


def exif(orientation: int) -> Image.Exif:
    made = Image.Exif()
    made[0x0112], made[0x010F] = orientation, SECRET
    return made


def png_of(width: int, height: int) -> bytes:
    """A PNG that declares this size and brings next to nothing."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b"")
    return codec.PNG_SIGNATURE + parts


def jpeg_of(width: int, height: int) -> bytes:
    data = saved(SMOOTH, "JPEG")
    return data.replace(struct.pack(">HH", 64, 96), struct.pack(">HH", height, width), 1)


def webp_of(width: int, height: int) -> bytes:
    data = bytearray(saved(SMOOTH, "WEBP", lossless=True))
    data[21:25] = struct.pack("<I", width - 1 | height - 1 << 14)
    return bytes(data)


def text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def url(data: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{text(data)}"


A, B = saved(SMOOTH), saved(SMOOTH.rotate(180))
CUT = A[: len(A) // 2]


def decoded(data: bytes) -> Any:
    return references.references([data])[0].rgb.astype(int)


def with_hole(mode: str) -> Image.Image:
    """Black, and transparent in its left half."""
    image = Image.new("RGBA", (96, 64), (0, 0, 0, 255))
    image.paste((0, 0, 0, 0), (0, 0, 48, 64))
    return image.convert(mode)


BLACK = Image.new("L", (96, 64))
BLACK.paste(9, (0, 0, 48, 64))
HOLE = np.zeros((64, 96, 3), int)
HOLE[:, :48] = 255


@pytest.mark.parametrize("dialect", [openai, native])
def test_data_urls_and_bare_base64_are_the_same(dialect: Any) -> None:
    lines = base64.encodebytes(A).decode()
    sent = [url(A), lines, url(A, "webp"), f"data:image/png;name=a.png;base64,{text(A)}", f"data:;base64,{lines}"]
    assert dialect.parse({"prompt": "x", "images": sent}).images == (A,) * 5
    assert dialect.parse({"prompt": "x", "images": []}).images == ()
    assert dialect.parse({"prompt": "x", "images": None}).images == ()


@pytest.mark.parametrize(
    ("data", "wanted", "near"),
    [
        pytest.param(A, RGB, 0, id="png"),
        pytest.param(saved(SMOOTH, "JPEG", quality=95, subsampling=0), RGB, 8, id="jpeg"),
        pytest.param(saved(SMOOTH, "JPEG", progressive=True, quality=95, subsampling=0), RGB, 8, id="progressive"),
        pytest.param(saved(SMOOTH.convert("CMYK"), "JPEG", quality=95, subsampling=0), RGB, 12, id="cmyk"),
        pytest.param(saved(SMOOTH, "WEBP", lossless=True), RGB, 0, id="webp"),
        pytest.param(saved(SMOOTH, "AVIF", quality=95, subsampling="4:4:4"), RGB, 12, id="avif"),
        pytest.param(saved(SMOOTH, "JPEG", quality=95, subsampling=0, exif=exif(3)), RGB[::-1, ::-1], 8, id="jpeg-180"),
        pytest.param(saved(SMOOTH, exif=exif(6)), np.rot90(RGB, -1), 0, id="png-90"),
        pytest.param(saved(SMOOTH, "WEBP", lossless=True, exif=exif(2)), RGB[:, ::-1], 0, id="webp-mirrored"),
        pytest.param(saved(SMOOTH, "MPO", save_all=True, append_images=[SMOOTH], quality=95), RGB, 16, id="mpo"),
        pytest.param(saved(SMOOTH.convert("L")), np.asarray(SMOOTH.convert("L").convert("RGB")), 0, id="grey"),
        pytest.param(saved(SMOOTH.convert("1")), np.asarray(SMOOTH.convert("1").convert("RGB")), 0, id="one-bit"),
        pytest.param(saved(SMOOTH.quantize(9)), np.asarray(SMOOTH.quantize(9).convert("RGB")), 0, id="palette"),
        pytest.param(saved(Image.fromarray(RAMP)), np.dstack([RAMP >> 8] * 3), 0, id="16-bit"),
        pytest.param(saved(with_hole("RGBA")), HOLE, 0, id="rgba"),
        pytest.param(saved(with_hole("LA")), HOLE, 0, id="grey-alpha"),
        pytest.param(saved(with_hole("RGBA"), "WEBP", lossless=True), HOLE, 0, id="webp-alpha"),
        pytest.param(saved(BLACK, transparency=9), HOLE, 0, id="grey-key"),
        pytest.param(saved(BLACK.convert("RGB"), transparency=(9, 9, 9)), HOLE, 0, id="rgb-key"),
        pytest.param(saved(BLACK.convert("P"), transparency=9), HOLE, 0, id="palette-key"),
    ],
)
def test_what_is_sent_is_what_is_seen(data: bytes, wanted: Any, near: int) -> None:
    found = decoded(data)
    assert found.shape == wanted.shape
    assert np.abs(found - wanted).max() <= near


def test_half_transparent_is_half_white() -> None:
    assert np.unique(decoded(saved(Image.new("RGBA", (64, 64), (0, 0, 0, 128))))).tolist() == [127]


def test_damaged_metadata_does_no_harm(recwarn: pytest.WarningsRecorder) -> None:
    whole = saved(SMOOTH, "JPEG", exif=exif(1))
    at = whole.index(b"Exif")
    for i in range(at, at + 40):
        damaged = whole[:i] + b"\xff\xff" + whole[i + 2 :]
        assert sorted(decoded(damaged).shape) == [3, 64, 96]
    assert not recwarn.list


MALFORMED: list[tuple[str, Any, type[RequestError], str]] = [
    ("not base64", ["no base64!"], InvalidValue, "image 1 is not valid base64"),
    ("not ascii", [text(A), "größer"], InvalidValue, "image 2 is not valid base64"),
    ("cut base64", [text(A)[:-3]], InvalidValue, "image 1 is not valid base64"),
    ("https", ["https://example.com/a.png"], InvalidValue, "only from hosts in KINDLING_FETCH_HOSTS"),
    ("http", ["http://169.254.169.254/?a,b"], InvalidValue, "only from hosts in KINDLING_FETCH_HOSTS"),
    ("file", ["file:///etc/passwd"], InvalidValue, "image 1 is not valid base64"),
    ("data text", ["data:text/plain,hi"], InvalidValue, "should have ;base64,"),
    ("data percent", ["data:image/svg+xml,%3Csvg%3E"], InvalidValue, "should have ;base64,"),
    ("number", [text(A), 7], InvalidType, "image 2 should be a string"),
    ("object", [{"image_url": "x"}], InvalidType, "image 1 should be a string"),
    ("null", [None], InvalidType, "image 1 should be a string"),
    ("a string", text(A), InvalidType, "list of images"),
    ("an object", {"0": text(A)}, InvalidType, "list of images"),
    ("seventeen", [text(A)] * 17, OutOfRange, "at most 16 images, got 17"),
    ("seventeen, bad", ["no base64!"] * 17, OutOfRange, "at most 16 images, got 17"),
]


@pytest.mark.parametrize("dialect", [openai, native])
@pytest.mark.parametrize(("name", "images", "kind", "told"), MALFORMED, ids=[name for name, *_ in MALFORMED])
def test_malformed_lists(dialect: Any, name: str, images: Any, kind: type[RequestError], told: str) -> None:
    with pytest.raises(RequestError) as caught:
        dialect.parse({"prompt": SECRET, "images": images})
    refused(caught.value, kind, told)


UNUSABLE: list[tuple[str, bytes, type[RequestError], str]] = [
    ("empty", b"", InvalidValue, "not a whole PNG, JPEG, WebP, AVIF or HEIC"),
    ("noise", b"hello" * 99, InvalidValue, "not a whole PNG, JPEG, WebP, AVIF or HEIC"),
    ("svg", b"<svg xmlns='http://www.w3.org/2000/svg'/>", InvalidValue, "is an SVG; send a PNG"),
    ("gif", saved(SMOOTH, "GIF"), InvalidValue, "is a GIF; send a PNG, JPEG, WebP, AVIF or HEIC file"),
    ("moving gif", moving("GIF"), InvalidValue, "is a GIF; send a PNG, JPEG, WebP, AVIF or HEIC file"),
    ("bmp", saved(SMOOTH, "BMP"), InvalidValue, "is a BMP; send"),
    ("tiff", saved(SMOOTH, "TIFF"), InvalidValue, "is a TIFF; send"),
    ("heic", b"\0\0\0\x18ftypheic" + bytes(99), InvalidValue, "not a whole PNG"),
    ("cut avif", saved(SMOOTH, "AVIF")[:-200], InvalidValue, "not a whole PNG, JPEG, WebP, AVIF or HEIC"),
    ("cut png", CUT, InvalidValue, "not a whole PNG, JPEG, WebP, AVIF or HEIC"),
    ("png header", A[:40], InvalidValue, "not a whole PNG, JPEG, WebP, AVIF or HEIC"),
    ("cut jpeg", saved(SMOOTH, "JPEG")[:-200], InvalidValue, "not a whole PNG, JPEG, WebP, AVIF or HEIC"),
    ("cut webp", saved(SMOOTH, "WEBP")[:-50], InvalidValue, "not a whole PNG, JPEG, WebP, AVIF or HEIC"),
    ("moving webp", moving("WEBP"), InvalidValue, "an animation"),
    ("moving png", moving("PNG"), InvalidValue, "an animation"),
    ("bomb", png_of(30_000, 30_000), OutOfRange, "at most 16 million pixels"),
    ("small bomb", png_of(10_000, 10_000), OutOfRange, "at most 16 million pixels"),
    ("too large", png_of(4097, 4096), OutOfRange, "at most 16 million pixels"),
    ("too small", saved(SMOOTH.resize((63, 200))), OutOfRange, "63x200; send one with each side at least 64 pixels"),
    ("too long", saved(SMOOTH.resize((520, 64))), OutOfRange, "520x64; send one with"),
]


@pytest.mark.parametrize(("name", "data", "kind", "told"), UNUSABLE, ids=[name for name, *_ in UNUSABLE])
def test_unusable_files(name: str, data: bytes, kind: type[RequestError], told: str) -> None:
    with pytest.raises(RequestError) as caught:
        references.references([A, data])
    refused(caught.value, kind, told)
    assert "image 2" in caught.value.message


def refused(error: RequestError, kind: type[RequestError], told: str) -> None:
    assert (type(error), error.param) == (kind, "images")
    assert error.status == (422 if kind is OutOfRange else 400)
    assert told in error.message
    assert error.message.startswith("images: ")
    assert len(error.message) < 200
    assert SECRET not in error.message


def test_a_bomb_costs_no_memory_and_no_words(tmp_path: Path) -> None:
    """In a process of its own, where no filter of pytest's hides what Pillow would say."""
    bombs = [png_of(30_000, 30_000), png_of(10_000, 10_000), jpeg_of(30_000, 30_000), webp_of(16_000, 16_000)]
    for i, bomb in enumerate([A, *bombs]):  # the first brings Pillow in
        (tmp_path / str(i)).write_bytes(bomb)
    code = """if True:
        import pathlib, resource, sys
        from handler.api import references
        from handler.core import errors
        for i in range(5):
            try:
                references.references([pathlib.Path(sys.argv[1], str(i)).read_bytes()])
            except errors.OutOfRange:
                print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak)
            else:
                peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    """
    command = [sys.executable, "-c", code, str(tmp_path)]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert out.stderr == ""
    grown = [int(line) for line in out.stdout.split()]
    assert len(grown) == len(bombs)
    assert max(grown) < 10_000  # kB; the smallest of them would take 300,000


@pytest.mark.parametrize(
    ("spec", "count", "told"),
    [
        (KLEIN, 5, "flux2-klein takes at most 4 images, got 5"),
        (DEV, 7, "flux2-dev takes at most 6 images, got 7"),
        (MODELS["spark"], 2, "spark edits one image, got 2"),
        (MODELS["flux-dev"], 16, "flux-dev edits one image, got 16"),
    ],
)
def test_more_than_the_model_takes(spec: Any, count: int, told: str) -> None:
    request = ImageRequest(prompt="x", images=(b"never decoded",) * count)
    with pytest.raises(RequestError, match=told) as caught:
        spec.validate(request)
    assert (caught.value.param, caught.value.status) == ("images", 422)


@pytest.mark.parametrize(
    ("shape", "size"),  # (height, width) and (width, height)
    [
        ((1024, 1024), (1024, 1024)),
        ((4096, 4096), (1024, 1024)),
        ((2000, 3000), (1248, 832)),
        ((3000, 2000), (832, 1248)),
        ((300, 500), (496, 304)),  # never enlarged, on the grid
        ((64, 64), (64, 64)),
        ((64, 512), (512, 64)),
        ((1000, 8000), (2048, 256)),  # no side above what a request may ask for
    ],
)
def test_auto_size_follows_the_first_image(shape: tuple[int, int], size: tuple[int, int]) -> None:
    images = tuple(Reference(np.empty((*s, 3), np.uint8), "") for s in (shape, (640, 64)))
    request = openai.parse({"prompt": "x", "size": "auto", "images": [text(A), text(B)]})
    assert KLEIN.recipe(request, images).size == size
    explicit = openai.parse({"prompt": "x", "size": "200x72", "images": [text(A), text(B)]})
    assert KLEIN.recipe(explicit, images).size == (200, 72)


def test_a_picture_names_its_images_and_never_holds_them(tmp_path: Path) -> None:
    request = ImageRequest(prompt="x", images=(A, B))
    recipe = KLEIN.recipe(request, references.references(request.images))
    shas = [hashlib.sha256(data).hexdigest()[:2] for data in (A, B)]
    parameters = codec.parameters_of(recipe, {"plan": "EAGER"}, "0")
    (tmp_path / "a.png").write_bytes(codec.encode(RGB.astype(np.uint8), "png", 100, parameters))
    assert codec.read_parameters(tmp_path / "a.png")["images"] == shas
    answer = plain(native.render(request, KLEIN, [Picture(b"", "png", recipe)], 1.0))
    assert json.loads(json.dumps(answer))["images"][0]["parameters"]["images"] == shas
    assert len(json.dumps(answer)) < 1000


@pytest.fixture(scope="module")
def volume(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("volume")
    tiny.write(KLEIN, folder)
    return folder


@pytest.fixture(scope="module")
def klein(volume: Path) -> Iterator[Served]:
    """A real server with a tiny FLUX.2 [klein], at its most talkative."""
    environ = {"KINDLING_MODEL": KLEIN.id, "KINDLING_VOLUME": str(volume), "KINDLING_LOG_LEVEL": "debug"}
    with serving(environ) as served:
        yield served


def post(server: Served, path: str, **fields: Any) -> httpx.Response:
    payload = {"prompt": SECRET, "seed": 1, "num_inference_steps": 1, **fields}
    return httpx.post(server.url + path, json=payload, timeout=120)


def test_over_http(klein: Served, tmp_path: Path) -> None:
    photo = saved(SMOOTH, "JPEG", exif=exif(6))
    images = [url(photo, "jpeg"), text(B)]
    drawn = post(klein, "/v1/images/generations", images=images).json()
    assert drawn["size"] == "64x96"  # upright
    (tmp_path / "a.png").write_bytes(base64.b64decode(drawn["data"][0]["b64_json"]))
    shas = [hashlib.sha256(data).hexdigest()[:2] for data in (photo, B)]
    assert codec.read_parameters(tmp_path / "a.png")["images"] == shas
    again = post(klein, "/generate", images=images).json()["images"][0]
    assert again["parameters"]["images"] == shas
    assert again["b64_json"] == drawn["data"][0]["b64_json"]
    for other in ([], images[:1], images[::-1]):
        drawn = post(klein, "/generate", images=other, width=64, height=96).json()["images"][0]
        assert (decoded(base64.b64decode(drawn["b64_json"])) != decoded(base64.b64decode(again["b64_json"]))).any()

    for _, bad, kind, told in MALFORMED:
        answer = post(klein, "/v1/images/generations", images=bad)
        assert (answer.status_code, answer.json()["error"]["param"]) == (kind.status, "images")
        assert told in answer.json()["error"]["message"]
    for _, data, kind, told in UNUSABLE:
        answer = post(klein, "/generate", images=[text(data)])
        assert (answer.status_code, answer.json()["error"]["code"]) == (kind.status, kind.code)
        assert told in answer.json()["error"]["message"]
    many = post(klein, "/generate", images=[text(CUT)] * 5)
    assert (many.status_code, many.json()["error"]["code"]) == (422, "out_of_range")

    assert post(klein, "/generate", images=images).json()["images"][0]["b64_json"] == again["b64_json"]
    log = "".join(klein.lines)
    for private in (SECRET, text(photo)[:40], text(B)[:40], repr(B[:12])[2:-1], "Warning"):
        assert private not in log


def test_a_model_that_edits_one_image(server: Served) -> None:
    for images in ([url(A)] * 2, [text(CUT)] * 2, [text(png_of(30_000, 30_000))] * 2):  # told before it is decoded
        answer = post(server, "/v1/images/generations", images=images)
        error = answer.json()["error"]
        assert (answer.status_code, error["param"], error["code"]) == (422, "images", "out_of_range")
        assert error["message"] == "images: spark edits one image, got 2."


def test_the_body_limit_comes_first(server: Served) -> None:
    answer = post(server, "/v1/images/generations", images=["!" * 9_000_000])
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")
    assert answer.json()["error"]["message"] == "The body may be at most 8 MB here. KINDLING_MAX_BODY_MB says how many."


@pytest.fixture(scope="module")
def generate(volume: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Runs `generate` beside a.png, b.png and out.png, which was made from both."""
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "a.png").write_bytes(A)
    (folder / "b.png").write_bytes(B)
    (folder / "cut.png").write_bytes(CUT)

    def run(*arguments: str) -> Any:
        out = kindling("generate", *arguments, cwd=folder, KINDLING_VOLUME=str(volume))
        out.folder = folder  # type: ignore[attr-defined]
        return out

    made = run(SECRET, "--model", KLEIN.id, "--image", "a.png", "--image", "b.png", "--seed", "2", "-o", "out.png")
    assert made.returncode == 0, made.stderr
    assert made.stderr == ""
    assert "flux2-klein, 96x64" in made.stdout
    return run


def test_made_again_bit_for_bit(generate: Callable[..., Any]) -> None:
    again = generate("--from", "out.png", "--image", "a.png", "--image", "b.png", "-o", "again.png")
    assert again.returncode == 0, again.stderr
    assert (again.folder / "again.png").read_bytes() == (again.folder / "out.png").read_bytes()
    assert codec.read_parameters(again.folder / "out.png")["images"] == [
        hashlib.sha256(i).hexdigest()[:2] for i in (A, B)
    ]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("--from out.png", "made from 2 images; give exactly those, in their order, with --image"),
        ("--from out.png --image a.png", "made from 2 images"),
        ("--from out.png --image b.png --image a.png", "made from 2 images"),
        ("--from out.png --image a.png --image a.png", "made from 2 images"),
        ("--from out.png --image a.png --image b.png --image b.png", "made from 2 images"),
        ("--from out.png --image a.png --image none.png", "cannot read none.png"),
        ("--from out.png --image a.png --image cut.png", "made from 2 images"),
        ("--from a.png", "a.png carries no Kindling parameters"),
        ("x --model flux2-klein --image out.png --image none.png", "cannot read none.png"),
        ("x --model flux2-klein --image .", "cannot read ."),
        ("x --model flux2-klein --image a.png --image cut.png", "image 2 is not a whole PNG"),
        ("x --model flux2-klein" + 5 * " --image a.png", "takes at most 4 images, got 5"),
        ("x --image cut.png", "image 1 is not a whole PNG"),
        ("x --image a.png --image b.png", "spark edits one image, got 2"),
    ],
)
def test_the_command_line_says_what_is_wrong(generate: Callable[..., Any], arguments: str, told: str) -> None:
    out = generate(*arguments.split())
    assert (out.returncode, out.stderr.count("\n")) == (2, 1)
    assert out.stderr.startswith("kindling: ")
    assert told in out.stderr
    assert SECRET not in out.stderr


@pytest.mark.parametrize("images", [None, 7])
def test_parameters_without_a_list_of_images_are_incomplete(images: Any, generate: Callable[..., Any]) -> None:
    folder = generate("--from", "a.png").folder
    found = codec.read_parameters(folder / "out.png") | {"images": images}
    (folder / "old.png").write_bytes(codec.encode(RGB.astype(np.uint8), "png", 100, found))
    out = generate("--from", "old.png")
    assert (out.returncode, out.stderr) == (2, "kindling: old.png: its parameters are incomplete.\n")
