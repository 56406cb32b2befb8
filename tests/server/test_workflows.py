"""Kept workflows: the routes, what a request to one draws, and how it is told; a model that paints their seeds."""

import asyncio
import base64
import contextlib
import errno
import io
import json
import os
import re
import subprocess
import threading
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from disks import failing
from hosts import answer as told
from hosts import hosting
from jsonschema_rs import Draft202012Validator
from openai import OpenAI
from PIL import Image
from workflows import default

from comfy_graphs import Graph, graph, node
from fakes import Editor, FakeFamily
from handler import MODELS, Settings, create_app
from handler.api.codec import inscribed
from handler.api.comfy.archive import Archive
from handler.api.workflows.keeping import LARGEST, MOST, OLD, Library, Workflow
from handler.api.workflows.service import Workflows
from handler.core.request import MAX_SEED
from serving import Served

Client = httpx.AsyncClient
Story = Callable[[Client], Awaitable[None]]
ROOT = Path(__file__).parents[2]


@pytest.fixture
def tell(tmp_path: Path) -> Iterator[Callable[..., None]]:
    """Runs a story: it gets a client of an app with the settings given."""
    with contextlib.ExitStack() as stack:

        def run(story: Story, painter: FakeFamily | None = None, **settings: Any) -> None:
            painter = painter or FakeFamily()
            engine = stack.enter_context(painter.engine(**{"volume": tmp_path / "volume", **settings}))
            app = create_app(engine, public=False)

            async def main() -> None:
                transport = httpx.ASGITransport(app, raise_app_exceptions=False)
                async with httpx.AsyncClient(transport=transport, base_url="http://kindling") as client:
                    await story(client)

            asyncio.run(main())

        yield run


async def keep(client: Client, made: Graph, name: str = "poster", status: int = 201) -> Any:
    answer = await client.put(f"/workflows/{name}", json=made)
    assert answer.status_code == status, answer.text
    return answer.json()


async def draw(client: Client, name: str = "poster", **payload: Any) -> Any:
    answer = await client.post(f"/workflows/{name}", json=payload)
    assert answer.status_code == 200, answer.text
    return answer.json()


async def refused(work: Awaitable[httpx.Response]) -> tuple[int, str, str]:
    answer = await work
    error = answer.json()["error"]
    return answer.status_code, error["code"], error["message"]


def picture(one: Any) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(one["b64_json"])))


def grey(one: Any) -> int:
    """What a fake has painted: the seed modulo 255, and one more."""
    found = picture(one).convert("RGB").getpixel((0, 0))
    assert isinstance(found, tuple)
    return int(found[0])


def test_a_workflow_is_kept_listed_drawn_and_forgotten(tell: Callable[..., None]) -> None:
    async def story(client: Client) -> None:
        kept = await keep(client, graph())
        assert (kept["name"], kept["drawable"], kept["why"], kept["shared"]) == ("poster", True, None, True)
        assert kept["outputs"] == [{"node": "9", "title": "SaveImage"}]
        assert len(kept["version"]) == 12
        told = {name: value for name, value in kept.items() if name != "shared"}
        assert (await client.get("/workflows")).json() == {"workflows": [told]}
        assert (await client.get("/workflows/poster")).json() == {**told, "graph": graph()}
        body = await draw(client, prompt="a hat", seed=7, size="128x64", n=2)
        assert (body["workflow"], body["version"], body["seed"]) == ("poster", kept["version"], 7)
        assert [(one["node"], one["width"], one["height"], one["seed"]) for one in body["images"]] == [
            ("9", 128, 64, 7)
        ] * 2
        assert body["images"][0]["parameters"]["prompt"] == "a hat"
        assert picture(body["images"][0]).size == (128, 64)
        said = json.loads(picture(body["images"][0]).text["prompt"])  # type: ignore[attr-defined]
        assert (said["6"]["inputs"]["text"], said["5"]["inputs"]["batch_size"]) == ("a hat", 2)
        assert (await client.delete("/workflows/poster")).status_code == 204
        assert (await client.get("/workflows")).json() == {"workflows": []}
        form = await refused(client.put("/workflows/poster", files={"file": b"{}"}))
        assert form[0] == 415
        assert "--data-binary" in form[2]
        for work in (
            client.delete("/workflows/poster"),
            client.get("/workflows/poster"),
            client.post("/workflows/poster", json={}),
        ):
            assert (await refused(work))[:2] == (404, "workflow_not_found")

    tell(story)


def test_left_out_the_graphs_own_values_are_drawn_and_the_seed_is_random(tell: Callable[..., None]) -> None:
    async def story(client: Client) -> None:
        await keep(client, graph(text="its own", seed=2**64 - 1))
        seeds = set()
        for payload in ({}, {"seed": -1}, {"seed": None}):
            one = (await draw(client, **payload))["images"][0]
            assert one["parameters"]["prompt"] == "its own"
            seeds.add(one["seed"])
        assert len(seeds) == 3
        assert (await draw(client, seed=MAX_SEED))["seed"] == MAX_SEED

    tell(story)


def test_every_output_is_drawn_and_named_by_its_node(tell: Callable[..., None]) -> None:
    async def story(client: Client) -> None:
        made = graph()
        made["10"] = node("ImageScale", image=["8", 0], upscale_method="lanczos", width=32, height=16, crop="disabled")
        made["11"] = {**node("SaveImage", images=["10", 0], filename_prefix="small"), "_meta": {"title": "Thumbnail"}}
        made["12"] = node("PreviewImage", images=["8", 0])
        await keep(client, made)
        images = (await draw(client, seed=7))["images"]
        assert [(one["node"], one["title"], one["width"]) for one in images] == [
            ("9", "SaveImage", 64),
            ("11", "Thumbnail", 32),
        ]
        assert picture(images[1]).size == (32, 16)
        assert [grey(one) for one in images] == [8, 8]

    tell(story)


def test_a_second_sampler_draws_the_picture_of_the_first_anew(tell: Callable[..., None]) -> None:
    async def story(client: Client) -> None:
        made = graph()
        again = {**made["3"]["inputs"], "latent_image": ["11", 0], "seed": 40, "denoise": 0.5}
        made["10"] = node("ImageScaleBy", image=["8", 0], upscale_method="lanczos", scale_by=2.0)
        made["11"] = node("VAEEncode", pixels=["10", 0], vae=["4", 2])
        made["12"] = node("KSampler", **again)
        made["13"] = node("VAEDecode", samples=["12", 0], vae=["4", 2])
        made["9"]["inputs"]["images"] = ["13", 0]
        await keep(client, made)
        body = await draw(client, seed=7)
        [one] = body["images"]
        assert (one["width"], one["seed"], body["seed"], one["parameters"]["seed"], grey(one)) == (128, 7, 7, 40, 41)

    tell(story, Editor())


def test_images_are_sent_as_fields(tell: Callable[..., None]) -> None:
    async def story(client: Client) -> None:
        made = graph()
        made["10"] = {**node("LoadImage", image="photo.png"), "_meta": {"title": "Input photo"}}
        made["11"] = node("VAEEncode", pixels=["10", 0], vae=["4", 2])
        made["3"]["inputs"] |= {"latent_image": ["11", 0], "denoise": 0.5}
        kept = await keep(client, made)
        assert (kept["drawable"], kept["required"], kept["fields"]["photo"]["format"]) == (True, ["photo"], "picture")
        answer = await refused(client.post("/workflows/poster", json={}))
        assert answer == (400, "missing_required_parameter", "Missing required parameter: 'photo', an image.")
        Image.new("RGB", (96, 64), "red").save(file := io.BytesIO(), "PNG")
        sent = base64.b64encode(file.getvalue()).decode()
        assert (await draw(client, photo=sent))["images"][0]["width"] == 96
        assert (await draw(client, photo=f"data:image/png;base64,{sent}", denoise=0.8))["images"][0]["height"] == 64
        assert (await refused(client.post("/workflows/poster", json={"photo": base64.b64encode(b"x").decode()})))[
            0
        ] == 400
        await client.post("/upload/image", files={"image": ("photo.png", file.getvalue())})
        assert (await client.get("/workflows")).json()["workflows"][0]["required"] == []
        assert (await draw(client))["images"][0]["width"] == 96

    tell(story, Editor())


def test_images_may_be_urls_and_texts_that_are_urls_stay_texts(tell: Callable[..., None]) -> None:
    Image.new("RGB", (96, 64), "red").save(file := io.BytesIO(), "PNG")
    with hosting() as host:
        host.answers["/a.png"] = told(file.getvalue(), content_type="image/png")
        url = f"{host.url}/a.png"

        async def story(client: Client) -> None:
            made = graph()
            made["10"] = {**node("LoadImage", image="photo.png"), "_meta": {"title": "$portrait"}}
            made["11"] = node("VAEEncode", pixels=["10", 0], vae=["4", 2])
            made["3"]["inputs"] |= {"latent_image": ["11", 0], "denoise": 0.5}
            made["6"]["_meta"] = {"title": "$image_url"}
            await keep(client, made)
            assert (await draw(client, portrait=url))["images"][0]["width"] == 96
            one = (await draw(client, portrait=url, image_url=url))["images"][0]
            assert json.loads(picture(one).text["prompt"])["6"]["inputs"]["text"] == url  # type: ignore[attr-defined]
            made["6"].pop("_meta")
            await keep(client, made, status=200)
            asked = {"model": "workflow/poster", "prompt": "a hat", "portrait": url}
            assert (await client.post("/v1/images/generations", json=asked)).json()["width"] == 96

        tell(story, Editor(), fetch_hosts=(host.name,))
    assert [each.where for each in host.asked] == ["/a.png"] * 3


@pytest.mark.parametrize("name", ["async", "webhook"])
def test_no_field_has_the_name_of_what_makes_a_job(tell: Callable[..., None], name: str) -> None:
    async def story(client: Client) -> None:
        made = graph()
        made["6"]["_meta"] = {"title": f"${name}"}
        assert name not in (await keep(client, made))["fields"]

    tell(story)


def test_what_was_forgotten_takes_no_memory(tmp_path: Path) -> None:
    settings = Settings(volume=tmp_path)
    library = Library(settings, Archive(settings))
    for name in ("one", "two", "three"):
        library.put(Workflow(name, graph()))
        assert [one.name for one in library.all()] == [name]
        library.remove(name)
    assert library.all() == []
    assert library._read == {}


@pytest.mark.parametrize("form", ["jpeg", "webp", "png"])
def test_pictures_come_in_the_format_that_is_asked_for(tell: Callable[..., None], form: str) -> None:
    async def story(client: Client) -> None:
        await keep(client, graph())
        one = (await draw(client, output_format=form))["images"][0]
        assert (one["format"], picture(one).format) == (form, form.upper())

    tell(story)


def test_without_metadata_a_picture_says_nothing(tell: Callable[..., None]) -> None:
    async def story(client: Client) -> None:
        await keep(client, graph())
        assert not picture((await draw(client))["images"][0]).text  # type: ignore[attr-defined]

    tell(story, metadata=False)


def test_it_streams_as_other_routes_do(tell: Callable[..., None]) -> None:
    async def story(client: Client) -> None:
        await keep(client, graph())
        answer = await client.post("/workflows/poster", json={"stream": True, "partial_images": 2, "seed": 7})
        events = [
            json.loads(line.removeprefix("data: ")) for line in answer.text.splitlines() if line.startswith("data: ")
        ]
        assert [one["type"].rpartition(".")[2] for one in events] == ["partial_image", "partial_image", "completed"]
        assert (events[-1]["workflow"], events[-1]["seed"]) == ("poster", 7)
        several = await refused(client.post("/workflows/poster", json={"stream": True, "partial_images": 1, "n": 2}))
        assert several[:2] == (400, "invalid_value")
        lone = await refused(client.post("/workflows/poster", json={"partial_images": 1}))
        assert lone[1] == "unsupported_parameter"
        made = graph()
        made["5"]["inputs"]["batch_size"] = 2  # which is no field where it is repeated
        made["50"] = node("RepeatLatentBatch", samples=["5", 0], amount=2)
        made["3"]["inputs"]["latent_image"], made["5"]["inputs"]["batch_size"] = ["50", 0], 1
        await keep(client, made, status=200)
        answer = await client.post("/workflows/poster", json={"stream": True, "partial_images": 2})
        types = [json.loads(line[6:])["type"] for line in answer.text.splitlines() if line.startswith("data: ")]
        assert types == ["image_generation.completed"]
        made = graph() | {"51": node("SaveImage", images=["8", 0], filename_prefix="more")}
        await keep(client, made, status=200)
        answer = await client.post("/workflows/poster", json={"stream": True, "partial_images": 3, "n": 1})
        assert '"image_generation.completed"' in answer.text

    tell(story)


def test_the_same_key_is_drawn_once(tell: Callable[..., None]) -> None:
    painter = FakeFamily()

    async def story(client: Client) -> None:
        await keep(client, graph())
        headers = {"idempotency-key": "mine"}
        one, two = [await client.post("/workflows/poster", json={}, headers=headers) for _ in range(2)]
        assert (one.json(), len(painter.drawn)) == (two.json(), 1)

    tell(story, painter)


def test_a_deadline_holds_and_a_drawing_is_counted_and_logged(
    tell: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    async def story(client: Client) -> None:
        await keep(client, graph())
        late = await refused(client.post("/workflows/poster", json={}, headers={"x-deadline-s": "0.000001"}))
        assert late[:2] == (504, "deadline_exceeded")
        caplog.clear()
        await draw(client, prompt="a secret hat", seed=7)
        [line] = [json.loads(one.message) for one in caplog.records if one.name == "kindling.requests"]
        assert (line["route"], line["seed"], line["n"], line["prompt_length"]) == ("/workflows/{name}", 7, 1, 12)
        assert 'route="/workflows/{name}"' in (await client.get("/metrics")).text

    caplog.set_level("INFO")
    tell(story)


def test_what_is_refused_unread_leaves_a_line_too(tell: Callable[..., None], caplog: pytest.LogCaptureFixture) -> None:
    async def story(client: Client) -> None:
        for path in ("/generate", "/workflows/poster", "/", "/models/spark"):
            caplog.clear()
            answer = await client.post(path, json={}, headers={"x-deadline-s": "0.000001"})
            [line] = [json.loads(one.message) for one in caplog.records if one.name == "kindling.requests"]
            assert (answer.status_code, line["status"], line["error"]) == (504, 504, "deadline_exceeded"), path
        caplog.clear()
        assert (await client.get("/workflows/poster")).status_code == 404
        assert not [one for one in caplog.records if one.name == "kindling.requests"]

    caplog.set_level("INFO")
    tell(story)


def test_a_request_keeps_the_version_that_it_began_with(tell: Callable[..., None]) -> None:
    painter = FakeFamily(gate=threading.Event())

    async def story(client: Client) -> None:
        first = await keep(client, graph(side=64))
        running = asyncio.create_task(draw(client, seed=7))
        await asyncio.to_thread(painter.entered.wait, 30)
        second = await keep(client, graph(side=128), status=200)
        assert first["version"] != second["version"]
        assert painter.gate
        painter.gate.set()
        body = await running
        assert (body["version"], body["images"][0]["width"]) == (first["version"], 64)
        assert (await draw(client))["version"] == second["version"]
        assert (await draw(client, f"poster@{first['version']}"))["images"][0]["width"] == 64
        assert (await client.get(f"/workflows/poster@{first['version']}")).json()["graph"] == graph(side=64)
        assert (await keep(client, graph(side=64), status=200))["version"] == first["version"]
        assert (await refused(client.post("/workflows/poster@000000000000", json={})))[1] == "workflow_not_found"
        assert (await refused(client.post("/workflows/poster@../x", json={})))[0] in (400, 404)
        assert (await refused(client.post("/workflows/poster@", json={})))[:2] == (400, "invalid_value")
        assert (await refused(client.delete(f"/workflows/poster@{first['version']}")))[1] == "invalid_value"

    tell(story, painter)


def test_old_versions_are_bounded(tell: Callable[..., None], tmp_path: Path) -> None:
    async def story(client: Client) -> None:
        for side in range(64, 64 + 8 * (OLD + 3), 8):
            await keep(client, graph(side=side), status=201 if side == 64 else 200)
        assert len([*(tmp_path / "volume/comfy/versions/poster").iterdir()]) == OLD
        await client.delete("/workflows/poster")
        assert not [*(tmp_path / "volume/comfy").rglob("*.json")]

    tell(story)


def test_two_workers_of_one_volume_agree(tell: Callable[..., None]) -> None:
    async def other(client: Client) -> None:
        assert [one["name"] for one in (await client.get("/workflows")).json()["workflows"]] == ["poster"]
        assert (await draw(client, seed=7))["images"][0]["width"] == 64
        await keep(client, graph(side=128), status=200)

    async def story(client: Client) -> None:
        first = await keep(client, graph())
        await asyncio.to_thread(tell, other)
        [one] = (await client.get("/workflows")).json()["workflows"]
        assert one["version"] != first["version"]
        assert (await draw(client))["images"][0]["width"] == 128

    tell(story)


@pytest.mark.parametrize(
    "name",
    ["Poster", "a.b", "...", ".hidden", "größe", "a b", "-a", "a" * 65, "a@b", "con:", "a%2Fb", "%2e%2e%2fb", "a\\b"],
)
def test_names_that_are_none(tell: Callable[..., None], tmp_path: Path, name: str) -> None:
    async def story(client: Client) -> None:
        for method in ("PUT", "GET", "DELETE", "POST"):
            answer = await client.request(method, f"/workflows/{name}", json=graph() if method == "PUT" else {})
            assert answer.status_code in (400, 404), answer.text
            assert answer.json()["error"]["message"]
        assert not [path for path in tmp_path.rglob("*.json") if "comfy" in path.parts]

    tell(story)


@pytest.mark.parametrize("form", ["png", "webp", "jpeg"])
def test_a_picture_that_has_its_graph_is_kept(tell: Callable[..., None], form: str) -> None:
    exif, buffer = Image.Exif(), io.BytesIO()
    exif[0x0110] = f"prompt:{json.dumps(graph())}"
    Image.new("RGB", (8, 8)).save(buffer, form, exif=exif)

    async def story(client: Client) -> None:
        media = {"content-type": f"image/{form}"}
        answer = await client.put("/workflows/poster", content=buffer.getvalue(), headers=media)
        assert answer.status_code == 201, answer.text

    tell(story)


@pytest.mark.parametrize(
    ("data", "status", "code"),
    [
        (b"", 400, "graph_refused"),
        (b"no JSON", 400, "graph_refused"),
        (b"[1]", 400, "graph_refused"),
        (b'{"a": 1}', 400, "graph_refused"),
        (b'{"a": {"inputs": {}}}', 400, "graph_refused"),
        (b"[" * 100_000, 400, "graph_refused"),
        (b'{"1": {"class_type": "PrimitiveInt", "inputs": {"value": 1}}}', 400, "graph_refused"),
        (json.dumps(graph(text="x" * LARGEST)).encode(), 422, "out_of_range"),
        (b"x" * 50_000_001, 413, "body_too_large"),
    ],
    ids=["empty", "text", "a list", "no nodes", "no class", "deep", "no output", "large", "50 MB"],
)
def test_files_that_are_none(tell: Callable[..., None], data: bytes, status: int, code: str) -> None:
    async def story(client: Client) -> None:
        assert (await refused(client.put("/workflows/poster", content=data)))[:2] == (status, code)
        as_jpeg = client.put("/workflows/poster", content=data, headers={"content-type": "image/jpeg"})
        assert (await refused(as_jpeg))[:2] == (status, code)
        assert (await client.get("/workflows")).json() == {"workflows": []}

    tell(story)


def test_there_are_a_hundred_at_most(tell: Callable[..., None]) -> None:
    async def story(client: Client) -> None:
        for i in range(MOST):
            await keep(client, graph(side=64), f"w{i}")
        answer = await refused(client.put("/workflows/more", json=graph()))
        assert answer == (422, "out_of_range", "There are 100 workflows already; delete one that is not needed.")
        await keep(client, graph(side=128), "w7", status=200)
        assert len((await client.get("/workflows")).json()["workflows"]) == MOST

    tell(story)


RECORDS = {
    "half": b'{"graph": {"9": {"cla',
    "nothing": b"",
    "other": b'{"graph": [1]}',
    "odd": b'{"graph": {"1": {"inputs": 3}, "2": 7}, "notes": {"a": 1}}',
    "nan": b'{"graph": {"1": {"class_type": "SaveImage", "inputs": {"images": NaN}}}}',
    "ui": b'{"graph": {"nodes": [], "links": []}}',
    "huge": json.dumps({"graph": graph(text="x" * LARGEST)}).encode(),
}


def test_a_record_that_somebody_spoilt_harms_nobody_else(tell: Callable[..., None], tmp_path: Path) -> None:
    async def story(client: Client) -> None:
        await keep(client, graph())
        folder = tmp_path / "volume/comfy/workflows"
        for name, data in RECORDS.items():
            (folder / f"{name}.json").write_bytes(data)
        (folder / "Not A Name.json").write_bytes(b"{}")
        (folder / "folder.json").mkdir()
        listed = {one["name"]: one for one in (await client.get("/workflows")).json()["workflows"]}
        assert listed.keys() == {"poster", *RECORDS}
        assert [name for name, one in listed.items() if one["drawable"]] == ["poster"]
        for name in RECORDS:
            assert listed[name]["why"]
            assert (await client.post(f"/workflows/{name}", json={})).status_code == 400
            assert (await client.get(f"/workflows/{name}")).status_code == 200
        assert (await client.get("/openapi.json")).status_code == 200
        await draw(client)
        await keep(client, graph(), "half", status=200)
        assert (await client.delete("/workflows/nothing")).status_code == 204

    tell(story)


def test_one_that_was_edited_by_hand_is_another_version(tell: Callable[..., None], tmp_path: Path) -> None:
    async def story(client: Client) -> None:
        first = await keep(client, graph())
        path = tmp_path / "volume/comfy/workflows/poster.json"
        path.write_text(path.read_text().replace('"width": 64', '"width": 128'))
        body = await draw(client)
        assert (body["images"][0]["width"], body["version"] == first["version"]) == (128, False)
        assert (await draw(client, f"poster@{first['version']}"))["images"][0]["width"] == 64

    tell(story)


def test_a_workflow_for_another_model_is_kept_with_the_reason(tell: Callable[..., None]) -> None:
    async def story(client: Client) -> None:
        made = graph()
        made["4"]["inputs"]["ckpt_name"] = "sd_xl_base_1.0.safetensors"
        kept = await keep(client, made)
        assert (kept["drawable"], "prompt" in kept["fields"]) == (False, True)
        assert "KINDLING_MODEL=sdxl" in kept["why"]
        status, code, message = await refused(client.post("/workflows/poster", json={}))
        assert (status, code, "KINDLING_MODEL=sdxl" in message) == (400, "graph_refused", True)
        assert "/workflows/poster" not in (await client.get("/openapi.json")).json()["paths"]

    tell(story)


def test_markup_is_a_text_like_any_other(tell: Callable[..., None]) -> None:
    async def story(client: Client) -> None:
        text = "<script>alert(1)</script>\u202e"
        made = graph(text=text)
        made["9"]["_meta"] = {"title": text}
        await keep(client, made)
        answer = await client.get("/workflows/poster")
        assert (answer.headers["content-type"], answer.headers["x-content-type-options"]) == (
            "application/json",
            "nosniff",
        )
        assert answer.json()["outputs"] == [{"node": "9", "title": text}]
        assert (await draw(client, prompt=text))["images"][0]["parameters"]["prompt"] == text

    tell(story)


def test_a_picture_that_has_its_graph_and_a_folder_of_the_image(tell: Callable[..., None], tmp_path: Path) -> None:
    async def story(client: Client) -> None:
        listed = {one["name"]: one for one in (await client.get("/workflows")).json()["workflows"]}
        assert listed.keys() == {"poster", "broken"}
        assert (listed["poster"]["fixed"], listed["poster"]["drawable"]) == (True, True)
        assert (listed["broken"]["drawable"], "no graph" in listed["broken"]["why"]) == (False, True)
        assert (await draw(client, seed=7))["images"][0]["width"] == 128
        for work in (client.put("/workflows/poster", json=graph()), client.delete("/workflows/poster")):
            assert (await refused(work))[:2] == (400, "unsupported_parameter")
        await keep(client, graph(), "mine")
        assert [one["name"] for one in (await client.get("/workflows")).json()["workflows"]] == [
            "broken",
            "mine",
            "poster",
        ]

    folder = tmp_path / "image"
    folder.mkdir()
    (folder / "Poster.json").write_text(json.dumps(graph(side=128)))
    (folder / "broken.json").write_text("{")
    (folder / "no name.json").write_text("{}")
    (folder / "notes.txt").write_text("")
    tell(story, workflows=folder)


def test_without_a_volume_they_go_with_the_worker(
    tell: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story(client: Client) -> None:
        assert (await keep(client, graph()))["shared"] is False
        await draw(client)
        assert not [*tmp_path.rglob("*.json")]

    monkeypatch.setattr(os, "access", lambda *_: False)
    tell(story)


def test_openai_asks_for_one_by_its_model(tell: Callable[..., None]) -> None:
    async def story(client: Client) -> None:
        made = graph()
        made["6"]["_meta"] = {"title": "$prompt"}
        made["20"] = {**node("PrimitiveString", value="ink"), "_meta": {"title": "Input style"}}
        made["7"]["inputs"]["text"] = ["20", 0]
        kept = await keep(client, made)
        listed = (await client.get("/v1/models")).json()["data"]
        assert [one["id"] for one in listed][-1] == "workflow/poster"
        assert (await client.get("/v1/models/workflow/poster")).json()["id"] == "workflow/poster"
        asked = {"model": "workflow/poster", "prompt": "a hat", "size": "128x64", "n": 2, "seed": 7, "style": "wash"}
        more = {"quality": "auto", "user": "me", "num_inference_steps": 2, "background": "auto"}
        body = (await client.post("/v1/images/generations", json=asked | more)).json()
        assert (body["model"], body["size"], body["version"], len(body["data"])) == (
            "workflow/poster",
            "128x64",
            kept["version"],
            2,
        )
        said = json.loads(picture(body["data"][0]).text["prompt"])  # type: ignore[attr-defined]
        assert (said["20"]["inputs"]["value"], said["3"]["inputs"]["steps"]) == ("wash", 2)
        for payload, code in (
            ({"scheduler": "euler"}, "unknown_parameter"),
            ({"n": 5}, "out_of_range"),
            ({"quality": "low"}, "unknown_parameter"),
            ({"images": ["eA=="]}, "invalid_value"),
            ({"prompt": None}, "missing_required_parameter"),
            ({"model": "workflow/none"}, "workflow_not_found"),
            ({"model": "workflow/../x"}, "invalid_value"),
            ({"odd": 1}, "unknown_parameter"),
        ):
            assert (await refused(client.post("/v1/images/generations", json=asked | payload)))[1] == code, payload
        native = (
            await client.post("/generate", json={"model": f"workflow/poster@{kept['version']}", "prompt": "a hat"})
        ).json()
        assert (native["model"], native["images"][0]["node"]) == (f"workflow/poster@{kept['version']}", "9")
        answer = await client.post("/models/workflow/poster", json={"inputs": "a hat", "parameters": {"seed": 7}})
        assert (answer.status_code, answer.headers["x-model"], answer.headers["x-seed"]) == (
            200,
            "workflow/poster",
            "7",
        )

    tell(story)


ASKING = [
    ("/workflows/poster", {"prompt": "a hat", "seed": 7}),
    ("/generate", {"model": "workflow/poster", "prompt": "a hat", "seed": 7}),
    ("/v1/images/generations", {"model": "workflow/poster", "prompt": "a hat", "seed": 7}),
    ("/", {"model": "workflow/poster", "inputs": "a hat", "parameters": {"seed": 7}}),
    ("/models/workflow/poster", {"inputs": "a hat", "parameters": {"seed": 7}}),
]


@pytest.mark.parametrize("path", ["/fal/workflow/poster", "/fal/"])
def test_fals_clients_may_name_one(tell: Callable[..., None], path: str) -> None:
    async def story(client: Client) -> None:
        await keep(client, graph())
        asked = {"prompt": "a hat", "seed": 7} | ({"model": "workflow/poster"} if path == "/fal/" else {})
        body = (await client.post(path, json=asked | {"sync_mode": True})).json()
        assert (body["seed"], body["workflow"], body.keys() & {"size", "width", "data"}) == (7, "poster", set())
        [image] = body["images"]
        assert image.keys() == {"url", "content_type", "width", "height"}
        linked = (await client.post(path, json=asked)).json()["images"][0]["url"]
        assert base64.b64decode(image["url"].partition(",")[2]) == (await client.get(linked)).content

    tell(story)


def test_a_seed_of_minus_one_is_none(tell: Callable[..., None]) -> None:
    async def story(client: Client) -> None:
        await keep(client, graph())
        for path, payload in ASKING:
            seed = {"parameters": {"seed": -1}} if "inputs" in payload else {"seed": -1}
            answer = await client.post(path, json=payload | seed, headers={"accept": "application/json"})
            assert answer.status_code == 200, answer.text

    tell(story)


@pytest.mark.parametrize(("path", "payload"), ASKING, ids=[path for path, _ in ASKING])
def test_every_route_answers_in_every_way(tell: Callable[..., None], path: str, payload: Any) -> None:
    """As JSON, by URL, as the picture itself, and as a job."""
    hub = "inputs" in payload

    async def story(client: Client) -> None:
        await keep(client, graph())
        wants = {"accept": "application/json"}
        body = (await client.post(path, json=payload, headers=wants)).json()
        group = "data" if "data" in body else "images"
        assert grey(body[group][0]) == 8
        by_url = payload["parameters"] if hub else payload
        asked = payload | ({"parameters": by_url | {"response_format": "url"}} if hub else {"response_format": "url"})
        linked = (await client.post(path, json=asked, headers=wants)).json()
        file = (await client.get(linked[group][0]["url"])).content
        bare = await client.post(path, json=payload, headers={"accept": "image/png"})
        assert (bare.headers["content-type"], bare.headers["x-seed"]) == ("image/png", "7")
        assert base64.b64decode(body[group][0]["b64_json"]) == file == bare.content
        job = (await client.post(path, json=payload, headers={"prefer": "respond-async"})).json()["urls"]["get"]
        await client.get(f"{job}/events")
        assert (await client.get(job)).json()["result"][group][0]["b64_json"] == body[group][0]["b64_json"]

        made = graph()
        made["5"]["inputs"]["batch_size"] = 2
        await keep(client, made, status=200)
        assert len((await client.post(path, json=payload, headers=wants)).json()[group]) == 2
        refusal = await refused(client.post(path, json=payload, headers={"accept": "image/png"}))
        assert refusal[:2] == (422, "out_of_range")
        assert "several" in refusal[2]

    tell(story)


def test_a_picture_alone_has_the_size_that_it_was_given_in_the_end(tell: Callable[..., None]) -> None:
    async def story(client: Client) -> None:
        made = graph()
        told = {"upscale_method": "nearest-exact", "width": 128, "height": 96, "crop": "disabled"}
        made["40"] = node("ImageScale", image=["8", 0], **told)
        made["9"]["inputs"]["images"] = ["40", 0]
        await keep(client, made)
        image = (await draw(client))["image"]
        assert (image["width"], image["height"]) == (128, 96)

    tell(story)


def test_each_is_an_operation_of_the_description(tell: Callable[..., None]) -> None:
    async def story(client: Client) -> None:
        await keep(client, graph())
        told = (await client.get("/openapi.json")).json()
        body = told["paths"]["/workflows/poster"]["post"]["requestBody"]["content"]["application/json"]["schema"]
        schema = told["components"]["schemas"][body["$ref"].rpartition("/")[2]]
        assert (schema["additionalProperties"], schema["required"]) == (False, [])
        assert {"prompt", "size", "width", "seed", "steps", "guidance", "n", "stream", "output_format"} <= schema[
            "properties"
        ].keys()
        width = schema["properties"]["width"]
        assert width == {"type": ["integer", "null"], "minimum": 64, "maximum": 2048, "description": "Default: 64."}

    tell(story)


def test_what_it_takes_and_answers_is_as_described(tell: Callable[..., None]) -> None:
    """Each way to ask, waited for, as events and as a job; a picture that is alone has the size that it is sent in."""

    async def story(client: Client) -> None:
        several = graph()
        several["10"] = node(
            "ImageScale", image=["8", 0], upscale_method="lanczos", width=32, height=16, crop="disabled"
        )
        several["11"] = node("SaveImage", images=["10", 0], filename_prefix="small")
        small = {name: each for name, each in several.items() if name != "9"}
        for name, made in (("poster", graph()), ("two-sizes", several), ("small", small)):
            await keep(client, made, name)
        told = (await client.get("/openapi.json")).json()

        def fits(name: str, body: Any) -> None:
            Draft202012Validator({"$ref": f"#/components/schemas/{name}", "components": told["components"]}).validate(
                body
            )

        assert all(re.fullmatch(r"[\w-]+", name) for name in told["components"]["schemas"])  # a dot makes a package
        for name in ("poster", "two-sizes"):
            fits("ModelName", f"workflow/{name}")
            fits(f"Workflow_{name}", {"async": True, "size": "64x64"})
            for path, asked, answer, event in (
                (f"/workflows/{name}", {}, "WorkflowImages", "WorkflowEvent"),
                ("/generate", {"prompt": "a hat", "model": f"workflow/{name}"}, "NativeImages", "NativeEvent"),
                ("/v1/images/generations", {"prompt": "x", "model": f"workflow/{name}"}, "Images", "GenerationEvent"),
            ):
                fits(answer, (await client.post(path, json=asked)).json())
                events = (await client.post(path, json=asked | {"stream": True})).text
                job = (await client.post(path, json=asked | {"async": True})).json()
                later = (await client.get(job["urls"]["events"])).text
                fits("Job", (await client.get(job["urls"]["get"])).json())
                for kind, text in ((event, events), ("JobEvent", later)):
                    lines = [line for line in text.splitlines() if line.startswith("data: ")]
                    assert lines
                    for line in lines:
                        fits(kind, json.loads(line.removeprefix("data: ")))
        alone = await draw(client, "small")
        assert (alone["image"]["width"], alone["image"]["height"]) == (32, 16)

    tell(story, FakeFamily())


def test_one_picture_as_it_is(tell: Callable[..., None]) -> None:
    async def story(client: Client) -> None:
        several = graph()
        several["10"] = node("ImageInvert", image=["8", 0])
        several["11"] = node("SaveImage", images=["10", 0], filename_prefix="dark")
        for name, made in (("one", graph()), ("outputs", several), ("pictures", graph(count=2))):
            await keep(client, made, name)
            asked = {"prompt": "x", "model": f"workflow/{name}"}
            for path, body in (
                (f"/workflows/{name}", {}),
                ("/v1/images/generations", asked),
                ("/generate", asked),
                (f"/models/workflow/{name}", {"inputs": "x"}),
            ):
                answer = await client.post(path, json=body, headers={"accept": "image/png"})
                if name == "one":
                    assert answer.headers["content-type"] == "image/png", (path, answer.text)
                else:
                    assert (answer.status_code, answer.json()["error"]["code"]) == (422, "out_of_range"), path
        answer = await client.post(
            "/models/workflow/outputs", json={"inputs": "x"}, headers={"accept": "application/json"}
        )
        assert [one["node"] for one in answer.json()["images"]] == ["9", "11"]
        assert "kindling_images_total 5.0" in (await client.get("/metrics")).text

    tell(story)


def test_a_title_takes_no_word_that_says_how_it_is_answered(tell: Callable[..., None]) -> None:
    async def story(client: Client) -> None:
        made = graph()
        made["6"]["_meta"] = {"title": "$webhook"}
        made["3"]["_meta"] = {"title": "$async.steps"}
        assert {"webhook_2", "async_2"} <= (await keep(client, made))["fields"].keys()
        assert (await draw(client, webhook_2="a hat"))["images"][0]["parameters"]["prompt"] == "a hat"

    tell(story)


def test_an_image_may_be_as_large_as_that_of_an_edit(tell: Callable[..., None]) -> None:
    async def story(client: Client) -> None:
        made = graph()
        made["10"] = node("LoadImage", image="photo.png")
        made["11"] = node("VAEEncode", pixels=["10", 0], vae=["4", 2])
        made["3"]["inputs"] |= {"latent_image": ["11", 0], "denoise": 0.5}
        await keep(client, made)
        large = Image.frombytes("RGB", (1024, 1024), os.urandom(3 << 20))
        large.save(file := io.BytesIO(), "PNG", compress_level=0)
        sent = base64.b64encode(file.getvalue()).decode()
        assert (await refused(client.post("/prompt", content=b"x" * 4_000_001)))[1] == "body_too_large"
        assert (
            await client.put("/workflows/other", content=inscribed(file.getvalue(), {"prompt": json.dumps(made)}))
        ).status_code == 201
        assert (await draw(client, image=sent))["images"][0]["width"] == 1024

    tell(story, Editor(), max_body_mb=4)


def test_a_key_is_wanted_for_all_of_it(tell: Callable[..., None]) -> None:
    async def story(client: Client) -> None:
        for method in ("GET", "PUT", "POST", "DELETE"):
            assert (await client.request(method, "/workflows/poster")).status_code == 401
        assert (await client.get("/workflows")).status_code == 401

    tell(story, api_keys=("a-key",))


def guide() -> list[str]:
    """The commands of docs/comfyui.md that ask a server for workflows."""
    text = (ROOT / "docs/comfyui.md").read_text()
    return [line for line in text.splitlines() if line.startswith("curl") and "/workflows" in line]


def test_the_guides_commands_and_openais_client_on_a_real_server(server: Served, tmp_path: Path) -> None:
    """With spark: the picture of a workflow is the one that a prompt with the same graph gives."""
    try:
        follow_the_guide(server.url, tmp_path)
        with OpenAI(base_url=f"{server.url}/v1", api_key="unused") as client:
            draws_as_a_prompt_does(server.url, client)
            edits_its_image_where_its_mask_says(server.url, client)
    finally:
        for name in ("poster", "edit"):
            httpx.delete(f"{server.url}/workflows/{name}")


def follow_the_guide(url: str, folder: Path) -> None:
    put, *_, delete = commands = guide()
    assert len(commands) >= 3
    for command in (*commands, put):
        here = command.replace("http://127.0.0.1:8000", url)
        done = subprocess.run(["bash", "-o", "pipefail", "-c", here], capture_output=True, check=True, cwd=folder)
        assert (b'"error"' in done.stdout, bool(done.stdout)) == (False, command != delete), done.stdout[:500]


def draws_as_a_prompt_does(url: str, client: OpenAI) -> None:
    answer = client.images.generate(model="workflow/poster", prompt="a red circle", extra_body={"seed": 7})
    assert answer.data
    kept = httpx.get(f"{url}/workflows/poster").json()["graph"]
    for one in kept.values():
        asked = {"seed": 7, "text": "a red circle"}
        one["inputs"] |= {name: asked[name] for name in asked if isinstance(one["inputs"].get(name), str | int)}
    prompt_id = httpx.post(f"{url}/prompt", json={"prompt": kept}).json()["prompt_id"]
    while not (found := httpx.get(f"{url}/history/{prompt_id}").json()):
        pass
    [image] = found[prompt_id]["outputs"]["9"]["images"]
    theirs = httpx.get(f"{url}/view", params=image).content
    mine = base64.b64decode(answer.data[0].b64_json or "")
    with Image.open(io.BytesIO(mine)) as one, Image.open(io.BytesIO(theirs)) as two:
        assert one.tobytes() == two.tobytes()


def edits_its_image_where_its_mask_says(url: str, client: OpenAI) -> None:
    made = graph()
    made["10"] = node("LoadImage", image="photo.png")
    made["11"] = node("VAEEncode", pixels=["10", 0], vae=["4", 2])
    made["5"] = node("SetLatentNoiseMask", samples=["11", 0], mask=["10", 1])
    assert httpx.put(f"{url}/workflows/edit", json=made).json()["required"] == ["image"]
    Image.new("RGB", (64, 64), "red").save(image := io.BytesIO(), "PNG")
    clear = Image.new("RGBA", (64, 64), "black")
    clear.paste((0, 0, 0, 0), (0, 0, 32, 64))
    clear.save(mask := io.BytesIO(), "PNG")
    files = {"image": image.getvalue(), "mask": mask.getvalue()}
    extra = {"seed": 7, "steps": 2}
    answer = client.images.edit(model="workflow/edit", prompt="a blue star", **files, extra_body=extra)
    assert answer.data
    with Image.open(io.BytesIO(base64.b64decode(answer.data[0].b64_json or ""))) as one:
        red, green, blue = one.getpixel((63, 30))  # type: ignore[misc]
        assert (one.size, red > 200, green < 60, blue < 60) == ((64, 64), True, True, True)


def test_one_is_drawn_without_being_kept(tell: Callable[..., None]) -> None:
    """In API or in UI format, by the same fields, with the same answer, and refused in the same words."""

    async def story(client: Client) -> None:
        await keep(client, graph())
        given = {"prompt": "x", "seed": 7}
        for made in (graph(), default()):
            answer = await client.post("/workflows", json={"workflow": made, **given})
            assert answer.status_code == 200, answer.text
            brought = answer.json()
            assert (brought["seed"], brought["workflow"], grey(brought["images"][0])) == (7, "", 8)
        assert [one["name"] for one in (await client.get("/workflows")).json()["workflows"]] == ["poster"]
        for body, status, code in (
            ({}, 400, "missing_required_parameter"),
            ({"workflow": {}}, 400, "graph_refused"),
            ({"workflow": "x"}, 400, "graph_refused"),
            ({"workflow": graph(), "other": 1}, 400, "unknown_parameter"),
            ({"workflow": graph(), "steps": 5000}, 422, "out_of_range"),
        ):
            assert (await refused(client.post("/workflows", json=body)))[:2] == (status, code), body
        stream = await client.post("/workflows", json={"workflow": graph(), "stream": True, "progress": True})
        assert "image_generation.progress" in stream.text
        assert "image_generation.completed" in stream.text

    tell(story)


def test_what_is_explained_has_the_fields_and_draws_what_a_prompt_draws(tell: Callable[..., None]) -> None:
    async def story(client: Client) -> None:
        report = (await client.post("/explain", json=default(), timeout=60)).json()
        assert report["values"].items() >= {"prompt": "a red circle", "seed": 7, "width": 256, "n": 1}.items()
        assert report["fields"].keys() == report["values"].keys()
        assert report["required"] == []
        answer = await client.post("/workflows", json={"workflow": report["graph"], **report["values"]})
        assert grey(answer.json()["images"][0]) == 8
        described = (await client.get("/openapi.json")).json()
        Draft202012Validator(
            {"$ref": "#/components/schemas/Explained", "components": described["components"]}
        ).validate(report)

    tell(story)


def test_what_was_brought_takes_no_memory(tmp_path: Path) -> None:
    workflows = Workflows(Settings(volume=tmp_path), MODELS["spark"])
    served = workflows.catalogue.served()
    assert workflows.draft(graph(), served)["values"]["prompt"] == "a red circle"
    assert workflows._described == {}


def test_a_record_that_cannot_be_read_is_named_and_hides_no_other(tell: Callable[..., None], tmp_path: Path) -> None:
    async def story(client: Client) -> None:
        for name in ("poster", "ruined"):
            await keep(client, default(), name)
            os.utime(tmp_path / f"volume/comfy/workflows/{name}.json", (1e9, 1e9))  # not just now
        with failing(tmp_path / "volume", errno.EIO, lambda call: call.path.endswith("workflows/ruined.json")):
            answer = await client.get("/workflows")
            described = await client.get("/openapi.json")
        assert answer.status_code == 200, answer.text
        found = {one["name"]: (one["drawable"], one["why"]) for one in answer.json()["workflows"]}
        assert found["poster"] == (True, None)
        assert not found["ruined"][0]
        assert "Its record cannot be read: Input/output error" in str(found["ruined"][1])
        assert "/workflows/poster" in described.json()["paths"]
        again = (await client.get("/workflows")).json()["workflows"]
        assert [one["drawable"] for one in again] == [True, True]

    tell(story)


def test_a_loop_of_links_in_the_place_of_the_volume_is_no_bug_of_ours(
    tell: Callable[..., None], tmp_path: Path
) -> None:
    loop = tmp_path / "loop"
    loop.symlink_to(loop)

    async def story(client: Client) -> None:
        told = "The place of workflows fails: Too many levels of symbolic links; try again."
        for path in ("/workflows", "/workflows/poster", "/openapi.json"):
            assert await refused(client.get(path)) == (503, "not_ready", told)
        for path in ("/history", "/v1/models"):
            answer = await client.get(path)
            assert answer.status_code == 200, (path, answer.text)

    tell(story, volume=loop)
