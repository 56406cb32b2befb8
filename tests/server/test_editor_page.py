"""ComfyUI's editor in a browser: its page as it is published, before a worker with spark and a key.

The page is the strictest judge of what ComfyUI's routes say. Needs chromium, and what `make editor` installs.
"""

import importlib.util
import io
import json
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image
from playwright.sync_api import BrowserContext, Page, expect

import browsing
from browsing import Visit, chromium
from comfy_graphs import Graph, graph
from serving import serving

if importlib.util.find_spec("comfyui_frontend_package") is None:
    pytest.skip("it needs what `make editor` installs", allow_module_level=True)

KEY = "canary-key-0451"
READY = "() => window.app && window.app.graph && window.app.graph.nodes.length"
SEEN = "() => window.app.graph.nodes.some(n => n.type === 'SaveImage' && n.imgs?.[0]?.naturalWidth)"
TITLES = """() => {
    window.titles = []
    const watched = {childList: true, characterData: true, subtree: true}
    new MutationObserver(() => window.titles.push(document.title)).observe(document.querySelector('title'), watched)
}"""
CENTRE = """() => {
    const image = window.app.graph.nodes.find(n => n.type === 'SaveImage').imgs[0]
    const canvas = new OffscreenCanvas(image.naturalWidth, image.naturalHeight)
    const context = canvas.getContext('2d')
    context.drawImage(image, 0, 0)
    return [image.naturalWidth, ...context.getImageData(canvas.width / 2, canvas.height / 2, 1, 1).data]
}"""
REFUSED = ("status of 400", "PromptExecutionError")  # what the page itself logs of a prompt that is refused


@pytest.fixture(scope="module")
def volume(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("volume")


@pytest.fixture(scope="module")
def url(volume: Path) -> Iterator[str]:
    with serving({"KINDLING_COMFY_UI": "on", "KINDLING_API_KEYS": KEY, "KINDLING_VOLUME": str(volume)}) as served:
        yield served.url


@pytest.fixture
def server(url: str) -> Iterator[httpx.Client]:
    """The worker, for whoever needs no browser."""
    with httpx.Client(base_url=url, headers={"x-api-key": KEY}) as client:
        yield client


@pytest.fixture(scope="module")
def context() -> Iterator[BrowserContext]:
    """One for all, that has the page's files after the first; it answers what asks for a password with the key."""
    known = {"username": "me", "password": KEY}
    size = {"width": 1400, "height": 900}
    with chromium() as browser, browser.new_context(viewport=size, http_credentials=known) as context:
        yield context


def drop(page: Page, data: bytes, name: str, media: str) -> None:
    """A file onto the canvas, where there is no node."""
    browsing.drop(page.locator("#graph-canvas"), data, name, media, 0.93, 0.17)


class Watched(Visit):
    """Windows with the editor."""

    def __init__(self, context: BrowserContext, url: str) -> None:
        super().__init__(context)
        self.url = url

    def page(self, name: str = "") -> Page:
        """One more, of the client `name`, that is ready."""
        page = self.open(f"{self.url}/comfy/", f"window.name = {json.dumps(name)}" if name else "")
        page.wait_for_function(READY)
        return page


@pytest.fixture
def watched(context: BrowserContext, url: str) -> Iterator[Watched]:
    """That nothing went wrong, is asserted in the end."""
    found = Watched(context, url)
    yield found
    for page in context.pages:
        page.close()
    assert found.faults == []


def opened(page: Page, made: Graph) -> None:
    """A graph in API format, dropped as a file; all of it can be seen then."""
    drop(page, json.dumps(made).encode(), f"{uuid.uuid4().hex}.json", "application/json")
    types = sorted(node["class_type"] for node in made.values())
    page.wait_for_function(
        "types => JSON.stringify(window.app.graph.nodes.map(n => n.type).sort()) === JSON.stringify(types)", arg=types
    )
    page.evaluate("() => window.app.extensionManager.command.execute('Comfy.Canvas.FitView')")


def run(page: Page) -> None:
    page.get_by_test_id("queue-button").click()


def fresh(**options: Any) -> Graph:
    """A graph that nobody has drawn."""
    return graph(seed=uuid.uuid4().int % 2**50, **options)


def slow() -> Graph:
    """One that takes seconds."""
    made = fresh(side=1024)
    made["3"]["inputs"]["steps"] = 8
    return made


def begun(page: Page) -> None:
    """A node's progress is in the title."""
    page.wait_for_function("() => /%.*KSampler/.test(document.title)")


def test_a_workflow_is_opened_run_and_its_picture_seen(watched: Watched) -> None:
    page = watched.page()
    opened(page, fresh(side=256))
    page.evaluate(TITLES)
    run(page)
    page.wait_for_function(SEEN)
    side, red, green, blue, _ = page.evaluate(CENTRE)
    assert (side, red > 128, green < 128, blue < 128) == (256, True, True, True)
    assert any("%" in title for title in page.evaluate("() => window.titles"))
    expect(page.get_by_test_id("queue-overlay-toggle")).to_contain_text("0 active")


def test_what_is_coming_is_seen_at_its_sampler_and_can_be_stopped(watched: Watched, server: httpx.Client) -> None:
    page = watched.page()
    opened(page, slow())
    run(page)
    page.wait_for_function("() => window.app.graph.nodes.some(n => n.type === 'KSampler' && n.imgs?.[0]?.naturalWidth)")
    page.get_by_label("Cancel current run").click()
    expect(page.get_by_test_id("queue-overlay-toggle")).to_contain_text("0 active")
    [latest] = server.get("/api/jobs?limit=1").json()["jobs"]
    assert latest["status"] == "cancelled"


def test_a_page_that_is_loaded_again_meanwhile_sees_the_picture(watched: Watched) -> None:
    page = watched.page()
    opened(page, slow())
    run(page)
    begun(page)
    page.reload()
    page.wait_for_function(READY)
    page.evaluate("() => window.app.extensionManager.command.execute('Comfy.Canvas.FitView')")
    page.wait_for_function(SEEN)


def test_two_tabs_of_one_client_both_see_it(watched: Watched) -> None:
    first = watched.page()
    first.wait_for_function("() => window.name")
    second = watched.page(first.evaluate("() => window.name"))
    for page in (second, first):
        page.bring_to_front()
        opened(page, made := fresh())
    run(first)
    first.wait_for_function(SEEN)
    assert made
    second.bring_to_front()
    second.wait_for_function(SEEN)


FAULTS: dict[str, tuple[str, dict[str, Any], str]] = {
    "out of range": ("3", {"steps": 9000}, "KSampler"),
    "not connected": ("3", {"latent_image": None}, "KSampler"),
    "a model that is not served": ("4", {"ckpt_name": "other.safetensors"}, "CheckpointLoaderSimple"),
}


def test_a_fault_is_shown_at_its_node(watched: Watched) -> None:
    page = watched.page()
    for node, change, kind in FAULTS.values():
        made = fresh()
        inputs = made[node]["inputs"] | change
        made[node]["inputs"] = {name: value for name, value in inputs.items() if value is not None}
        opened(page, made)
        run(page)
        page.wait_for_function("node => window.app.lastNodeErrors?.[node]", arg=node)
        assert page.evaluate("() => window.app.graph.nodes.filter(n => n.has_errors).map(n => n.type)") == [kind]
    watched.expect(*REFUSED)


def test_a_picture_that_is_dropped_in_is_uploaded_and_seen(watched: Watched, volume: Path) -> None:
    page = watched.page()
    file = io.BytesIO()
    Image.new("RGB", (64, 32), "red").save(file, "png")
    drop(page, file.getvalue(), "red.png", "image/png")
    page.evaluate("() => window.app.extensionManager.command.execute('Comfy.Canvas.FitView')")
    page.wait_for_function(
        "() => window.app.graph.nodes.some(n => n.type === 'LoadImage' && n.imgs?.[0]?.naturalWidth == 64)"
    )
    assert (volume / "comfy/input/red.png").read_bytes() == file.getvalue()


def test_a_picture_brings_back_the_workflow_that_made_it(watched: Watched, server: httpx.Client) -> None:
    page = watched.page()
    opened(page, made := fresh(text="a green square", prefix="square"))
    run(page)
    page.wait_for_function(SEEN)
    picture = server.get("/view?filename=square_00001_.png").content
    opened(page, fresh())
    drop(page, picture, "square_00001_.png", "image/png")
    page.wait_for_function(
        "seed => window.app.graph.nodes.some(n => n.widgets?.some(w => w.value === seed))",
        arg=made["3"]["inputs"]["seed"],
    )


def test_a_workflow_is_saved_and_found_again(watched: Watched, volume: Path) -> None:
    page = watched.page()
    opened(page, fresh())
    page.keyboard.press("Control+s")
    page.get_by_role("dialog").get_by_role("textbox").fill("mine")
    page.keyboard.press("Enter")
    page.wait_for_function("() => document.title.startsWith('mine')")
    assert json.loads((volume / "comfy/userdata/workflows/mine.json").read_text())["nodes"]
    page.reload()
    page.wait_for_function(READY)
    page.get_by_test_id("workflows-tab-button").click()
    expect(page.get_by_role("treeitem", name="mine")).to_be_visible()


def test_the_playground_leads_to_the_editor(watched: Watched) -> None:
    page = watched.open(f"{watched.url}/#workflows", f"sessionStorage.setItem('kindling-key', '{KEY}')")
    page.get_by_role("link", name="Open ComfyUI's own editor").click()
    page.wait_for_function(READY)
    assert page.url.startswith(f"{watched.url}/comfy/")
