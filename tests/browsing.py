"""A real browser, driven as a person would: chromium without a window; and what goes wrong in its pages."""

from __future__ import annotations

import base64
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import pytest

from serving import Served

if TYPE_CHECKING:
    from playwright.sync_api import Browser, BrowserContext, Locator, Page

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")  # the first at a quarter less work
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
QUIET = (  # so that the browser itself asks nobody for anything
    *("--no-sandbox", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update"),
)
PATIENCE_MS = 60_000  # for one thing that is waited for
DROP = """(target, [data, name, type, x, y]) => {
    const bytes = Uint8Array.from(atob(data), c => c.charCodeAt(0))
    const dataTransfer = new DataTransfer()
    dataTransfer.items.add(new File([bytes], name, {type}))
    const box = target.getBoundingClientRect()
    const at = {clientX: box.left + box.width * x, clientY: box.top + box.height * y}
    const options = {dataTransfer, bubbles: true, cancelable: true, ...at}
    for (const kind of ['dragenter', 'dragover', 'drop']) target.dispatchEvent(new DragEvent(kind, options))
}"""


@contextmanager
def chromium() -> Iterator[Browser]:
    """The browser. Skips where it is not installed.

    While it runs, the calling thread has an event loop of Playwright's, and can have no other.
    """
    if CHROMIUM is None:
        pytest.skip("it needs chromium, which is not installed here: apt install chromium-headless-shell")
    from playwright.sync_api import expect, sync_playwright  # late: most tests need none

    expect.set_options(timeout=PATIENCE_MS)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=[*QUIET])
        yield browser
        browser.close()


class Visit:
    """A person's windows, and the `faults` in them: errors on the console and in scripts, and requests that go astray.

    A page may ask only servers that were opened.
    """

    def __init__(self, context: BrowserContext) -> None:
        self.context, self.faults, self._origins = context, list[str](), set[str]()
        context.set_default_timeout(PATIENCE_MS)
        context.on("console", lambda said: self.faults.append(said.text) if said.type == "error" else None)
        context.on("weberror", lambda error: self.faults.append(str(error.error)))
        context.on("request", lambda request: self._look(request.url))
        context.on("page", lambda page: page.on("websocket", lambda socket: self._look(socket.url)))

    def open(self, url: str, script: str = "") -> Page:
        """A new window at `url`; `script` runs in it before the page's own."""
        self._origins.add(urlsplit(url).netloc)
        page = self.context.new_page()
        if script:
            page.add_init_script(script)
        page.goto(url)
        return page

    def expect(self, *words: str) -> None:
        """Take back faults that were meant: for each of `words` at least one that has it."""
        for word in words:
            assert any(word in fault for fault in self.faults), (word, self.faults)
        self.faults = [fault for fault in self.faults if not any(word in fault for word in words)]

    def _look(self, url: str) -> None:
        asked = urlsplit(url.removeprefix("blob:"))
        if asked.scheme != "data" and asked.netloc not in self._origins:
            self.faults.append(f"asked {url}")


def drop(target: Locator, data: bytes, name: str, media: str, x: float = 0.5, y: float = 0.5) -> None:
    """A file onto an element, at this part of its width and height."""
    target.evaluate(DROP, [base64.b64encode(data).decode(), name, media, x, y])


@pytest.fixture(scope="module")  # no longer: other tests have event loops of their own
def browser() -> Iterator[Browser]:
    """Skips where there is none."""
    with chromium() as browser:
        yield browser


@pytest.fixture
def visit(browser: Browser) -> Iterator[Visit]:
    """Of somebody who was never here. That nothing went wrong, is asserted in the end."""
    with browser.new_context() as context:
        found = Visit(context)
        yield found
        assert found.faults == []


@pytest.fixture
def page(visit: Visit, server: Served) -> Page:
    """The playground, before a server without keys that all tests share."""
    return visit.open(f"{server.url}/")
