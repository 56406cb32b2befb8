"""What was made on the page stays in reach, whatever the browser, the network or another tab does; and what costs, ends."""

import re

import pytest
from playwright.sync_api import Page, Route, expect
from test_making import advanced, ask, bytes_of, made, pictures

from browsing import Visit
from serving import Served

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
    expect(page.get_by_role("region", name="Your pictures")).to_contain_text("not kept")
    assert bytes_of(page).startswith(PNG)
    ask(page, "and again")
    made(page, "and again")


def test_a_picture_that_is_shown_can_be_downloaded_though_another_tab_deleted_it(
    visit: Visit, server: Served
) -> None:
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


def test_a_key_that_no_header_can_carry_is_refused_in_the_dialog(page: Page, visit: Visit) -> None:
    page.get_by_role("button", name="API key").click()
    page.get_by_label("Key", exact=True).fill("ключ")
    page.get_by_role("button", name="Use this key").click()
    expect(page.get_by_role("dialog")).to_be_visible()
    page.get_by_label("Key", exact=True).fill("key")
    page.get_by_role("button", name="Use this key").click()
    expect(page.get_by_role("dialog")).to_have_count(0)


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


def test_without_a_clipboard_it_is_shown_to_be_selected(visit: Visit, server: Served) -> None:
    page = visit.open(server.url, "Object.defineProperty(navigator, 'clipboard', {value: undefined})")
    ask(page)
    made(page)
    page.get_by_role("button", name="curl").click()
    expect(page.get_by_role("dialog")).to_contain_text("Select it")
    expect(page.get_by_role("dialog").get_by_role("button", name="Copy")).to_have_count(0)


@pytest.mark.parametrize("words", ["a (very:1.4) red circle", "a \\(red\\) circle", "a [red] circle", "(red"])
def test_a_workflow_reads_the_prompt_as_it_was_meant(page: Page, words: str) -> None:
    ask(page, words)
    made(page, words)
    page.get_by_role("button", name="ComfyUI").click()
    text = page.locator("dialog pre").inner_text()
    print(re.findall('"text": .*', text))
