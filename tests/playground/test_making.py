"""Pictures made on the page: as they form, in the end, when something goes wrong, and kept."""

import base64
import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import Browser, Locator, Page, expect
from test_faults import Faulty, faulty

from browsing import PATIENCE_MS, Visit
from serving import Served, serving

PROMPT = "a red circle on a blue background"
MARKUP = "<img src=x onerror=\"document.title='run'\"> & <b>a red circle</b>"
KEY = "canary-key-0451"
DENIED = "Object.defineProperty(window, 'indexedDB', {get() { throw new DOMException('denied', 'SecurityError') }})"
expect.set_options(timeout=PATIENCE_MS)


@pytest.fixture(scope="module")
def slow() -> Iterator[Faulty]:
    """A worker whose pictures wait for a word."""
    with faulty() as started:
        yield started


@pytest.fixture
def held(visit: Visit, slow: Faulty) -> Page:
    return visit.open(slow.url)


def ask(page: Page, prompt: str = PROMPT) -> None:
    page.get_by_label("What should the picture show?").fill(prompt)
    page.get_by_role("button", name="Make", exact=True).click()


def made(page: Page, prompt: str = PROMPT) -> Locator:
    """The picture of this prompt, once it is there."""
    expect(page.locator(".caption")).to_have_text(prompt)
    return page.locator(".well img")


def bytes_of(page: Page) -> bytes:
    """The file of the picture that is shown."""
    with page.expect_download() as download:
        page.get_by_role("link", name="Download").click()
    return Path(download.value.path()).read_bytes()


def fact(page: Page, name: str) -> str:
    return page.locator(".facts div", has_text=name).locator("dd").inner_text()


def advanced(page: Page) -> None:
    page.get_by_text("Advanced").click()


def pictures(page: Page) -> Locator:
    return page.get_by_role("region", name="Your pictures").get_by_role("listitem")


def test_a_picture_is_made_by_keyboard_and_told_of(page: Page) -> None:
    prompt = page.get_by_label("What should the picture show?")
    prompt.fill(PROMPT)
    prompt.press("Control+Enter")
    image = made(page)
    assert image.evaluate("image => [image.naturalWidth, image.naturalHeight]") == [256, 256]
    assert image.get_attribute("alt") == PROMPT
    assert re.fullmatch(r"\d+(\.\d+)? s", fact(page, "Time"))
    assert (fact(page, "Size"), fact(page, "Steps"), fact(page, "Model")) == ("256 × 256", "4", "spark")
    assert 0 <= int(fact(page, "Seed")) < 2**31
    expect(page.get_by_role("status")).to_contain_text("Done after")


def test_words_that_spark_does_not_know_are_named_also_later(page: Page) -> None:
    ask(page, "a <b>cat</b> in a hat")
    made(page, "a <b>cat</b> in a hat")
    note = page.get_by_text("The model does not know: b, cat, hat. It draws shapes")
    expect(note).to_be_visible()
    ask(page)
    made(page)
    expect(note).to_have_count(0)
    page.reload()
    pictures(page).last.get_by_role("button").click()
    expect(note).to_be_visible()


def test_an_example_is_one_click(page: Page) -> None:
    example = page.locator(".empty button").first
    text = example.inner_text()
    example.click()
    made(page, text)


def test_the_mode_says_how_many_steps(page: Page) -> None:
    page.get_by_role("radio", name=re.compile("Quality")).check()
    ask(page)
    made(page)
    assert fact(page, "Steps") == "8"


def test_a_picture_appears_as_it_forms(held: Page, slow: Faulty) -> None:
    ask(held, "hold one")
    slow.wait_for("^holding")
    expect(held.locator(".stage .state")).to_have_text("Step 1 of 4")
    expect(held.locator(".well img.forming")).to_be_visible()
    expect(held.get_by_role("progressbar")).to_have_attribute("value", "0.25")
    slow.release()
    made(held, "hold one")
    expect(held.locator(".forming")).to_have_count(0)
    expect(held.get_by_role("progressbar")).to_be_hidden()


def test_who_waits_sees_how_many_are_before_them(held: Page, slow: Faulty) -> None:
    first = slow.hold("hold first")
    ask(held, "second")
    expect(held.locator(".stage .state")).to_have_text("Waiting: 1 request is before yours.")
    slow.release()
    made(held, "second")
    assert first.result().status_code == 200


def test_cancelled_it_is_not_drawn_further_and_the_picture_before_is_shown(held: Page, slow: Faulty) -> None:
    ask(held, "before")
    made(held, "before")
    cancelled = slow.count("cancelled_total", where="denoise")
    ask(held, "hold this")
    slow.wait_for("^holding")
    expect(held.locator(".stage .state")).to_have_text("Step 1 of 4")
    held.get_by_role("button", name="Cancel").click()
    expect(held.locator(".stage .state")).to_have_text("Cancelled.")
    made(held, "before")
    slow.until(lambda state: state["drawing"] == 0)
    slow.release()
    assert slow.steps("hold this") == 2
    assert slow.count("cancelled_total", where="denoise") == cancelled + 1
    ask(held, "after")
    made(held, "after")


@pytest.mark.parametrize(
    ("label", "value", "words"),
    [
        ("Steps", "40", "num_inference_steps: spark takes at most 8, got 40."),
        ("Seed", "-7", "seed"),
        ("Seed", "seven", "seed"),
        ("How many", "9", "n: this worker draws at most 4 pictures for a request."),
    ],
)
def test_an_error_stands_beside_its_field(page: Page, visit: Visit, label: str, value: str, words: str) -> None:
    advanced(page)
    box = page.get_by_label(label, exact=True)
    box.fill(value)
    advanced(page)
    ask(page)
    wrong = page.locator(".field", has=box).locator(".error")
    expect(wrong).to_contain_text(words)
    expect(box).to_be_focused()
    expect(box).to_have_attribute("aria-invalid", "true")
    expect(page.get_by_role("status")).to_contain_text(words)
    visit.expect("status of 4")
    box.fill("")
    ask(page)
    made(page)
    expect(page.locator(".error")).to_have_count(0)


def test_a_size_that_cannot_be_is_told_where_it_was_typed(page: Page, visit: Visit) -> None:
    advanced(page)
    page.get_by_label("Size", exact=True).select_option("Your own")
    page.get_by_label("Width", exact=True).fill("17")
    ask(page)
    expect(page.locator(".field", has=page.get_by_label("Width", exact=True)).locator(".error")).to_contain_text(
        "width"
    )
    visit.expect("status of 422")
    page.get_by_label("Size", exact=True).select_option(label="Landscape, 288 × 224")
    ask(page)
    made(page)
    assert fact(page, "Size") == "288 × 224"


def test_an_error_that_names_no_field_stands_on_top(held: Page, slow: Faulty) -> None:
    ask(held, "bug")
    top = held.locator(".ask > .error")
    expect(top).to_contain_text("The worker failed on this request; see its log.")
    expect(top).to_be_focused()
    ask(held, "after")
    made(held, "after")


def test_what_the_model_does_not_honour_is_off_and_says_why(page: Page, server: Served) -> None:
    advanced(page)
    told = httpx.get(f"{server.url}/v1/models/spark").json()["fields"]
    for label, name in {"Guidance": "guidance_scale", "Leave out": "negative_prompt"}.items():
        box = page.get_by_label(label, exact=True)
        expect(box).to_be_disabled()
        expect(page.locator(".field", has=box).locator(".hint")).to_have_text(told[name]["refused"])
    for label in ("Steps", "Seed", "How many", "File", "Scheduler", "Size"):
        expect(page.get_by_label(label, exact=True)).to_be_enabled()


def test_a_seed_is_kept_until_it_is_let_go(page: Page) -> None:
    advanced(page)
    page.get_by_role("button", name="A new random seed").click()
    seed = page.get_by_label("Seed", exact=True).input_value()
    ask(page)
    made(page)
    first = bytes_of(page)
    assert fact(page, "Seed") == seed
    page.get_by_role("button", name="Delete", exact=True).click()
    ask(page)
    made(page)
    assert bytes_of(page) == first
    page.get_by_role("button", name="Keep").click()
    ask(page)
    expect(page.locator(".facts div", has_text="Seed").locator("dd")).not_to_have_text(seed)


def test_several_are_shown_one_by_one(page: Page) -> None:
    advanced(page)
    page.get_by_label("How many", exact=True).fill("3")
    page.get_by_label("Seed", exact=True).fill("7")
    ask(page)
    made(page)
    for number, seed in ((1, "7"), (2, "8"), (3, "9")):
        page.get_by_role("button", name=f"Picture {number}").click()
        assert fact(page, "Seed") == seed
    expect(pictures(page)).to_have_count(3)


def test_a_prompt_with_markup_is_text(page: Page) -> None:
    ask(page, MARKUP)
    assert made(page, MARKUP).get_attribute("alt") == MARKUP
    page.get_by_role("button", name="curl").click()
    expect(page.locator("dialog pre")).to_contain_text("onerror")
    assert page.locator("img[src=x]").count() == 0
    assert page.title() != "run"


def test_pictures_stay_when_the_page_is_loaded_again_and_give_their_settings_back(page: Page) -> None:
    advanced(page)
    page.get_by_label("Steps", exact=True).fill("2")
    page.get_by_label("File", exact=True).select_option("webp")
    ask(page)
    made(page)
    seed, data = fact(page, "Seed"), bytes_of(page)
    page.get_by_label("Steps", exact=True).fill("3")
    ask(page, "a green square")
    made(page, "a green square")
    expect(pictures(page)).to_have_count(2)  # which are those that are kept
    page.reload()
    expect(pictures(page)).to_have_count(2)
    expect(page.get_by_role("radio").first).to_be_visible()
    pictures(page).last.get_by_role("button").click()
    made(page)
    assert bytes_of(page) == data
    expect(page.get_by_label("What should the picture show?")).to_have_value(PROMPT)
    advanced(page)
    expect(page.get_by_label("Steps", exact=True)).to_have_value("2")
    expect(page.get_by_label("File", exact=True)).to_have_value("webp")
    page.get_by_label("Seed", exact=True).fill(seed)
    ask(page)
    expect(pictures(page)).to_have_count(3)
    assert bytes_of(page) == data
    page.get_by_role("button", name="Delete", exact=True).click()
    expect(pictures(page)).to_have_count(2)
    page.get_by_role("button", name="Delete all").click()
    page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    expect(pictures(page)).to_have_count(0)
    page.reload()
    expect(page.get_by_role("radio").first).to_be_visible()
    expect(pictures(page)).to_have_count(0)


def test_where_the_browser_keeps_nothing_pictures_stay_until_the_tab_is_closed(visit: Visit, server: Served) -> None:
    page = visit.open(server.url, DENIED)
    ask(page)
    made(page)
    expect(pictures(page)).to_have_count(1)
    expect(page.get_by_role("region", name="Your pictures")).to_contain_text("This browser keeps nothing")


def test_two_tabs_make_pictures_at_once_and_share_them(visit: Visit, server: Served) -> None:
    one, other = (visit.open(server.url) for _ in range(2))
    ask(one, "a red circle")
    ask(other, "a green square")
    made(one, "a red circle")
    made(other, "a green square")
    for page in (one, other):
        expect(pictures(page)).to_have_count(2)


def test_an_edit_is_of_the_picture_that_was_chosen(page: Page) -> None:
    ask(page)
    made(page)
    page.get_by_role("button", name="Edit").click()
    page.get_by_label("How much", exact=True).fill("0.3")
    ask(page, "a red circle on a green background")
    made(page, "a red circle on a green background")
    page.get_by_role("button", name="curl").click()
    text = page.locator("dialog pre").inner_text()
    assert "/v1/images/edits" in text
    assert "'strength=0.3'" in text
    page.get_by_role("button", name="Close").click()
    page.get_by_role("button", name="Remove").click()
    ask(page)
    made(page)
    page.get_by_role("button", name="curl").click()
    expect(page.locator("dialog pre")).to_contain_text("/v1/images/generations")


@pytest.fixture(scope="module")
def keyed() -> Iterator[Served]:
    with serving({"KINDLING_API_KEYS": KEY}) as served:
        yield served


def test_a_key_is_asked_for_once_and_kept_for_the_tab(visit: Visit, keyed: Served) -> None:
    page = visit.open(keyed.url)
    dialog = page.get_by_role("dialog", name="API key")
    for key, told in (("wrong", "This worker answers only"), (KEY, "did not take that key")):
        expect(dialog).to_contain_text(told)
        dialog.get_by_label("Key").fill(key)
        dialog.get_by_role("button", name="Use this key").click()
    ask(page)
    made(page)
    page.get_by_role("button", name="Python").click()
    assert KEY not in page.content()  # though it is in a request that is copied
    page.reload()
    ask(page)
    made(page)
    expect(dialog).to_have_count(0)
    other = visit.open(keyed.url)
    expect(other.get_by_role("dialog", name="API key")).to_be_visible()
    expect(other.locator("form.ask")).to_be_attached()  # which has asked, too
    other.keyboard.press("Escape")
    expect(other.locator(".error")).to_contain_text("Send a valid key")
    other.get_by_role("button", name="API key").click()
    other.get_by_label("Key", exact=True).fill(KEY)
    other.keyboard.press("Enter")
    ask(other)
    made(other)
    visit.expect("status of 401")


def test_a_worker_that_is_gone_is_told_in_words(visit: Visit) -> None:
    with serving() as served:
        page = visit.open(served.url)
        expect(page.get_by_role("radio").first).to_be_visible()
    ask(page)
    expect(page.locator(".ask > .error")).to_contain_text("The worker does not answer.")
    visit.expect("ERR_CONNECTION_REFUSED")


def test_while_the_worker_starts_a_picture_waits_for_it(visit: Visit) -> None:
    with faulty(ready=False, FAULTY_BOOT="hold") as starting:
        page = visit.open(starting.url)
        expect(page.get_by_role("radio").first).to_be_visible()
        ask(page)
        expect(page.locator(".stage .state")).to_contain_text("The worker is loading its model.")
        starting.wait_for("^holding")
        starting.release()
        made(page)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_small_telephone(browser: Browser, server: Served, scheme: str) -> None:
    with browser.new_context(viewport={"width": 320, "height": 640}, color_scheme=scheme) as context:
        visit = Visit(context)
        page = visit.open(server.url)
        expect(page.get_by_role("radio").first).to_be_visible()
        advanced(page)
        ask(page)
        made(page)
        assert page.evaluate("() => document.documentElement.scrollWidth") == 320
        assert visit.faults == []


def test_a_picture_is_what_the_api_answers(page: Page, server: Served) -> None:
    """Bit for bit, for the page sends what anybody may send."""
    advanced(page)
    page.get_by_label("Seed", exact=True).fill("7")
    ask(page)
    made(page)
    fields = {"prompt": PROMPT, "seed": 7}
    [picture] = httpx.post(f"{server.url}/v1/images/generations", json=fields, timeout=60).json()["data"]
    assert bytes_of(page) == base64.b64decode(picture["b64_json"])
