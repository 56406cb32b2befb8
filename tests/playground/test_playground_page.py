"""The page as a whole: what it weighs, that it is accessible, narrow and dark, that it needs nobody else, and what it
may do."""

import json
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, expect

from browsing import Visit, drop
from comfy_graphs import graph
from handler import Clock, Engine, Settings, Worker, create_app
from handler.core.errors import StartError
from handler.server.playground.page import assets
from serving import Served, live, serving

LIGHT = 100_000  # bytes
TABS = ("Make", "Workflows", "Worker", "Deploy")
WIDE, NARROW = {"width": 1280, "height": 900}, {"width": 320, "height": 640}
KEY = "canary-key-0451"
SETTLED = "() => !document.getAnimations().length && document.querySelector('section:not([hidden])').children.length"


def show(page: Page, name: str) -> None:
    """A tab, and wait until it is there."""
    page.get_by_role("navigation").get_by_role("link", name=name).click()
    expect(page.locator("main > section:visible")).to_have_attribute("id", name.lower())
    page.wait_for_function(SETTLED)


def faults(page: Page) -> list[Any]:
    """What axe finds, and where."""
    return [(rule["id"], rule["nodes"]) for rule in Axe().run(page).response["violations"]]


def test_it_weighs_little() -> None:
    """All tabs of it, before they are packed."""
    assert 0 < sum(len(asset.data) for asset in assets().values()) < LIGHT


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [WIDE, NARROW], ids=["wide", "narrow"])
def test_axe_finds_nothing(browser: Browser, server: Served, scheme: Any, size: Any) -> None:
    with browser.new_context(color_scheme=scheme, viewport=size, reduced_motion="reduce") as context:
        visit = Visit(context)
        page = visit.open(f"{server.url}/")
        found = {}
        for name in TABS:
            show(page, name)
            found[name] = faults(page)
        assert found == {name: [] for name in TABS}
        assert visit.faults == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nor_once_something_was_done(browser: Browser, server: Served, scheme: Any) -> None:
    """A picture is made, edited and kept; a file is explained; a tip is read; a key is asked for."""
    with browser.new_context(color_scheme=scheme, viewport=WIDE, reduced_motion="reduce") as context:
        page = Visit(context).open(f"{server.url}/")
        found = {}
        page.get_by_role("button", name="a red circle").click()
        page.get_by_text("Advanced").click()
        expect(page.locator(".gallery img")).to_have_count(1)
        found["picture"] = faults(page)
        page.get_by_role("button", name="Edit", exact=True).click()
        page.get_by_role("button", name="Mark where to change it").click()
        expect(page.get_by_role("img", name="The picture;")).to_be_visible()
        found["mask"] = faults(page)
        drop(page.locator("body"), json.dumps(graph()).encode(), "circle.json", "application/json")
        expect(page.locator(".desk h2")).to_have_text("circle.json")
        found["workflow"] = faults(page)
        show(page, "Worker")
        page.locator(".chips button").first.focus()
        found["tip"] = faults(page)
        page.get_by_role("button", name="API key").click()
        found["key"] = faults(page)
        assert found == {name: [] for name in found}


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nor_where_a_worker_starts_or_has_failed(browser: Browser, scheme: Any) -> None:
    def boot(settings: Settings, clock: Clock) -> Worker:
        assert go.wait(60)
        raise StartError("The model is damaged.")

    go, found = threading.Event(), []
    engine = Engine(Settings(model="flux-dev"), Clock.anew(240), boot)
    calm = browser.new_context(color_scheme=scheme, reduced_motion="reduce")
    with live(create_app(engine, public=False)) as url, calm as context:
        page = Visit(context).open(f"{url}/#worker")
        for told in ("The worker is starting", "The worker has failed: The model is damaged."):
            expect(page.locator("#banner")).to_contain_text(told)
            expect(page.locator("#banner")).to_contain_text("Non-commercial use only")
            page.wait_for_function(SETTLED)
            found += faults(page)
            go.set()
    assert found == []


def test_nothing_is_wider_than_a_small_phone(page: Page) -> None:
    page.set_viewport_size(NARROW)
    for name in TABS:
        show(page, name)
        width = page.evaluate("() => document.documentElement.scrollWidth")
        assert width == 320, name


def test_it_follows_the_colours_of_the_system(page: Page) -> None:
    def paper() -> str:
        return str(page.evaluate("() => getComputedStyle(document.body).backgroundColor"))

    page.emulate_media(color_scheme="light")
    light = paper()
    page.emulate_media(color_scheme="dark")
    assert paper() != light


def test_the_keyboard_reaches_everything_and_shows_where_it_is(page: Page) -> None:
    page.wait_for_function(SETTLED)
    page.keyboard.press("Tab")
    expect(page.locator(".skip")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator("#main")).to_be_focused()
    page.reload()
    for name in ("Skip to the page", "Kindling", *TABS):
        page.keyboard.press("Tab")
        expect(page.get_by_role("link", name=name)).to_be_focused()
        outline = page.evaluate("() => getComputedStyle(document.activeElement).outlineStyle")
        assert outline != "none", name
    page.keyboard.press("Enter")
    expect(page.locator("#deploy")).to_be_visible()


def test_a_link_to_a_tab_opens_it_and_so_does_going_back(visit: Visit, server: Served) -> None:
    page = visit.open(f"{server.url}/#worker")
    expect(page.get_by_role("link", name="Worker")).to_have_attribute("aria-current", "page")
    expect(page).to_have_title("Worker · Kindling")
    show(page, "Deploy")
    page.go_back()
    expect(page.locator("#worker")).to_be_visible()
    page.reload()
    expect(page.locator("#worker")).to_be_visible()


def test_it_runs_no_script_but_its_files_and_asks_nobody_else(visit: Visit, page: Page) -> None:
    """Whatever finds its way into the page."""
    page.evaluate(
        """() => {
            const script = document.createElement('script')
            script.textContent = 'window.ran = true'
            document.body.append(script)
            const image = new Image()
            image.src = 'http://127.0.0.2:9/x.png'
            document.body.append(image)
            document.body.insertAdjacentHTML('beforeend', '<p style="color: red" onclick="window.ran = true">x</p>')
        }"""
    )
    page.get_by_text("x", exact=True).click()
    assert page.evaluate("() => window.ran") is None
    visit.expect("script-src", "img-src", "style-src")
    visit.faults = [fault for fault in visit.faults if "127.0.0.2" not in fault]


def test_once_there_it_outlives_its_server(visit: Visit) -> None:
    with serving() as server:
        page = visit.open(f"{server.url}/")
        for name in TABS:
            show(page, name)
    for name in TABS:
        show(page, name)
    expect(page.locator("#banner")).to_contain_text("The worker does not answer.")
    visit.faults = [fault for fault in visit.faults if "ERR_CONNECTION_REFUSED" not in fault]


@pytest.fixture(scope="module")
def keyed() -> Iterator[Served]:
    with serving({"KINDLING_API_KEYS": KEY}) as served:
        yield served


def test_a_key_is_kept_for_the_tab_alone(visit: Visit, keyed: Served) -> None:
    page = visit.open(f"{keyed.url}/#worker")
    page.get_by_role("dialog").get_by_role("textbox").fill(KEY)
    page.keyboard.press("Enter")
    expect(page.locator("#worker")).to_contain_text("ready to draw")
    page.reload()
    expect(page.locator("#worker")).to_contain_text("ready to draw")
    assert KEY not in str(page.evaluate("() => [{...localStorage}, document.cookie, location.href]"))
    visit.expect("status of 401")


def test_who_is_no_admin_makes_pictures_and_is_told_what_is_for_admins(visit: Visit) -> None:
    with serving({"KINDLING_API_KEYS": KEY, "KINDLING_ADMIN_KEYS": f"{KEY}-of-an-admin"}) as served:
        page = visit.open(served.url)
        dialog, worker = page.get_by_role("dialog"), page.locator("#worker")
        dialog.get_by_role("textbox").fill(KEY)
        page.keyboard.press("Enter")
        expect(dialog).to_have_count(0)
        page.get_by_label("What should the picture show?").fill("a red circle")
        page.get_by_role("button", name="Make", exact=True).click()
        expect(page.get_by_role("button", name="Copy as").or_(page.get_by_text("Copy as")).first).to_be_visible()
        show(page, "Worker")
        expect(worker).to_contain_text("this one wants one of KINDLING_ADMIN_KEYS")
        page.get_by_role("button", name="API key").click()
        dialog.get_by_role("textbox").fill(f"{KEY}-of-an-admin")
        page.keyboard.press("Enter")
        expect(worker).to_contain_text("ready to draw")
    visit.expect("status of 401", "status of 403")


@pytest.mark.parametrize("name", TABS)
def test_who_has_no_key_is_asked_once_and_may_give_it_later(visit: Visit, keyed: Served, name: str) -> None:
    page = visit.open(f"{keyed.url}/#{name.lower()}")
    section, dialog = page.locator(f"#{name.lower()}"), page.get_by_role("dialog")
    dialog.get_by_role("button", name="Cancel").click()
    if name != "Worker":
        expect(section.locator(".error")).to_have_text("Send a valid key as 'Authorization: Bearer KEY'.")
    expect(dialog).to_have_count(0)
    page.get_by_role("button", name="API key").click()
    dialog.get_by_role("textbox").fill(KEY)
    page.keyboard.press("Enter")
    expect(page.locator("#banner")).to_contain_text("MIT License")
    expect(section.locator(".error")).to_have_count(0)
    visit.expect("status of 401")
