"""Images that would keep a decoder busy for ever, at every door, beside requests that have none: on a real server."""

import base64
import json
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from test_faults import Faulty, error, faulty

import image_bombs as bombs
from comfy_graphs import graph as plain_graph
from comfy_graphs import node

DEADLINE = {"x-deadline-s": "3"}
SIZE = {"size": "64x64"}


@pytest.fixture(scope="module")
def server() -> Iterator[Faulty]:
    with faulty() as started:
        yield started


def text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def graph(loader: str, image: str) -> dict[str, Any]:
    """One that begins with an image."""
    made = plain_graph()
    made["10"] = node(loader, image=image)
    made["5"] = node("VAEEncode", pixels=["10", 0], vae=["4", 2])
    return {"prompt": made}


def upload(server: Faulty, data: bytes, name: str = "bomb.jpg") -> None:
    httpx.post(server.url + "/upload/image", files={"image": (name, data)}, timeout=60).raise_for_status()


def form(server: Faulty, data: bytes) -> httpx.Response:
    files = {"image": ("a.jpg", data)}
    return httpx.post(server.url + "/v1/images/edits", data={"prompt": "fine"}, files=files, timeout=60)


def mask(server: Faulty, data: bytes) -> httpx.Response:
    upload(server, bombs.png_with(), "original.png")
    original = json.dumps({"filename": "original.png", "type": "input"})
    files = {"image": ("mask.jpg", data)}
    return httpx.post(server.url + "/upload/mask", data={"original_ref": original}, files=files, timeout=60)


def loaded(server: Faulty, data: bytes) -> httpx.Response:
    upload(server, data)
    return httpx.post(server.url + "/prompt", json=graph("LoadImage", "bomb.jpg"), timeout=60)


def viewed(server: Faulty, data: bytes) -> httpx.Response:
    upload(server, data)
    return httpx.get(server.url + "/view?filename=bomb.jpg&type=input&preview=webp", timeout=60)


def workflow(server: Faulty, data: bytes) -> httpx.Response:
    given = {"workflow": graph("LoadImage", "a.png")["prompt"], "image": text(data)}
    return httpx.post(server.url + "/workflows", json=given, timeout=60)


DOORS: dict[str, Callable[[Faulty, bytes], httpx.Response]] = {
    "edits": lambda server, data: server.post("fine", path="/v1/images/edits", images=[text(data)]),
    "edits as a form": form,
    "generations": lambda server, data: server.post("fine", images=[text(data)]),
    "generate": lambda server, data: server.post("fine", path="/generate", images=[text(data)]),
    "a mask": lambda server, data: server.post(
        "fine", path="/generate", images=[text(bombs.png_with())], mask=text(data)
    ),
    "fal": lambda server, data: server.post("fine", path="/fal/spark", image_url=text(data)),
    "ComfyUI's upload of masks": mask,
    "a node that loads": loaded,
    "an image in a graph": lambda server, data: httpx.post(
        server.url + "/prompt", json=graph("ETN_LoadImageBase64", text(data)), timeout=60
    ),
    "ComfyUI's previews": viewed,
    "a workflow": workflow,
}


@pytest.mark.parametrize("door", DOORS.values(), ids=DOORS)
def test_at_every_door_what_has_too_much_is_refused_by_what_it_is(
    server: Faulty, door: Callable[[Faulty, bytes], httpx.Response]
) -> None:
    answer = door(server, bombs.jpeg_of_scans(8000))
    assert answer.status_code in (400, 422), answer.text
    assert "more than 64 scans" in answer.text


def test_what_never_ends_is_504_in_its_time_and_holds_up_nobody(server: Faulty) -> None:
    endless = text(bombs.ENDLESS())
    sent = [server.begin("endless", DEADLINE, images=[endless], **SIZE) for _ in range(6)]
    sent += [server.begin("endless", DEADLINE, path="/v1/images/edits", images=[endless]) for _ in range(6)]
    assert server.post("fine", **SIZE).status_code == 200
    assert httpx.get(server.url + "/ping").status_code == 200
    good = server.post("fine", path="/v1/images/edits", images=[text(bombs.jpeg_of_scans(8000))])
    assert good.status_code == 422, good.text  # and other images are looked at
    assert {error(each.result()) for each in sent} == {(504, "deadline_exceeded", "false")}
    after = server.post("fine", path="/v1/images/edits", images=[text(b"no image")])
    assert (after.status_code, after.json()["error"]["param"]) == (400, "images")


def test_what_never_ends_in_a_graph_holds_up_no_other_graph(server: Faulty) -> None:
    upload(server, bombs.ENDLESS(), "endless.heic")
    url = server.url + "/prompt"
    endless: dict[str, Any] = {"json": graph("LoadImage", "endless.heic"), "headers": DEADLINE, "timeout": 90}
    sent = [server.pool.submit(httpx.post, url, **endless) for _ in range(6)]
    good = httpx.post(url, json={"prompt": plain_graph()}, timeout=60)
    assert good.status_code == 200, good.text
    assert {each.result().status_code for each in sent} == {504}
