"""What was made on the page stays in reach, whatever browser, network and other tabs do; and what costs, ends."""

import io
import json
from pathlib import Path

import httpx
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from playwright.sync_api import Browser, Page, expect

from browsing import Visit, drop
from comfy_graphs import graph
from handler.model.text.pieces import pieces
from serving import Served, serving
from test_making import advanced, ask, bytes_of, made, pictures

PNG = b"\x89PNG"
STEP = 'event: image_generation.progress\ndata: {"type": "image_generation.progress", "steps": 1, "of": 4}\n\n'


def test_a_picture_is_there_though_the_browser_has_thrown_its_storage_away(page: Page) -> None:
    ask(page, "before")
    made(page, "before")
    devtools = page.context.new_cdp_session(page)
    origin = page.evaluate("location.origin")
    devtools.send("Storage.clearDataForOrigin", {"origin": origin, "storageTypes": "indexeddb"})
    ask(page, "after")
    made(page, "after")
    expect(pictures(page)).to_have_count(1)
    assert bytes_of(page).startswith(PNG)


def test_a_picture_that_the_browser_has_no_room_for_can_be_downloaded(page: Page) -> None:
    devtools = page.context.new_cdp_session(page)
    devtools.send("Storage.overrideQuotaForOrigin", {"origin": page.evaluate("location.origin"), "quotaSize": 1})
    ask(page)
    made(page)
    expect(page.get_by_role("region", name="Your pictures")).to_contain_text("no room to keep the last picture")
    assert bytes_of(page).startswith(PNG)


def test_a_picture_that_is_shown_can_be_downloaded_though_another_tab_deleted_it(visit: Visit, server: Served) -> None:
    one, other = (visit.open(server.url) for _ in range(2))
    ask(one)
    made(one)
    expect(pictures(other)).to_have_count(1)
    other.get_by_role("button", name="Delete all").click()
    other.get_by_role("dialog").get_by_role("button", name="Delete").click()
    expect(pictures(one)).to_have_count(0)
    assert bytes_of(one).startswith(PNG)


def test_all_are_deleted_only_once_that_is_confirmed(page: Page) -> None:
    ask(page)
    made(page)
    page.get_by_role("button", name="Delete all").click()
    page.get_by_role("dialog").get_by_role("button", name="Cancel").click()
    expect(pictures(page)).to_have_count(1)


@pytest.mark.parametrize(
    ("status", "media", "body", "told"),
    [
        (200, "text/event-stream", STEP, "The answer ended before the picture was there."),
        (502, "text/html", "<h1>Bad gateway</h1>", "The worker answered with status 502."),
    ],
)
def test_an_answer_that_a_proxy_cut_is_told_in_words(
    page: Page, visit: Visit, status: int, media: str, body: str, told: str
) -> None:
    ask(page, "before")
    made(page, "before")
    page.route("**/generate", lambda route: route.fulfill(status=status, content_type=media, body=body))
    ask(page)
    expect(page.locator(".ask > .error")).to_contain_text(told)
    made(page, "before")
    visit.faults = [fault for fault in visit.faults if "502" not in fault]


def test_who_looks_away_keeps_no_worker_awake(visit: Visit, server: Served) -> None:
    """A platform lets idle workers go, and each question is one more minute that is paid for."""
    page = visit.open("about:blank")
    page.clock.install()
    visit._origins.add(server.url.partition("://")[2])
    page.goto(f"{server.url}/#worker")
    expect(page.get_by_text("ready to draw")).to_be_visible()
    page.clock.run_for(10 * 60_000)
    page.wait_for_load_state("networkidle")
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.clock.run_for(60 * 60_000)
    page.wait_for_load_state("networkidle")
    assert asked == []
    with page.expect_request("**/v1/status"):
        page.mouse.move(50, 50)


def test_a_key_may_have_any_letters(visit: Visit) -> None:
    with serving({"KINDLING_API_KEYS": "ключ"}) as keyed:
        page = visit.open(keyed.url)
        page.get_by_label("Key", exact=True).fill("ключ")
        page.keyboard.press("Enter")
        ask(page)
        made(page)
    visit.expect("status of 401")


def test_a_number_that_is_none_is_not_taken_for_nothing(page: Page) -> None:
    advanced(page)
    page.get_by_label("Steps", exact=True).press_sequentially("2-")
    ask(page)
    field = page.locator(".field", has=page.get_by_label("Steps", exact=True))
    expect(field.locator(".error")).to_contain_text("number")


def test_a_picture_of_before_gives_its_seed_back(page: Page) -> None:
    advanced(page)
    ask(page, "one")
    made(page, "one")
    first = bytes_of(page)
    ask(page, "two")
    made(page, "two")
    pictures(page).last.get_by_role("button").click()
    made(page, "one")
    page.get_by_role("button", name="Make", exact=True).click()
    expect(pictures(page)).to_have_count(3)
    assert bytes_of(page) == first


def test_without_a_clipboard_it_is_selected(visit: Visit, server: Served) -> None:
    page = visit.open(server.url, "Object.defineProperty(navigator, 'clipboard', {value: undefined})")
    ask(page)
    made(page)
    page.get_by_role("button", name="curl").click()
    page.get_by_role("dialog").get_by_role("button", name="Copy").click()
    assert page.evaluate("getSelection().toString()").startswith("curl -s")


def test_the_keyboard_goes_on_where_it_was(page: Page) -> None:
    """What is taken away or made anew does not take the focus with it."""
    advanced(page)
    page.get_by_label("How many", exact=True).fill("2")
    ask(page)
    made(page)
    second = page.get_by_role("button", name="Picture 2")
    second.press("Enter")
    expect(second).to_be_focused()
    page.get_by_role("button", name="Delete", exact=True).press("Enter")
    expect(page.get_by_label("What should the picture show?")).to_be_focused()


@pytest.mark.parametrize("words", ["a (very:1.4) red circle", "a \\(red\\) circle", "a [red] circle", "(red"])
def test_a_workflow_has_the_prompt_without_weights(page: Page, words: str) -> None:
    ask(page, words)
    made(page, words)
    page.get_by_role("button", name="ComfyUI").click()
    found = json.loads(page.locator("dialog pre").inner_text())
    [piece] = pieces(found["6"]["inputs"]["text"])
    assert (piece.text, piece.weight) == (words, 1)


def test_a_file_fills_no_field_that_is_not_for_it(page: Page) -> None:
    found = {"prompt": "a red circle", "seed": 7, "mode": "max", 'x"]': 1, "key": "x", "loras": [None]}
    info = PngInfo()
    info.add_itxt("kindling", json.dumps(found))
    Image.new("RGB", (8, 8)).save(file := io.BytesIO(), "PNG", pnginfo=info)
    drop(page.locator("body"), file.getvalue(), "picture.png", "image/png")
    expect(page.get_by_label("What should the picture show?")).to_have_value("a red circle")
    assert page.get_by_role("radio").first.input_value() == "auto"


def test_names_of_fields_have_room_on_a_small_telephone(browser: Browser, tmp_path: Path) -> None:
    volume = {"KINDLING_VOLUME": str(tmp_path)}
    with serving(volume) as served, browser.new_context(viewport={"width": 320, "height": 640}) as context:
        httpx.put(f"{served.url}/workflows/a-poster-with-a-long-name-of-many-words", json=graph(side=256))
        page = Visit(context).open(f"{served.url}/#workflows")
        fields = page.locator("#workflows .grow")
        expect(fields).to_contain_text("prompt")
        assert fields.evaluate("field => field.getBoundingClientRect().width") > 200
