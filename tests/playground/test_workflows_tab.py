"""The workflows tab: a file explained, run, kept and called, in a browser before a real worker."""

import io
import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from graphs import png, with_image
from PIL import Image
from playwright.sync_api import Page, expect
from workflows import default

from browsing import Visit, drop
from comfy_graphs import Graph, graph, node
from serving import Served, serving

Open = Callable[..., None]


@pytest.fixture
def tab(visit: Visit, server: Served) -> Page:
    page = visit.open(f"{server.url}/#workflows")
    expect(page.get_by_text("Kept here")).to_be_visible()
    return page


@pytest.fixture
def bring(tab: Page) -> Open:
    """Drops a file and waits for what is said of it."""

    def run(made: Any, name: str = "circle.json", media: str = "application/json") -> None:
        drop(tab.locator("body"), made if isinstance(made, bytes) else json.dumps(made).encode(), name, media)
        expect(tab.locator(".desk h2")).to_have_text(name)

    return run


def prompted(server: Served, made: Graph) -> bytes:
    """The picture that /prompt makes of a graph, as a file."""
    named = httpx.post(f"{server.url}/prompt", json={"prompt": made}).json()["prompt_id"]
    while not (history := httpx.get(f"{server.url}/history/{named}").json()):
        time.sleep(0.05)
    [image] = history[named]["outputs"]["9"]["images"]
    return httpx.get(f"{server.url}/view", params=image).content


def pixels(data: bytes) -> bytes:
    with Image.open(io.BytesIO(data)) as image:
        return image.convert("RGB").tobytes()


def downloaded(page: Page, folder: Path) -> bytes:
    with page.expect_download() as download:
        page.locator("figure").get_by_role("link", name="Download").click()
    download.value.save_as(folder / "picture")
    return (folder / "picture").read_bytes()


def run(page: Page) -> None:
    page.get_by_role("button", name="Run").click()
    expect(page.locator("figure img").first).to_be_visible()


@pytest.mark.parametrize("form", ["API format", "UI format", "a PNG", "a WebP"])
def test_a_workflow_is_dropped_and_run(tab: Page, bring: Open, server: Served, tmp_path: Path, form: str) -> None:
    """Its picture is what /prompt makes."""
    made = graph(side=256)
    expected = prompted(server, made)
    if form == "UI format":
        bring(default())
    elif form == "a PNG":
        bring(expected, "picture.png", "image/png")
    elif form == "a WebP":
        exif = Image.Exif()
        exif[0x0110] = f"prompt:{json.dumps(made)}"
        Image.new("RGB", (8, 8)).save(file := io.BytesIO(), "WEBP", exif=exif)
        bring(file.getvalue(), "picture.webp", "image/webp")
    else:
        bring(made)
    expect(tab.locator(".verdict")).to_have_text("It runs.")
    expect(tab.get_by_label("Prompt", exact=True).locator("visible=true")).to_have_value("a red circle")
    run(tab)
    assert pixels(downloaded(tab, tmp_path)) == pixels(expected)


def test_its_fields_change_it_and_are_checked(
    tab: Page, bring: Open, server: Served, tmp_path: Path, visit: Visit
) -> None:
    bring(graph(side=256))
    tab.fill("#workflow-field-steps", "5000")
    tab.get_by_role("button", name="Run").click()
    field = tab.locator(".field", has=tab.locator("#workflow-field-steps"))
    expect(field.locator(".error")).to_contain_text("steps should be at least 1")
    visit.expect("422")
    tab.fill("#workflow-field-steps", "3")
    tab.fill("#workflow-field-prompt", "a blue square")
    tab.fill("#workflow-field-n", "2")
    run(tab)
    expect(tab.locator(".pictures figure")).to_have_count(2)
    expect(tab.locator("figure img").first).to_have_attribute("alt", "a blue square")


def test_it_is_kept_and_called(tab: Page, bring: Open, server: Served, tmp_path: Path) -> None:
    bring(graph(side=256), "My circle.json")
    name = tab.get_by_label("Keep it as an endpoint")
    expect(name).to_have_value("my-circle")
    tab.get_by_role("button", name="Keep", exact=True).click()
    expect(tab.locator(".desk").get_by_text("It is kept as my-circle")).to_be_visible()
    answer = httpx.post(f"{server.url}/workflows/my-circle", json={"seed": 7}, timeout=60)
    assert answer.status_code == 200
    tab.reload()
    tab.get_by_role("button", name="Use my-circle").click()
    expect(tab.get_by_text("POST /workflows/my-circle")).to_be_visible()
    tab.fill("#workflow-field-seed", "7")
    run(tab)
    assert pixels(downloaded(tab, tmp_path)) == pixels(prompted(server, graph(side=256)))
    tab.get_by_role("button", name="Delete my-circle").click()
    tab.get_by_role("dialog").get_by_role("button", name="Delete").click()
    expect(tab.get_by_text("None yet")).to_be_visible()
    assert httpx.get(f"{server.url}/workflows/my-circle").status_code == 404


@pytest.mark.parametrize("name", ["", "../x", "My poster", "-x", "x" * 65])
def test_a_name_that_is_none_is_said_beside_it(tab: Page, bring: Open, name: str) -> None:
    bring(graph())
    tab.fill("#workflow-name", name)
    tab.get_by_role("button", name="Keep", exact=True).click()
    field = tab.locator(".field", has=tab.locator("#workflow-name"))
    expect(field.locator(".error")).to_contain_text("A name has 1 to 64 small letters")


def test_it_is_cancelled(tab: Page, bring: Open) -> None:
    bring(graph(side=1024, count=4))
    tab.get_by_role("button", name="Run").click()
    expect(tab.get_by_text(re.compile("Step [0-9]+ of 16"))).to_be_visible()
    tab.get_by_role("button", name="Cancel").click()
    expect(tab.locator("form.fields").get_by_text("Cancelled.")).to_be_visible()
    expect(tab.get_by_role("button", name="Run")).to_be_visible()
    expect(tab.locator("figure")).to_have_count(0)


def test_an_image_of_it_is_a_field(tab: Page, bring: Open) -> None:
    bring(with_image())
    expect(tab.locator(".verdict")).to_have_text("It runs.")
    tab.set_input_files("#workflow-field-image", [{"name": "a.png", "mimeType": "image/png", "buffer": png()}])
    run(tab)


def test_what_cannot_run_is_explained_node_by_node(tab: Page, bring: Open) -> None:
    made = graph()
    made["20"] = node("ControlNetLoader", control_net_name="pose.safetensors")
    made["21"] = node("ControlNetApply", conditioning=["6", 0], control_net=["20", 0], image=["22", 0], strength=1.0)
    made["22"] = node("LoadImage", image="cat.png")
    made["3"]["inputs"]["positive"] = ["21", 0]
    made["6"]["_meta"] = {"title": "<img src=x onerror=alert(1)>"}
    bring(made)
    expect(tab.locator(".verdict")).to_have_text("It cannot run here.")
    expect(tab.locator(".nodes li").first).to_contain_text("ControlNetApply")
    expect(tab.locator(".nodes li").first).to_contain_text("ControlNet is not offered")
    expect(tab.locator(".nodes")).to_contain_text("<img src=x onerror=alert(1)> (CLIPTextEncode)")
    assert tab.locator(".desk img").count() == 0
    expect(tab.get_by_role("button", name="Run")).to_have_count(0)
    expect(tab.get_by_role("button", name="Keep", exact=True)).to_have_count(0)


def test_what_another_model_draws_says_what_to_do(tab: Page, bring: Open) -> None:
    made = graph()
    made["4"]["inputs"]["ckpt_name"] = "sd_xl_base_1.0.safetensors"
    bring(made)
    expect(tab.locator(".verdict")).to_have_text("It would run, but not now.")
    expect(tab.get_by_text("start a worker with KINDLING_MODEL=sdxl")).to_be_visible()
    expect(tab.get_by_role("button", name="Run")).to_have_count(0)
    expect(tab.get_by_role("button", name="Keep", exact=True)).to_be_visible()


def test_without_the_editor_nothing_leads_there(tab: Page) -> None:
    expect(tab.get_by_role("link", name="editor")).to_have_count(0)


def test_markup_in_prompts_is_text(tab: Page, bring: Open) -> None:
    text = "<script>document.title='x'</script><b>bold</b>"
    bring(graph(text=text, side=256))
    expect(tab.locator("#workflow-field-prompt")).to_have_value(text)
    run(tab)
    expect(tab.locator("figure img")).to_have_attribute("alt", text)
    assert tab.title() == "Workflows · Kindling"
    assert tab.locator(".desk script, .desk b").filter(has_text="bold").count() == 0


@pytest.mark.parametrize(("tab", "told"), [("workflows", "None yet"), ("deploy", "spark on Modal")])
def test_with_a_key_a_tab_asks_for_it_once(visit: Visit, tab: str, told: str) -> None:
    with serving({"KINDLING_API_KEYS": "canary-key"}) as keyed:
        page = visit.open(f"{keyed.url}/#{tab}")
        dialog = page.get_by_role("dialog", name="API key")
        dialog.get_by_label("Key").fill("canary-key")
        dialog.get_by_role("button", name="Use this key").click()
        expect(page.locator(f"#{tab}").get_by_text(told)).to_be_visible()
        expect(dialog).to_have_count(0)
        visit.expect("401")
