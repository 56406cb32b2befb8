"""Forms and bodies that were cut short: refused at every byte, never drawn with what came of them."""

import asyncio
import contextlib
import json
from typing import Any

import pytest
from starlette.datastructures import Headers

from handler.core.errors import InvalidJson, InvalidValue
from handler.server import multipart
from handler.server.bodies import decode

EDGE = "a-boundary"
PARTS = (("prompt", b"a red circle"), ("seed", b"7"), ("image", b"\x89PNG--a-boundar\r\n"), ("mask", b"\r\n--\r\n-"))


def form(ending: bytes = b"--\r\n") -> bytes:
    files = {"image": '; filename="a.png"\r\nContent-Type: image/png', "mask": '; filename="m.png"'}
    parts = (
        f'--{EDGE}\r\nContent-Disposition: form-data; name="{name}"{files.get(name, "")}\r\n\r\n'.encode()
        + data
        + b"\r\n"
        for name, data in PARTS
    )
    return b"".join(parts) + f"--{EDGE}".encode() + ending


def read(body: bytes, kind: str = f"multipart/form-data; boundary={EDGE}") -> dict[str, Any]:
    return asyncio.run(multipart.read(Headers({"content-type": kind}), body))


@pytest.mark.parametrize("ending", [b"--\r\n", b"--", b"--\r\nan epilogue"])
def test_a_whole_form(ending: bytes) -> None:
    wanted = {"prompt": "a red circle", "seed": 7, "image": [PARTS[2][1]], "mask": PARTS[3][1]}
    assert read(form(ending)) == wanted


def test_a_form_cut_short_anywhere_is_refused() -> None:
    whole = form(b"--")
    for length in range(1, len(whole)):
        with pytest.raises(InvalidValue, match="form"):
            read(whole[:length])


def test_a_form_that_misses_only_its_end_says_so() -> None:
    with pytest.raises(InvalidValue, match="cut short") as caught:
        read(form(b""))
    assert caught.value.status == 400


@pytest.mark.parametrize(
    "charset", ["undefined", "idna", "punycode", "base64", "no-such", "utf-16", "unicode_escape", "rot13"]
)
def test_a_charset_is_no_crash(charset: str) -> None:
    body = form().replace(b"a red circle", b"\\ud800\xff")
    with contextlib.suppress(InvalidValue):  # it is drawn from, or refused
        read(body, f"multipart/form-data; boundary={EDGE}; charset={charset}")


@pytest.mark.parametrize(
    "boundary", ["", "; boundary=", '; boundary=""', "; boundary=" + "a" * 300, "; boundary=other"]
)
def test_a_form_with_no_boundary_of_its_own(boundary: str) -> None:
    with pytest.raises(InvalidValue, match="form"):
        read(form(), f"multipart/form-data{boundary}")


@pytest.mark.parametrize("number", ["[[[[", "1e999", "NaN", "-Infinity", "1" * 5000, "{", '"7"'])
def test_a_number_that_is_none_is_left_for_its_fields_check(number: str) -> None:
    assert isinstance(multipart.typed("seed", number), str)


def test_json_cut_short_anywhere_is_refused() -> None:
    whole = json.dumps({"prompt": "a red circle", "images": ["aGVsbG8="], "seed": 7}).encode()
    for length in range(len(whole)):
        with pytest.raises(InvalidJson):
            decode(whole[:length])
