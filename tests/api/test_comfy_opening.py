"""Any file of ComfyUI's: JSON of every wrapping, pictures, and what is none."""

import io
import json
import struct
import zlib
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from workflows import api, default, png, text_chunk

from comfy_graphs import graph
from handler.api.codec import inscribed
from handler.api.comfy.inscription import texts
from handler.api.dialects.comfy import pictured
from handler.api.dialects.comfy.opening import Opened, opened
from handler.core.errors import GraphRefused

UI, GRAPH = default(), api()


def bare(found: Opened) -> dict[str, Any]:
    """Its graph without titles."""
    return {name: {key: one[key] for key in ("class_type", "inputs")} for name, one in found.graph.items()}


def of(value: Any) -> Opened:
    return opened(json.dumps(value).encode())


def refused(data: bytes) -> str:
    """The one line that is said."""
    with pytest.raises(GraphRefused) as caught:
        opened(data)
    assert "\n" not in caught.value.message
    assert len(caught.value.message) < 700
    return caught.value.message


@pytest.mark.parametrize(
    "wrapped",
    [
        GRAPH,
        {"prompt": GRAPH, "client_id": "x"},
        {"prompt": GRAPH, "extra_data": {"extra_pnginfo": {"workflow": UI}}},
        {"input": {"workflow": GRAPH, "images": []}},
        {"output": GRAPH, "workflow": UI},
        {"prompt": [3, "id", GRAPH, {}, ["9"]], "outputs": {}},
        {**GRAPH, "extra_data": {"note": "beside the nodes"}, "version": 1},
    ],
)
def test_api_format_however_it_is_wrapped(wrapped: Any) -> None:
    found = of(wrapped)
    assert (bare(found), found.origin) == (GRAPH, "API format")
    assert found.workflow == (UI if "workflow" in json.dumps(wrapped) and "nodes" in json.dumps(wrapped) else None)


@pytest.mark.parametrize("wrapped", [UI, {"prompt": UI}, {"workflow": UI}, {"input": {"workflow": UI}}])
def test_ui_format_however_it_is_wrapped(wrapped: Any) -> None:
    found = of(wrapped)
    assert (bare(found), found.origin, found.workflow, found.notes) == (GRAPH, "UI format", UI, ())


def test_not_a_number_is_nothing() -> None:
    text = json.dumps({**GRAPH, "3": {**GRAPH["3"], "is_changed": [float("nan")], "x": float("-inf")}})
    assert "NaN" in text
    assert bare(opened(text.encode())) == GRAPH
    assert bare(opened(b"\xef\xbb\xbf" + text.encode())) == GRAPH


def attempt(data: bytes) -> None:
    """It opens, or is refused in one line; nothing else is raised."""
    try:
        made = opened(data).graph
    except GraphRefused as error:
        said = error.message
    else:
        said = json.dumps(made, allow_nan=False)
    assert "\n" not in said


def packed(name: str, value: Any, kind: bytes) -> tuple[bytes, bytes]:
    """A chunk of another kind."""
    text = json.dumps(value).encode()
    if kind == b"zTXt":
        return kind, name.encode() + b"\0\0" + zlib.compress(text)
    return kind, name.encode() + b"\0\1\0en\0\0" + zlib.compress(text)


@pytest.mark.parametrize("kind", [b"tEXt", b"zTXt", b"iTXt"])
def test_a_png_is_what_was_drawn(kind: bytes) -> None:
    chunk = text_chunk if kind == b"tEXt" else lambda name, value: packed(name, value, kind)
    both = opened(png(chunk("workflow", UI), chunk("prompt", GRAPH)))
    assert (bare(both), both.origin, both.workflow) == (GRAPH, "the API format in a picture", UI)
    one = opened(png(chunk("workflow", UI)))
    assert (bare(one), one.origin, one.workflow) == (GRAPH, "the UI format in a picture", UI)


def test_a_picture_of_our_own() -> None:
    drawn = inscribed(png(), texts(graph(), {"extra_pnginfo": {"workflow": UI}}))
    assert (opened(drawn).graph, opened(drawn).workflow) == (graph(), UI)


@pytest.mark.parametrize("form", ["webp", "jpeg", "png"])
@pytest.mark.parametrize("where", ["make and model", "a comment", "a comment in two bytes"])
def test_exif_as_comfyui_and_others_write_it(form: str, where: str) -> None:
    exif = Image.Exif()
    exif[0x0131] = "some program"
    if where == "make and model":
        exif[0x0110], exif[0x010F] = f"prompt:{json.dumps(GRAPH)}", f"workflow:{json.dumps(UI)}"
    elif where == "a comment":
        text = json.dumps({"prompt": GRAPH, "workflow": UI}).encode()
        exif.get_ifd(0x8769)[0x9286] = b"ASCII\0\0\0" + text
    else:
        exif.get_ifd(0x8769)[0x9286] = b"UNICODE\0" + f"Prompt: {json.dumps(GRAPH)}".encode("utf-16")
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, form, exif=exif)
    found = opened(buffer.getvalue())
    assert (bare(found), found.origin) == (GRAPH, "the API format in a picture")
    assert found.workflow == (None if where.endswith("bytes") else UI)


def test_only_so_many_texts_of_a_picture_are_read() -> None:
    bad = (b"zTXt", b"prompt\0\0no zlib")
    assert opened(png(*[bad] * 15, text_chunk("prompt", GRAPH))).graph
    assert "carries none" in refused(png(*[bad] * 16, text_chunk("prompt", GRAPH)))


def test_exif_whose_entries_lie_over_each_other_is_not_read_again_and_again() -> None:
    text = b"prompt:" + json.dumps(GRAPH).encode()
    for before, said in ((0, True), (3, False)):
        start = 10 + 12 * (before + 1)
        entries = [(270, start + 1)] * before + [(271, start)]
        packed = [struct.pack("<HHII", tag, 2, len(text), where) for tag, where in entries]
        exif = b"II*\0" + struct.pack("<IH", 8, len(entries)) + b"".join(packed) + text + b" "
        assert bool(pictured.texts(png((b"eXIf", exif)))) is said


def test_a_prompt_that_cannot_be_read_leaves_the_workflow() -> None:
    found = opened(png((b"tEXt", b"prompt\0{broken"), text_chunk("workflow", UI)))
    assert (bare(found), found.origin) == (GRAPH, "the UI format in a picture")
    assert "'prompt' cannot be read" in found.notes[0]


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "no JSON"),
        (b"\x00\xff" * 50, "no JSON"),
        (b"[" * 1_000_000, "too many values"),
        (b'{"a":' * 300 + b"1" + b"}" * 300, "nested too deeply"),
        (b"[1]", "no workflow"),
        (b'{"a": 1}', "no workflow"),
        (b'{"nodes": []}', "no node that executes"),
        (b'{"nodes": [1, null, {"id": {}}], "links": 7, "definitions": []}', "no node that executes"),
        (b'{"9": {"class_type": "KSampler", "inputs": {"seed": 1e999}}}', "too large"),
        (png(), "carries none"),
        (png((b"tEXt", b"prompt\0" + b"[" * 100_000)), "nested too deeply"),
        (png((b"zTXt", b"prompt\0\0" + b"no zlib")), "carries none"),
        (png((b"zTXt", b"prompt\0\0" + zlib.compress(b" " * (pictured.LONGEST + 2), 9))), "carries none"),
        (png(text_chunk("prompt", GRAPH))[:60], "carries none"),
        (b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 0xFFFFFFFF) + b"tEXtprompt\0{}", "carries none"),
        (b"RIFF\xff\xff\xff\xffWEBPEXIF\xff\xff\xff\xffII*\0\xff\xff\xff\xff", "carries none"),
        (b"\xff\xd8\xff\xe1\x00\x10Exif\0\0MM\0*\0\0\0\x08\xff\xff", "carries none"),
    ],
)
def test_what_has_no_graph_is_one_line(data: bytes, said: str) -> None:
    assert said in refused(data)


def test_placeholders_are_named() -> None:
    text = json.dumps(GRAPH).replace('"seed": 7', '"seed": {{seed}}').replace('"steps": 4', '"steps": ${steps}')
    said = refused(text.encode())
    assert "'{{seed}}', '${steps}' are placeholders of an app's template" in said
    filled = json.loads(json.dumps(GRAPH).replace("a red circle", "{{prompt}}"))
    assert of(filled).notes == (
        "Node 6: text: '{{prompt}}' is a placeholder of an app's template; fill it in before you send the graph.",
    )


PIECES = st.sampled_from([None, 0, -1, 10**300, "", "x", [], {}, [[]], {"name": 1}, True, 1.5, [None] * 3])


def mutated(value: Any, path: list[int], piece: Any) -> Any:
    """`value` with something else at a place inside."""
    if not path or not isinstance(value, dict | list) or not value:
        return piece
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    key = keys[path[0] % len(keys)]
    inner = mutated(value[key], path[1:], piece)
    return {**value, key: inner} if isinstance(value, dict) else [*value[:key], inner, *value[key + 1 :]]


@given(st.lists(st.tuples(st.lists(st.integers(0, 50), min_size=1, max_size=7), PIECES), min_size=1, max_size=4))
@settings(max_examples=300, deadline=None)
def test_a_workflow_with_anything_anywhere_is_converted_or_refused(changes: list[tuple[list[int], Any]]) -> None:
    from test_comfy_ui import with_everything

    found: Any = with_everything()
    for path, piece in changes:
        found = mutated(found, path, piece)
    attempt(json.dumps(found).encode())


@given(st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 255)), max_size=5), st.integers(0, 5000))
@settings(max_examples=200, deadline=None)
def test_a_picture_with_anything_anywhere_is_opened_or_refused(changes: list[tuple[int, int]], end: int) -> None:
    exif = Image.Exif()
    exif[0x0110] = f"prompt:{json.dumps(GRAPH)}"
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "webp", exif=exif)
    for whole in (buffer.getvalue(), png(packed("prompt", GRAPH, b"zTXt"))):
        data = bytearray(whole)
        for place, value in changes:
            data[place % len(data)] = value
        attempt(bytes(data[: max(1, end)]))
