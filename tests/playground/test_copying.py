"""What is copied of a picture is run: it makes the same one again."""

import base64
import io
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from diffusers import FluxTransformer2DModel
from PIL import Image
from playwright.sync_api import Page, expect

from browsing import Visit, drop
from handler.volume.sources import EMBEDDED
from loras import LAYERS, matrices, peft, put
from serving import Served, serving
from test_making import ask, bytes_of, made

PROMPT = 'it\'s "a red circle" on $HOME, `blue` \\ background'  # whatever a shell or Python would read in it
KEY = "canary-key-0451"
SIDE = 256


def copied(page: Page, kind: str) -> str:
    """The text of the dialog, which is closed again."""
    page.get_by_role("button", name=kind, exact=True).click()
    text = page.locator("dialog pre").inner_text()
    page.get_by_role("button", name="Close").click()
    return text


def curl(page: Page, folder: Path, **environ: str) -> bytes:
    subprocess.run(["bash", "-c", copied(page, "curl")], cwd=folder, check=True, env=environ)
    return next(folder.glob("kindling.*")).read_bytes()


def python(page: Page, folder: Path, **environ: str) -> bytes:
    subprocess.run([sys.executable, "-c", copied(page, "Python")], cwd=folder, check=True, env=environ)
    return next(folder.glob("kindling.*")).read_bytes()


WAYS = {"curl": curl, "Python": python}


def drawn(server: Served, graph: str) -> bytes:
    """What `/prompt` makes of a graph."""
    with httpx.Client(base_url=server.url, timeout=60) as client:
        sent = client.post("/prompt", json={"prompt": json.loads(graph)})
        assert sent.status_code == 200, sent.text
        name = sent.json()["prompt_id"]
        while not (found := client.get(f"/history/{name}").json()):
            pass
        assert found[name]["status"]["status_str"] == "success", found
        [image] = found[name]["outputs"]["9"]["images"]
        return client.get("/view", params=image).content


def settings(data: bytes) -> dict[str, Any]:
    with Image.open(io.BytesIO(data)) as image:
        return dict(json.loads(image.info["kindling"]))


@pytest.mark.parametrize("way", WAYS)
def test_it_makes_the_same_picture(page: Page, way: str, tmp_path: Path) -> None:
    page.get_by_text("Advanced").click()
    page.get_by_label("Size", exact=True).select_option(label="Portrait, 224 × 288")
    page.get_by_role("radio", name="Quality").check()
    page.get_by_label("File", exact=True).select_option("webp")
    ask(page, PROMPT)
    made(page, PROMPT)
    assert WAYS[way](page, tmp_path) == bytes_of(page)


@pytest.mark.parametrize("way", WAYS)
def test_of_several_it_makes_the_one_that_is_shown(page: Page, way: str, tmp_path: Path) -> None:
    page.get_by_text("Advanced").click()
    page.get_by_label("How many", exact=True).fill("2")
    ask(page, PROMPT)
    page.get_by_role("button", name="Picture 2").click()
    assert WAYS[way](page, tmp_path) == bytes_of(page)


@pytest.mark.parametrize("way", WAYS)
def test_an_edit_takes_its_files_from_the_folder(page: Page, way: str, tmp_path: Path) -> None:
    ask(page)
    made(page)
    (tmp_path / "picture.png").write_bytes(bytes_of(page))
    page.get_by_role("button", name="Edit").click()
    page.get_by_label("How much").fill("0.5")
    page.get_by_role("button", name="Mark where").click()
    easel = page.get_by_role("img", name="The picture; 0 percent")
    easel.focus()
    easel.press("Space")
    for _ in range(6):
        easel.press("ArrowRight")
    easel.press("Space")
    with page.expect_request("**/v1/images/edits") as sent:
        ask(page, PROMPT)
    made(page, PROMPT)
    mask = sent.value.post_data_json["mask"]
    (tmp_path / "mask.png").write_bytes(base64.b64decode(mask.partition(",")[2]))
    assert WAYS[way](page, tmp_path) == bytes_of(page)


def test_a_workflow_asks_for_the_same_settings(page: Page, server: Served) -> None:
    page.get_by_text("Advanced").click()
    page.get_by_label("Steps", exact=True).fill("3")
    page.get_by_label("Size", exact=True).select_option(label="Wide, 352 × 192")
    ask(page, PROMPT)
    made(page, PROMPT)
    ours, theirs = settings(bytes_of(page)), settings(drawn(server, copied(page, "ComfyUI")))
    assert {name: theirs[name] for name in ("prompt", "seed", "size")} == {
        name: ours[name] for name in ("prompt", "seed", "size")
    }
    assert theirs["sampling"]["steps"] == ours["steps"] == 3


def test_a_workflow_of_an_edit_wants_its_picture_uploaded(page: Page, server: Served) -> None:
    ask(page)
    made(page)
    files = {"image": ("picture.png", bytes_of(page))}
    page.get_by_role("button", name="Edit").click()
    page.get_by_label("How much").fill("0.5")
    ask(page, PROMPT)
    made(page, PROMPT)
    assert httpx.post(f"{server.url}/upload/image", files=files).json()["name"] == "picture.png"
    found = settings(drawn(server, copied(page, "ComfyUI")))
    assert (found["sampling"]["denoise"], len(found["images"])) == (0.5, 1)


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A worker with a LoRA and a key."""
    volume = tmp_path_factory.mktemp("volume")
    transformer = FluxTransformer2DModel.from_pretrained(EMBEDDED / "spark/transformer")
    put(volume / "loras/ink.safetensors", peft(matrices(transformer, LAYERS)))
    with serving({"KINDLING_VOLUME": str(volume), "KINDLING_API_KEYS": KEY}) as served:
        yield served


@pytest.mark.parametrize("way", WAYS)
def test_the_key_comes_from_the_environment_and_loras_go_along(
    visit: Visit, adapted: Served, way: str, tmp_path: Path
) -> None:
    page = visit.open(adapted.url)
    page.get_by_label("Key", exact=True).fill(KEY)
    page.keyboard.press("Enter")
    page.get_by_text("Advanced").click()
    page.get_by_role("checkbox", name="ink").check()
    page.get_by_label("Weight of ink").fill("0.5")
    ask(page, PROMPT)
    made(page, PROMPT)
    assert [lora["weight"] for lora in settings(bytes_of(page))["loras"]] == [0.5]
    assert KEY not in copied(page, way)
    assert WAYS[way](page, tmp_path, KINDLING_API_KEY=KEY) == bytes_of(page)
    expect(page.locator(".error")).to_have_count(0)
    visit.expect("status of 401")


def test_a_loras_weight_for_text_encoders_goes_along_until_its_weight_is_changed(visit: Visit, adapted: Served) -> None:
    loras = [{"name": "ink", "weight": 0.5, "clip_weight": 0.25}]
    head = {"authorization": f"Bearer {KEY}", "accept": "image/png"}
    sent = httpx.post(f"{adapted.url}/generate", json={"prompt": "x", "loras": loras}, headers=head, timeout=60).content
    page = visit.open(adapted.url)
    page.get_by_label("Key", exact=True).fill(KEY)
    page.keyboard.press("Enter")
    expect(page.get_by_role("radio", name="Realtime")).to_be_attached()
    drop(page.locator("body"), sent, "x.png", "image/png")
    expect(page.locator("[name=prompt]")).to_have_value("x")
    ask(page, PROMPT)
    made(page, PROMPT)
    assert settings(bytes_of(page))["loras"] == settings(sent)["loras"]
    assert json.loads(copied(page, "ComfyUI"))["20"]["inputs"]["strength_clip"] == 0.25
    page.get_by_text("Advanced").click()
    page.get_by_label("Weight of ink").fill("0.75")
    ask(page, "another")
    made(page, "another")
    [lora] = settings(bytes_of(page))["loras"]
    assert (lora["weight"], "clip_weight" in lora) == (0.75, False)
    visit.expect("status of 401")


def test_a_graphs_own_sampling_is_in_its_picture_alone(page: Page, server: Served) -> None:
    """No KSampler says all of it."""
    expect(page.get_by_role("radio", name="Realtime")).to_be_attached()
    asked = {"prompt": "x", "sampling": {"sampler": "dpmpp_2m", "scheduler": "karras", "steps": 4}}
    sent = httpx.post(f"{server.url}/generate", json=asked, headers={"accept": "image/png"}, timeout=60).content
    drop(page.locator("body"), sent, "x.png", "image/png")
    expect(page.locator("[name=prompt]")).to_have_value("x")
    ask(page, PROMPT)
    made(page, PROMPT)
    assert copied(page, "ComfyUI") == "It was sampled as its graph says: use that."
