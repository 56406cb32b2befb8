"""Files dropped onto the page, or chosen: each goes where it belongs, and what is no good is told in one sentence."""

import io
import json
import struct
import zlib

import httpx
import pytest
from PIL import Image
from playwright.sync_api import Page, expect

from browsing import Visit, drop
from comfy_graphs import graph
from handler.api.codec import PNG_SIGNATURE
from serving import Served

DRAGGED = """(body, kind) => {
    const dataTransfer = new DataTransfer()
    dataTransfer.items.add(new File(['x'], 'x.png', {type: 'image/png'}))
    body.dispatchEvent(new DragEvent(kind, {dataTransfer, bubbles: true, cancelable: true}))
}"""


def drawn(server: Served, **fields: object) -> bytes:
    """A picture of Kindling's."""
    answer = httpx.post(f"{server.url}/generate", json=fields, headers={"accept": "image/png"}, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.content


def plain(side: int = 256) -> bytes:
    Image.new("RGB", (side, side), "navy").save(file := io.BytesIO(), "PNG")
    return file.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def after_head(data: bytes, more: bytes) -> bytes:
    """A PNG with `more` behind its first chunk."""
    at = len(PNG_SIGNATURE) + 25
    return data[:at] + more + data[at:]


def ready(page: Page) -> None:
    """The form knows its model."""
    expect(page.get_by_role("radio", name="Realtime")).to_be_attached()


def test_a_picture_of_kindlings_brings_its_settings(page: Page, server: Served) -> None:
    ready(page)
    made = drawn(server, prompt="two <b>green</b> stars", seed=11, num_inference_steps=3, width=320, height=192)
    drop(page.locator("body"), made, "stars.png", "image/png")
    expect(page.locator("[name=prompt]")).to_have_value("two <b>green</b> stars")
    expect(page.locator("[name=seed]")).to_have_value("11")
    expect(page.locator("[name=num_inference_steps]")).to_have_value("3")
    expect(page.locator("[name=width]")).to_have_value("320")
    expect(page.locator("[name=height]")).to_have_value("192")


def test_one_that_also_has_a_graph_brings_settings_but_where_workflows_are(page: Page, server: Served) -> None:
    ready(page)
    made = graph(text="both", side=64)
    text = b"prompt\0" + json.dumps(made).encode()
    both = after_head(drawn(server, prompt="both", seed=3, width=64, height=64), chunk(b"tEXt", text))
    drop(page.locator("body"), both, "both.png", "image/png")
    expect(page.locator("[name=prompt]")).to_have_value("both")
    page.get_by_role("link", name="Workflows").click()
    expect(page.get_by_text("Kept here")).to_be_visible()
    drop(page.locator("body"), both, "both.png", "image/png")
    expect(page.locator(".desk h2")).to_have_text("both.png")


@pytest.mark.parametrize("how", ["dropped", "chosen"])
def test_any_other_picture_is_to_be_edited(page: Page, how: str) -> None:
    ready(page)
    if how == "dropped":
        drop(page.locator("body"), plain(), "sea.png", "image/png")
    else:
        with page.expect_file_chooser() as chooser:
            page.get_by_role("button", name="Open a file").click()
        chooser.value.set_files([{"name": "sea.png", "mimeType": "image/png", "buffer": plain()}])
    expect(page.get_by_alt_text("sea.png")).to_be_visible()


def test_a_workflow_goes_to_its_tab(page: Page) -> None:
    ready(page)
    drop(page.locator("body"), json.dumps(graph()).encode(), "circle.json", "application/json")
    expect(page.locator(".desk h2")).to_have_text("circle.json")
    assert page.url.endswith("#workflows")


def test_the_window_says_that_it_takes_files(page: Page) -> None:
    ready(page)
    hint = page.get_by_text("Drop it here")
    body = page.locator("body")
    expect(hint).to_be_hidden()
    body.evaluate(DRAGGED, "dragenter")
    expect(hint).to_be_visible()
    body.evaluate(DRAGGED, "dragleave")
    expect(hint).to_be_hidden()


DEEP = b"[" * 200_000 + b"]" * 200_000
BROKEN = {
    "damaged.png": (after_head(plain(), struct.pack(">I", 0xFFFFFFFF) + b"iTXt")[:200], "neither a picture"),
    "bare.png": (PNG_SIGNATURE, "neither a picture"),
    "huge.png": (
        PNG_SIGNATURE + chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)),
        "has 3600 million pixels",
    ),
    "empty.png": (b"", "is empty"),
    "page.html": (b"<script>alert(1)</script>", "neither a picture"),
    "deep.json": (DEEP, "no JSON"),
    "wide.json": (b'{"a":' * 5000 + b"1" + b"}" * 5000, "no JSON"),
    "other.json": (b'{"a": 1}', "no workflow"),
    "torn.json": (b'{"3": {"class_type": "KSam', "no JSON"),
    "large.json": (b'{"a": "' + b"x" * 50_000_000 + b'"}', "larger than the 50 MB"),
    "large.png": (b"\0" * 65_000_000, "larger than 64 MB"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_no_good_ends_in_one_sentence(page: Page, visit: Visit, name: str) -> None:
    ready(page)
    data, told = BROKEN[name]
    media = "application/json" if name.endswith("json") else "image/png"
    if len(data) < 1_000_000:
        drop(page.locator("body"), data, name, media)
    else:
        page.evaluate(BIG, [name, media, len(data), name.endswith("json")])
    error = page.locator(".error:visible")
    expect(error).to_have_count(1)
    expect(error).to_contain_text(told)
    assert "\n" not in (error.text_content() or "")
    if name.endswith("json") and len(data) < 1_000_000:
        visit.expect("400")
    drop(page.locator("body"), plain(), "sea.png", "image/png")  # the page goes on
    expect(page.get_by_alt_text("sea.png")).to_be_visible()


BIG = """([name, type, size, json]) => {
    const data = new Uint8Array(size).fill(json ? 32 : 0)
    if (json) data[0] = 123
    const dataTransfer = new DataTransfer()
    dataTransfer.items.add(new File([data], name, {type}))
    document.body.dispatchEvent(new DragEvent('drop', {dataTransfer, bubbles: true, cancelable: true}))
}"""


@pytest.mark.parametrize(
    "said",
    [b"not JSON", b"[]", b'{"prompt": {"a": 1}, "seed": 1}', b'{"prompt": "x"}', b"\xff\xfe", b'"' + b"x" * 2_000_000],
    ids=["no JSON", "a list", "no text", "no seed", "no UTF-8", "long"],
)
def test_parameters_that_are_none_leave_a_picture(page: Page, said: bytes) -> None:
    ready(page)
    data = after_head(plain(), chunk(b"iTXt", b"kindling\0\0\0\0\0" + said))
    drop(page.locator("body"), data, "odd.png", "image/png")
    expect(page.get_by_alt_text("odd.png")).to_be_visible()
    assert page.locator(".error").count() == 0
