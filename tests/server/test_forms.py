"""Forms and bodies that were cut short: refused at every byte, never drawn with what came of them."""

import contextlib
import json
import tempfile
from collections.abc import Sequence
from typing import Any

import pytest
from starlette.datastructures import Headers

from handler.core.errors import InvalidJson, InvalidValue
from handler.core.loras import Wanted
from handler.core.request import ImageRequest
from handler.server import multipart
from handler.server.bodies import decode

EDGE = "a-boundary"
PARTS = (("prompt", b"a red circle"), ("seed", b"7"), ("image", b"\x89PNG--a-boundar\r\n"), ("mask", b"\r\n--\r\n-"))


def form(ending: bytes = b"--\r\n", parts: Sequence[tuple[str, bytes]] = PARTS) -> bytes:
    files = {"image": '; filename="a.png"\r\nContent-Type: image/png', "mask": '; filename="m.png"'}
    bodies = (
        f'--{EDGE}\r\nContent-Disposition: form-data; name="{name}"{files.get(name, "")}\r\n\r\n'.encode()
        + data
        + b"\r\n"
        for name, data in parts
    )
    return b"".join(bodies) + f"--{EDGE}".encode() + ending


def read(body: bytes, kind: str = f"multipart/form-data; boundary={EDGE}") -> dict[str, Any]:
    return multipart.read(Headers({"content-type": kind}), body)


@pytest.mark.parametrize("ending", [b"--\r\n", b"--", b"--\r\nan epilogue"])
def test_a_whole_form(ending: bytes) -> None:
    wanted = {"prompt": "a red circle", "seed": 7, "image": [PARTS[2][1]], "mask": PARTS[3][1]}
    assert read(form(ending)) == wanted
    assert read(b"\r\n" + form(ending)) == wanted  # as old clients of C# begin


@pytest.mark.parametrize("names", [("loras",), ("loras", "loras"), ("loras[]", "loras[]"), ("loras[0]", "loras[1]")])
def test_loras_come_as_one_text_or_as_clients_spell_lists(names: tuple[str, ...]) -> None:
    texts = ["ink:0.8", "wash"] if len(names) > 1 else ["ink:0.8,wash"]
    fields = read(form(parts=[("prompt", b"x"), *((n, t.encode()) for n, t in zip(names, texts, strict=True))]))
    assert ImageRequest.parse(fields).loras == (Wanted("ink", 0.8), Wanted("wash"))


def test_what_has_parts_may_come_as_json() -> None:
    lora = {"name": "ink", "weight": 0.5, "clip_weight": 0.25}
    texts = {"loras": json.dumps([lora]), "sampling": ' {"steps": 4}', "prompt": "[x]"}
    fields = read(form(parts=[(name, text.encode()) for name, text in texts.items()]))
    assert fields == {"loras": [lora], "sampling": {"steps": 4}, "prompt": "[x]"}
    assert read(form(parts=[("sampling", b"{")])) == {"sampling": "{"}
    apart = [("loras[]", json.dumps(each).encode()) for each in (lora, {"name": "wash"})]
    assert read(form(parts=apart)) == {"loras": [lora, {"name": "wash"}]}


def test_each_field_has_the_type_that_json_gives_it() -> None:
    texts = {"prompt": "7", "size": "1", "num_inference_steps": "4", "guidance_scale": "1e-1", "stream": "True"}
    kept = {"prompt": "7", "size": "1", "num_inference_steps": 4, "guidance_scale": 0.1, "stream": True}
    assert {name: multipart.typed(name, text) for name, text in texts.items()} == kept


@pytest.mark.parametrize("text", ["7.0", "7e0", "70E-1", "7"])
def test_a_whole_number_is_one_however_it_is_written(text: str) -> None:
    for found in (multipart.typed("seed", text), decode(f'{{"seed": {text}}}'.encode())["seed"]):
        assert ImageRequest.parse({"prompt": "x", "seed": found}).seed == 7


def test_files_stay_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "TemporaryFile", None)  # where what is spooled ends
    large = b"x" * (3 << 20)
    assert read(form(parts=[("image", large)])) == {"image": [large]}


@pytest.mark.parametrize(
    ("most", "one_more"),
    [
        ([*[("image", b"x")] * 16, ("mask", b"x")], ("image", b"x")),
        ([(f"field{i}", b"x") for i in range(64)], ("another", b"x")),
    ],
    ids=["files", "fields"],
)
def test_a_form_holds_so_much(most: list[tuple[str, bytes]], one_more: tuple[str, bytes]) -> None:
    read(form(parts=most))
    with pytest.raises(InvalidValue, match="cannot be read: Too many"):
        read(form(parts=[*most, one_more]))


@pytest.mark.parametrize("name", ["prompt", "seed", "mask", "n" * 100])
def test_a_field_that_comes_twice_is_named(name: str) -> None:
    with pytest.raises(InvalidValue, match=f"'{name[:80]}' appears twice") as caught:
        read(form(parts=[(name, b"7"), (name, b"7")]))
    assert caught.value.param == name[:80]


def test_images_come_as_a_list_however_they_are_spelled() -> None:
    parts = [("image[]", b"1"), ("image", b"2"), ("image[0]", b"3"), ("image[12]", b"4"), ("mask[]", b"5")]
    assert read(form(parts=parts)) == {"image": ["1", b"2", "3", "4"], "mask": "5"}
    assert read(form(parts=[("images", b"1"), ("images", b"2")])) == {"images": ["1", "2"]}


def test_what_is_empty_was_left_out() -> None:
    """A browser's form sends it all the same."""
    empty = [(name, b"") for name in ("prompt", "negative_prompt", "seed", "size", "image", "image[]", "mask", "n")]
    assert read(form(parts=empty)) == {"prompt": "", "negative_prompt": ""}
    assert read(form(parts=[*empty[2:], ("image", b"x"), ("seed", b"0"), ("stream", b"false")])) == {
        "image": [b"x"], "seed": 0, "stream": False
    }  # fmt: skip


def test_an_images_text_may_be_long() -> None:
    """As long as the body, as its file may be."""
    assert read(form(parts=[("image[]", b"x" * 3_000_000)])) == {"image": ["x" * 3_000_000]}


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


def test_an_empty_body_is_a_form_without_fields() -> None:
    """What is missing then is told by name."""
    assert read(b"") == {}
