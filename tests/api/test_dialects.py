"""Bad and good payloads, without a server: which error, which field."""

import pytest

from handler.api.dialects import fal, native, openai
from handler.catalog.models import find
from handler.core.errors import (
    InvalidType,
    InvalidValue,
    MissingParameter,
    OutOfRange,
    RequestError,
    UnknownParameter,
    Unsupported,
)
from handler.core.recipe import Picture, Tokens
from handler.core.request import ImageRequest

OK = {"prompt": "a red circle"}
BAD = [
    ({}, MissingParameter, "prompt"),
    ({"prompt": None}, MissingParameter, "prompt"),
    ({"prompt": 7}, InvalidType, "prompt"),
    ({"prompt": "x" * 100_000}, OutOfRange, "prompt"),
    (OK | {"n": 0}, OutOfRange, "n"),
    (OK | {"n": "2"}, InvalidType, "n"),
    (OK | {"n": True}, InvalidType, "n"),
    (OK | {"n": 1.5}, InvalidType, "n"),
    (OK | {"num_inference_steps": 51}, OutOfRange, "num_inference_steps"),
    (OK | {"num_inference_steps": 0}, OutOfRange, "num_inference_steps"),
    (OK | {"guidance_scale": 20.5}, OutOfRange, "guidance_scale"),
    (OK | {"guidance_scale": float("nan")}, OutOfRange, "guidance_scale"),
    (OK | {"guidance_scale": float("inf")}, OutOfRange, "guidance_scale"),
    (OK | {"guidance_scale": "3"}, InvalidType, "guidance_scale"),
    (OK | {"seed": -2}, OutOfRange, "seed"),
    (OK | {"seed": 2**64}, OutOfRange, "seed"),
    (OK | {"scheduler": "lcm"}, OutOfRange, "scheduler"),
    (OK | {"negative_prompt": "x" * 32_001}, OutOfRange, "negative_prompt"),
    (OK | {"output_format": "gif"}, OutOfRange, "output_format"),
    (OK | {"output_format": "jpeg", "output_compression": 101}, OutOfRange, "output_compression"),
    (OK | {"output_compression": 50}, InvalidValue, "output_compression"),
    (OK | {"stepz": 4}, UnknownParameter, "stepz"),
]
BAD_OPENAI = [
    (OK | {"size": "17x17"}, OutOfRange, "size"),
    (OK | {"size": "0x0"}, OutOfRange, "size"),
    (OK | {"size": "4096x4096"}, OutOfRange, "size"),
    (OK | {"size": "1024x"}, InvalidValue, "size"),
    (OK | {"size": "0256x256"}, InvalidValue, "size"),
    (OK | {"size": "x" * 10_000}, InvalidValue, "size"),
    (OK | {"size": "٢٥٦x256"}, InvalidValue, "size"),
    (OK | {"size": 1024}, InvalidType, "size"),
    (OK | {"size": "256x"}, InvalidValue, "size"),
    (OK | {"size": "256 x 256"}, InvalidValue, "size"),
    (OK | {"width": 256}, InvalidValue, "width"),
    (OK | {"width": 16, "height": 256}, OutOfRange, "width"),
    (OK | {"width": 256, "height": 256, "size": "128x256"}, InvalidValue, "size"),
    (OK | {"width": 256, "size": "128x256"}, InvalidValue, "size"),
    (OK | {"output_format": "jpg2"}, OutOfRange, "output_format"),
    (OK | {"response_format": "file"}, OutOfRange, "response_format"),
    (OK | {"stream": 0}, InvalidType, "stream"),
    (OK | {"stream": "true"}, InvalidType, "stream"),
    (OK | {"partial_images": 4}, OutOfRange, "partial_images"),
    (OK | {"partial_images": 1, "n": 2}, InvalidValue, "partial_images"),
    (OK | {"background": "transparent"}, Unsupported, "background"),
    (OK | {"frame_count": 4}, Unsupported, "frame_count"),
    (OK | {"user": 3}, InvalidType, "user"),
    (OK | {"quality": "ultra"}, OutOfRange, "quality"),
    (OK | {"quality": 3}, OutOfRange, "quality"),
]


@pytest.mark.parametrize(("payload", "error", "param"), BAD + BAD_OPENAI, ids=lambda v: str(v)[:50])
def test_openai_refuses(payload, error, param) -> None:
    with pytest.raises(error) as caught:
        openai.parse(payload)
    assert type(caught.value) is error
    assert caught.value.param == param
    assert len(caught.value.message) < 300


@pytest.mark.parametrize(
    ("payload", "error", "param"), [*BAD, (OK | {"width": 256}, InvalidValue, "width")], ids=lambda v: str(v)[:50]
)
def test_native_refuses(payload, error, param) -> None:
    with pytest.raises(error) as caught:
        native.parse(payload)
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("payload", "told"),
    [
        ({"partial_images": 1, "n": 2, "stream": True}, "partial_images are of one picture; send n 1."),
        ({"mask": "AAAA"}, "mask says where an image is drawn anew; send the image too."),
        ({"width": 64}, "width and height must be given together."),
        ({"output_compression": 5}, "output_compression below 100 needs output_format jpeg or webp; PNG is lossless."),
        ({"images": ["http://a.example/b.png"]}, "images: image 1 is a URL"),
        ({"n": 0}, "n: Input should be greater than or equal to 1."),
    ],
)
def test_a_field_is_named_once(payload, told) -> None:
    with pytest.raises(RequestError) as caught:
        native.parse(OK | payload)
    assert caught.value.message.startswith(told)


@pytest.mark.parametrize("dialect", [native, openai])
def test_of_a_long_name_only_the_start_is_told_again(dialect) -> None:
    with pytest.raises(UnknownParameter) as caught:
        dialect.parse(OK | {"k" * 5000: 1})
    assert caught.value.message == f"Unknown parameter: '{'k' * 80}'."
    assert caught.value.param == "k" * 80


def test_openai_accepts_what_clients_send() -> None:
    request = openai.parse(
        OK
        | {
            "model": "spark", "n": 2, "size": "512x384", "response_format": "b64_json", "user": "me", "style": "vivid",
            "quality": "hd", "moderation": "low", "background": "auto", "stream": False, "partial_images": 0,
            "safety_identifier": "abc", "output_format": "webp", "output_compression": 80, "seed": 0, "svg": None,
            "num_inference_steps": 4, "guidance_scale": 0, "scheduler": "flow-match-euler", "negative_prompt": None,
        }
    )  # fmt: skip
    assert (request.width, request.height, request.n, request.seed) == (512, 384, 2, 0)
    assert openai.parse(OK | {"size": "auto"}).width is None


@pytest.mark.parametrize(
    "fields",
    [
        *({"size": f"512{sign}384"} for sign in "xX*"),
        {"width": 512, "height": 384},
        {"width": 512, "height": 384, "size": "auto"},
        {"width": 512, "height": 384, "size": "512x384"},
        {"width": 512, "size": "512x384"},
    ],
)
def test_openai_reads_a_size_however_it_is_spelled(fields) -> None:
    request = openai.parse(OK | fields)
    assert (request.width, request.height) == (512, 384)


@pytest.mark.parametrize("dialect", [native, openai])
def test_a_format_may_be_named_by_its_usual_ending(dialect) -> None:
    assert dialect.parse(OK | {"output_format": "jpg", "output_compression": 80}).output_format == "jpeg"


@pytest.mark.parametrize("dialect", [fal, native, openai])
def test_words_that_a_model_does_not_know_are_told_once_of_all_pictures(dialect) -> None:
    """A workflow's may have prompts of their own."""
    request, spec = ImageRequest(prompt="x"), find("spark")
    several = [("cat", "hat"), ("hat", "dog"), (), tuple(f"w{i}" for i in range(30))]
    pictures = [Picture(b"", "png", spec.recipe(request), tokens=Tokens(3, 3, words)) for words in several]
    told = dialect.render(request, spec=spec, pictures=pictures, seconds=1.0)["unknown_words"]
    assert (told[:4], len(told)) == (["cat", "hat", "dog", "w0"], 20)
    known = dialect.render(request, spec=spec, pictures=pictures[2:3], seconds=1.0)
    assert "unknown_words" not in known
