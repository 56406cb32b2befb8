"""worker-comfyui's jobs: a workflow with its images in, its pictures out. The model is a fake that paints the seed."""

import asyncio
import base64
import io
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from graphs import Graph, node, plain, png, with_image
from PIL import Image

from fakes import Editor, raises
from handler import Api, Engine, draw_workflow
from handler.core.errors import DeviceLost, NumericalError
from s3_plane import BUCKET, Broken, s3_server

CAT = {"name": "cat.png", "image": base64.b64encode(png()).decode()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("volume")


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[Engine]:
    with Editor().engine(volume=folder) as engine:
        yield engine


@pytest.fixture
def ask(engine: Engine) -> Callable[..., dict[str, Any]]:
    return lambda workflow, **others: told(engine, {"workflow": workflow, **others})


def told(engine: Engine, given: dict[str, Any]) -> dict[str, Any]:
    return asyncio.run(draw_workflow(Api(engine), given, lambda *_: None)).body


def picture(one: dict[str, Any]) -> Image.Image:
    found = Image.open(io.BytesIO(base64.b64decode(one["data"])))
    found.load()
    return found


def test_the_pictures_of_a_workflow(ask: Callable[..., Any], engine: Engine) -> None:
    """Each under its name; what is only shown is left out, what would be streamed is not."""
    graph = plain() | {
        "8": node("SaveImage", images=["6", 0], filename_prefix="kindling"),
        "9": node("PreviewImage", images=["6", 0]),
        "10": node("SaveImageWebsocket", images=["6", 0]),
    }
    answer = ask(graph)
    assert answer.keys() == {"images"}
    names = [one["filename"] for one in answer["images"]]
    assert names == ["kindling_00001_.png", "kindling_00002_.png", "ComfyUI_00001_.png"]
    assert {one["type"] for one in answer["images"]} == {"base64"}
    assert {picture(one).getpixel((0, 0)) for one in answer["images"]} == {(8, 8, 8)}
    steps: list[tuple[int, int]] = []
    job = draw_workflow(Api(engine), {"workflow": json.dumps(graph)}, lambda done, of: steps.append((done, of)))
    assert asyncio.run(job).body["images"] == answer["images"]
    assert steps == [(done, 4) for done in range(1, 5)]


@pytest.mark.parametrize("image", [CAT["image"], f"data:image/png;base64,{CAT['image']}"])
@pytest.mark.parametrize("name", ["cat.png", "pets/cat.png"])
def test_images_come_with_the_job_and_touch_no_volume(
    ask: Callable[..., Any], folder: Path, name: str, image: str
) -> None:
    graph = with_image() | {"10": node("LoadImage", image=name)}
    answer = ask(graph, images=[{"name": name, "image": image}], comfy_org_api_key="unused")
    assert picture(answer["images"][0]).size == (128, 64)
    assert "Invalid image file: " + name in ask(graph)["error"]  # the next job has none
    assert [*folder.iterdir()] == []


def test_a_workflow_that_only_shows_its_pictures(ask: Callable[..., Any]) -> None:
    answer = ask(plain() | {"7": node("PreviewImage", images=["6", 0])})
    assert answer == {"images": [], "status": "success_no_images"}


def test_what_is_wrong_with_other_outputs_is_told_beside_the_pictures(ask: Callable[..., Any]) -> None:
    graph = plain() | {"9": node("SaveImage", images=["99", 0], filename_prefix="x")}
    graph["1"] = node("UNETLoader", unet_name="spark.safetensors", weight_dtype="fp8_e4m3fn")
    graph |= {"20": node("CheckpointLoaderSimple", ckpt_name="spark.safetensors")}
    for name in ("2", "3"):
        graph[name]["inputs"]["clip"] = ["20", 1]
    graph["6"]["inputs"]["vae"] = ["20", 2]
    answer = ask(graph)
    assert len(answer["images"]) == 1
    assert answer["errors"][0].startswith("Node 9 (SaveImage): Bad linked input")
    assert "weight_dtype fp8_e4m3fn changes nothing" in answer["notes"][0]


NO_LIST = "'images' must be a list of objects with 'name' and 'image' keys"
REFUSED: list[tuple[Graph, Any, str, str]] = [
    (with_image(), [{"name": "cat.png"}], NO_LIST, ""),
    (with_image(), {"cat.png": CAT["image"]}, NO_LIST, ""),
    (with_image(), ["cat.png"], NO_LIST, ""),
    (with_image(), [CAT | {"image": "!"}], "Failed to upload", "Error decoding base64 for cat.png: "),
    (with_image(), [CAT | {"image": 3}], "Failed to upload", "Error decoding base64 for cat.png: "),
    (with_image(), [CAT | {"image": "https://a.example/b.png"}], "Failed to upload", "only from hosts in KINDLING"),
    (with_image(), [CAT | {"name": "../cat.png"}], "Failed to upload", "Error uploading ../cat.png: "),
    (with_image(), [CAT | {"name": 3}], "Invalid image file: cat.png", ""),
    (plain("sd_xl_base_1.0.safetensors"), None, "Workflow validation failed:\n• Node 5 (KSampler): Value", ""),
    ({"1": node("Nothing")}, None, "Node 'Nothing' not found", ""),
    ({}, None, "no graph", ""),
    ([], None, "no graph", ""),
    ("{", None, "no graph", ""),
    ("\ud800", None, "no graph", ""),
]


@pytest.mark.parametrize(("workflow", "images", "said", "detail"), REFUSED)
def test_what_is_refused(ask: Callable[..., Any], workflow: Any, images: Any, said: str, detail: str) -> None:
    answer = ask(workflow, images=images)
    assert said in answer["error"]
    assert detail in json.dumps(answer.get("details", ""))
    assert "images" not in answer


@pytest.mark.parametrize(
    ("error", "fatal"), [(NumericalError("It is black."), False), (DeviceLost("It is lost."), True)]
)
def test_a_failure_while_drawing_is_told_as_comfyui_tells_it(error: Exception, fatal: bool, folder: Path) -> None:
    family = Editor(at_step={2: raises(error)})
    with family.engine(volume=folder) as engine:
        reply = asyncio.run(draw_workflow(Api(engine), {"workflow": plain()}, lambda *_: None))
    assert reply.fatal == fatal
    assert reply.body["error"] == "Job processing failed"
    assert reply.body["details"] == [
        f"Workflow execution error: Node Type: KSampler, Node ID: 5, Message: {error.message}"  # type: ignore[attr-defined]
    ]


def test_who_gives_up_stops_the_drawing(folder: Path) -> None:
    family = Editor(gate=threading.Event())
    assert family.gate

    async def give_up(api: Api) -> None:
        job = asyncio.create_task(draw_workflow(api, {"workflow": plain(steps=8)}, lambda *_: None))
        await asyncio.to_thread(family.entered.wait, 30)
        job.cancel()
        with pytest.raises(asyncio.CancelledError):
            await job
        family.gate.set()  # type: ignore[union-attr]
        await draw_workflow(api, {"workflow": plain(seed=3)}, lambda *_: None)

    with family.engine(volume=folder) as engine:
        asyncio.run(give_up(Api(engine)))
    assert family.drawn == [3]
    assert family.steps_run <= 2 + 4


@pytest.mark.parametrize("form", ["webp", "jpeg"])
def test_pictures_made_smaller_say_so_in_their_names(engine: Engine, form: Any) -> None:
    reply = asyncio.run(draw_workflow(Api(engine), {"workflow": plain()}, lambda *_: None))
    assert reply.smaller
    [one] = replace(reply, content=reply.smaller(form)).body["images"]
    assert one["filename"] == f"kindling_00001_.{form}"
    assert picture(one).format == form.upper()


def test_where_there_is_a_store_pictures_come_by_url(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BUCKET_ACCESS_KEY_ID", "anybody")
    monkeypatch.setenv("BUCKET_SECRET_ACCESS_KEY", "anything")
    store = {"store_bucket": BUCKET, "store_region": "us-east-1"}
    with s3_server() as s3, Editor().engine(volume=folder, store_endpoint=s3.url, **store) as engine:
        [one] = told(engine, {"workflow": plain()})["images"]
        assert (one["filename"], one["type"]) == ("kindling_00001_.png", "s3_url")
        assert Image.open(io.BytesIO(httpx.get(one["data"]).content)).size == (256, 256)
    with Broken(403) as broken, Editor().engine(volume=folder, store_endpoint=broken.url, **store) as engine:
        answer = told(engine, {"workflow": plain()})
    assert answer["images"][0]["type"] == "base64"
    assert answer["errors"][0].startswith("Error uploading kindling_00001_.png to S3: it answered with status 403")
