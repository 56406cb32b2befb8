"""The playground in a browser: how soon it is seen, in milliseconds, and what it weighs; and pictures of it.

A server with spark on loopback, and chromium without a window, both on this machine. A first visit has nothing of the
page; a second one has its files, and asks whether they are new. Times count from the navigation's start.

    python benchmarks/playground.py --save        writes benchmarks/results/playground.json
    python benchmarks/playground.py --pictures    writes benchmarks/results/playground.webp, and playground-dark.webp
"""

import argparse
import contextlib
import io
import shutil
import statistics
from collections.abc import Iterator
from typing import Any

from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

import report
from serving import started

QUIET = ("--no-sandbox", "--disable-quic", "--disable-background-networking", "--disable-component-update")
FORM = "() => document.querySelector('#make form') && performance.now()"
TOLD = """() => {
    const paints = Object.fromEntries(performance.getEntriesByType('paint').map(each => [each.name, each.startTime]))
    const files = [...performance.getEntriesByType('navigation'), ...performance.getEntriesByType('resource')]
        .filter(each => each.entryType === 'navigation' || each.name.includes('/playground/'))
    const sum = name => files.reduce((all, each) => all + each[name], 0)
    return {
        first_paint_ms: paints['first-paint'], first_contentful_paint_ms: paints['first-contentful-paint'],
        files: files.length, sent_bytes: sum('transferSize'), unpacked_bytes: sum('decodedBodySize'),
    }
}"""
PROMPTS = (
    "a large pink heart on a white background",
    "four cyan squares on a black background",
    "a nice violet diamond on the right, yellow background",
    "three yellow stars on a purple background",
)
SIZE = {"width": 1180, "height": 800}


def main() -> None:
    """Measure, or draw; print one JSON line of what was measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20, help="visits of each kind (default: 20)")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/playground.json")
    parser.add_argument("--pictures", action="store_true", help="write the README's pictures instead")
    options = parser.parse_args()
    with started(timeout=60) as server, chromium() as browser:
        if options.pictures:
            for name, scheme in (("playground", "light"), ("playground-dark", "dark")):
                draw(browser, server.address, name, scheme)
            return
        with report.measuring("playground", options.save) as figures:
            figures |= {"rounds": options.rounds, "chromium": browser.version}
            for kind, again in (("first visit", False), ("second visit", True)):
                figures[kind] = medians([visit(browser, server.address, again) for _ in range(options.rounds)])
                print(f"{kind:<13} {figures[kind]}")


@contextlib.contextmanager
def chromium() -> Iterator[Browser]:
    """The one that is installed."""
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        raise SystemExit("There is no chromium here; try: apt install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=[*QUIET])
        yield browser
        browser.close()


def visit(browser: Browser, url: str, again: bool) -> dict[str, float]:
    """What the page tells of a visit by somebody who was never here, or `again` who was once."""
    with browser.new_context() as context:
        page = context.new_page()
        for _ in range(1 + again):
            page.goto(f"{url}/")
            form_ms = page.wait_for_function(FORM).json_value()
            page.wait_for_load_state("networkidle")
        return {"form_ms": form_ms, **page.evaluate(TOLD)}


def medians(visits: list[dict[str, float]]) -> dict[str, float]:
    """Of each figure."""
    return {name: round(statistics.median(each[name] for each in visits), 1) for name in visits[0]}


def draw(browser: Browser, url: str, name: str, scheme: Any) -> None:
    """The page with pictures that were just made on it."""
    with browser.new_context(viewport=SIZE, color_scheme=scheme) as context:
        page = context.new_page()
        page.goto(f"{url}/")
        for prompt in PROMPTS:
            make(page, prompt)
        page.mouse.move(0, 0)
        shot = page.screenshot(full_page=True, animations="disabled", caret="hide")
        Image.open(io.BytesIO(shot)).convert("RGB").save(report.RESULTS / f"{name}.webp", quality=90, method=6)


def make(page: Page, prompt: str) -> None:
    """A picture, and wait until it is there and kept."""
    before = page.locator(".gallery img").count()
    page.get_by_label("What should the picture show?").fill(prompt)
    page.get_by_role("button", name="Make", exact=True).click()
    page.locator(".gallery img").nth(before).wait_for()


if __name__ == "__main__":
    main()
