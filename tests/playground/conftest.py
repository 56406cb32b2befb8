"""Fixtures: a browser, a person's visit in it, and the page of a server with spark."""

from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, Page

from browsing import Visit, chromium
from serving import Served


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
