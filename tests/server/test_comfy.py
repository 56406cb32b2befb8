"""ComfyUI's routes: prompts, what is told and kept of them, and how they end; a model that paints their seeds."""

import asyncio
import contextlib
import json
import os
import threading
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from workflows import default, item

from comfy_graphs import graph, node
from fakes import Editor, FakeFamily, raises
from handler import create_app
from handler.api.codec import chunks, inscribed
from handler.api.comfy import service
from handler.api.comfy.forwarding import Forwarding
from handler.api.comfy.listeners import Listener
from handler.api.comfy.shelf import Disk
from handler.core.errors import NumericalError

Client = httpx.AsyncClient
Story = Callable[[Client, Any], Awaitable[None]]


@pytest.fixture
def tell(family: FakeFamily, tmp_path: Path) -> Iterator[Callable[..., None]]:
    """Runs a story: it gets a client of an app with the settings given, and the app's `Comfy`."""
    with contextlib.ExitStack() as stack:

        def run(story: Story, painter: FakeFamily = family, **settings: Any) -> None:
            engine = stack.enter_context(painter.engine(**{"volume": tmp_path, **settings}))
            app = create_app(engine, public=False)

            async def main() -> None:
                async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://kindling") as client:
                    await story(client, app._jobs)

            asyncio.run(main())

        yield run


async def post(client: Client, made: Any, **fields: Any) -> str:
    """A prompt that is accepted; its id."""
    answer = await client.post("/prompt", json={"prompt": made, **fields})
    assert answer.status_code == 200, answer.text
    assert answer.json()["node_errors"] == {}
    return str(answer.json()["prompt_id"])


async def ended(client: Client, comfy: Any, prompt_id: str) -> Any:
    """A prompt's history, once it has ended."""
    if job := comfy.active.get(prompt_id):
        await job.over.wait()
    return (await client.get(f"/history/{prompt_id}")).json()[prompt_id]


async def until(true: Callable[[], bool]) -> None:
    """Let others go on until it is."""
    while not true():
        await asyncio.sleep(0)


def texts(png: bytes) -> dict[str, str]:
    """The tEXt chunks of a PNG."""
    found = [bytes(body).partition(b"\0") for kind, body, _ in chunks(png) if kind == b"tEXt"]
    return {keyword.decode(): text.decode() for keyword, _, text in found}


def test_a_prompt_is_drawn_and_its_history_is_comfyuis(tell: Callable[..., None], family: FakeFamily) -> None:
    async def story(client: Client, comfy: Any) -> None:
        page = {"extra_pnginfo": {"workflow": {"nodes": [1]}}, "api_key_comfy_org": "canary"}
        prompt_id = await post(client, made := graph(seed=2**64 - 1, count=2), client_id="me", extra_data=page)
        found = await ended(client, comfy, prompt_id)
        kept = {"extra_pnginfo": {"workflow": {"nodes": [1]}}, "client_id": "me"}
        assert found["prompt"] == [1, prompt_id, made, kept, ["9"]]
        names = ["ComfyUI_00001_.png", "ComfyUI_00002_.png"]
        images = [{"filename": name, "subfolder": "", "type": "output"} for name in names]
        assert found["outputs"] == {"9": {"images": images}}
        status = found["status"]
        assert (status["status_str"], status["completed"]) == ("success", True)
        kinds = ["execution_start", "execution_cached", "execution_success"]
        assert [kind for kind, _ in status["messages"]] == kinds
        assert all(data["prompt_id"] == prompt_id and data["timestamp"] for _, data in status["messages"])
        assert found["meta"]["9"]["node_id"] == "9"
        picture = await client.get("/view", params=images[0])
        assert (picture.headers["content-type"], picture.headers["x-content-type-options"]) == ("image/png", "nosniff")
        said = texts(picture.content)
        assert (json.loads(said["prompt"]), json.loads(said["workflow"])) == (made, {"nodes": [1]})
        assert b"kindling\0" in picture.content
        assert (await client.get("/api/history")).json() == {prompt_id: found}

    tell(story)


def test_a_workflow_as_the_page_saves_it_is_drawn_and_kept_in_its_picture(tell: Callable[..., None]) -> None:
    async def story(client: Client, comfy: Any) -> None:
        saved = default()
        saved["nodes"].append(item(11, "Unknown", (1, 2)))
        for path in ("/prompt", "/api/prompt"):
            answer = await client.post(path, json={"prompt": saved, "client_id": "x"})
            assert answer.status_code == 200, answer.text
            assert any("Node 11 (Unknown)" in note for note in answer.json()["notes"])
        entry = await ended(client, comfy, answer.json()["prompt_id"])
        assert entry["prompt"][2]["3"]["inputs"]["seed"] == 7
        [image] = entry["outputs"]["9"]["images"]
        said = texts((await client.get("/view", params=image)).content)
        assert json.loads(said["workflow"]) == saved
        assert json.loads(said["prompt"]) == entry["prompt"][2]
        own = await post(client, default(), extra_data={"extra_pnginfo": {"workflow": {"own": 1}}})
        [image] = (await ended(client, comfy, own))["outputs"]["9"]["images"]
        said = texts((await client.get("/view", params=image)).content)
        assert json.loads(said["workflow"]) == {"own": 1}
        for bare in (default(seed=8), graph(seed=9)):  # the file itself, as `curl -d @FILE` sends it
            answer = await client.post("/prompt", json=bare)
            assert answer.status_code == 200, answer.text
            assert (await ended(client, comfy, answer.json()["prompt_id"]))["outputs"].keys() == {"9"}
        refused = await client.post("/prompt", json={"prompt": {"nodes": []}})
        assert refused.status_code == 400
        assert "no node that executes" in refused.json()["error"]["message"]

    tell(story)


def test_without_metadata_a_picture_says_nothing(tell: Callable[..., None]) -> None:
    async def story(client: Client, comfy: Any) -> None:
        await ended(client, comfy, await post(client, graph()))
        picture = await client.get("/view?filename=ComfyUI_00001_.png")
        assert {bytes(kind) for kind, _, _ in chunks(picture.content)} == {b"IHDR", b"IDAT", b"IEND"}

    tell(story, metadata=False)


def test_equal_prompts_are_drawn_once(tell: Callable[..., None], family: FakeFamily, tmp_path: Path) -> None:
    """The second reports the outputs of the first, as cached; when its files are gone, it is drawn."""

    async def story(client: Client, comfy: Any) -> None:
        first, second = [await post(client, graph()) for _ in range(2)]
        one, two = [await ended(client, comfy, each) for each in (first, second)]
        assert one["outputs"] == two["outputs"]
        assert len(family.drawn) == 1
        [_, (kind, data), _] = two["status"]["messages"]
        assert (kind, sorted(data["nodes"])) == ("execution_cached", sorted(graph()))
        other = graph()
        other["9"]["inputs"]["filename_prefix"] = "other"
        await ended(client, comfy, await post(client, other))
        (tmp_path / "comfy/output/ComfyUI_00001_.png").unlink()
        third = await ended(client, comfy, await post(client, graph()))
        assert len(family.drawn) == 3
        assert third["outputs"]["9"]["images"][0]["filename"] == "ComfyUI_00001_.png"

    tell(story)


def test_a_file_that_was_replaced_is_another(tell: Callable[..., None], family: FakeFamily) -> None:
    """Also one that is no image of the request: pasted on what was drawn, or asked for its size."""
    made = graph()
    made["10"] = node("LoadImage", image="logo.png")
    made["11"] = node("ImageCompositeMasked", destination=["8", 0], source=["10", 0], x=0, y=0, resize_source=False)
    made["9"]["inputs"]["images"] = ["11", 0]

    async def story(client: Client, comfy: Any) -> None:
        async def drawn(logo: str) -> Any:
            files, over = {"image": ("logo.png", png(logo))}, {"overwrite": "true"}
            assert (await client.post("/upload/image", files=files, data=over)).status_code == 200
            found = await ended(client, comfy, await post(client, made))
            [image] = found["outputs"]["9"]["images"]
            return pixel((await client.get("/view", params=image)).content)

        assert [await drawn(logo) for logo in ("red", "red", "blue")] == [(255, 0, 0), (255, 0, 0), (0, 0, 255)]
        assert len(family.drawn) == 2

    tell(story)


def test_who_listens_may_be_named_beside_the_page(tell: Callable[..., None]) -> None:
    """As ComfyUI keeps it: in `extra_data`, unless the prompt names another."""

    async def story(client: Client, comfy: Any) -> None:
        for fields, wanted in (({}, "me"), ({"client_id": "you"}, "you")):
            prompt_id = await post(client, graph(), extra_data={"client_id": "me"}, **fields)
            assert comfy.find(prompt_id).client == wanted
            await ended(client, comfy, prompt_id)

    tell(story)


def test_what_is_drawn_at_random_is_never_cached(tell: Callable[..., None], family: FakeFamily) -> None:
    async def story(client: Client, comfy: Any) -> None:
        made = graph() | {"10": node("Seed (rgthree)", seed=-1)}
        made["3"]["inputs"]["seed"] = ["10", 0]
        for _ in range(2):
            await ended(client, comfy, await post(client, made))
        assert len({*family.drawn}) == len(family.drawn) == 2

    tell(story)


def test_a_name_has_the_size_that_is_saved_and_the_place_in_its_batch(tell: Callable[..., None]) -> None:
    async def story(client: Client, comfy: Any) -> None:
        made = graph(count=2) | {"20": node("ImageScaleBy", image=["8", 0], upscale_method="area", scale_by=2)}
        made["9"]["inputs"] |= {"images": ["20", 0], "filename_prefix": "%width%x%height%_%batch_num%"}
        found = await ended(client, comfy, await post(client, made))
        width, height = (2 * made["5"]["inputs"][side] for side in ("width", "height"))
        names = [one["filename"] for one in found["outputs"]["9"]["images"]]
        assert names == [f"{width}x{height}_{number}_00001_.png" for number in range(2)]

    tell(story)


def test_outputs_that_ask_for_one_picture_draw_it_once(tell: Callable[..., None], family: FakeFamily) -> None:
    async def story(client: Client, comfy: Any) -> None:
        made = graph() | {"10": node("PreviewImage", images=["8", 0])}
        found = await ended(client, comfy, await post(client, made))
        kinds = {name: output["images"][0]["type"] for name, output in found["outputs"].items()}
        assert (kinds, len(family.drawn)) == ({"9": "output", "10": "temp"}, 1)
        only = await ended(client, comfy, await post(client, made, partial_execution_targets=["10"]))
        assert only["outputs"].keys() == {"10"}
        answer = await client.post("/prompt", json={"prompt": made, "partial_execution_targets": ["3"]})
        assert answer.json()["error"]["type"] == "prompt_no_outputs"

    tell(story)


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        ({}, "no_prompt"),
        ({"prompt": []}, "no_prompt"),
        ({"prompt": graph(), "prompt_id": "../x"}, "invalid_prompt_id"),
        ({"prompt": {"1": {"class_type": "Nobody", "inputs": {}}}}, "missing_node_type"),
        ({"prompt": graph(prefix="../../x")}, "prompt_outputs_failed_validation"),
        ({"prompt": graph(prefix="/etc/x")}, "prompt_outputs_failed_validation"),
        ({"prompt": graph(), "partial_execution_targets": 9}, "invalid_request_error"),
        ({"prompt": graph() | {"9": node("SaveImage", images=["9", 0])}}, "prompt_outputs_failed_validation"),
    ],
)
def test_what_is_refused_is_told_as_comfyui_does(
    tell: Callable[..., None], family: FakeFamily, body: dict[str, Any], kind: str
) -> None:
    async def story(client: Client, comfy: Any) -> None:
        answer = await client.post("/api/prompt", json=body)
        said = answer.json()
        assert (answer.status_code, said["error"]["type"]) == (400, kind)
        assert {"message", "details", "extra_info"} <= said["error"].keys()
        assert isinstance(said["node_errors"], dict)
        assert (family.drawn, comfy.active) == ([], {})

    tell(story)


@pytest.mark.parametrize("media", ["text/plain;charset=UTF-8", "application/x-www-form-urlencoded", ""])
def test_a_client_need_not_say_that_it_sends_json(tell: Callable[..., None], media: str) -> None:
    async def story(client: Client, comfy: Any) -> None:
        sent: dict[str, Any] = {"content": json.dumps({"prompt": graph()}), "headers": {"content-type": media}}
        answer = await client.post("/prompt", **sent)
        assert (await ended(client, comfy, answer.json()["prompt_id"]))["status"]["completed"]
        assert (await client.post("/v1/images/generations", **sent)).status_code == (415 if "text" in media else 400)

    tell(story)


def test_a_worker_draws_as_many_at_once_as_it_is_set_to(tell: Callable[..., None]) -> None:
    async def story(client: Client, comfy: Any) -> None:
        await ended(client, comfy, await post(client, graph(count=2)))
        answer = await client.post("/prompt", json={"prompt": graph(count=3)})
        assert "batch_size is 3; at most 2" in answer.text

    tell(story, max_n=2)


def test_what_waits_is_listed_taken_and_interrupted(tell: Callable[..., None], family: FakeFamily) -> None:
    family.gate = threading.Event()

    async def story(client: Client, comfy: Any) -> None:
        drawn, taken, stopped, left = [await post(client, graph(seed=seed)) for seed in range(4)]
        await asyncio.to_thread(family.entered.wait)
        await asyncio.sleep(0)
        queue = (await client.get("/queue")).json()
        assert [[item[1] for item in queue[name]] for name in ("queue_running", "queue_pending")] == [
            [drawn],
            [taken, stopped, left],
        ]
        assert (await client.get("/prompt")).json() == {"exec_info": {"queue_remaining": 4}}
        states = {one["id"]: one["status"] for one in (await client.get("/api/jobs")).json()["jobs"]}
        assert [states[each] for each in (drawn, taken)] == ["in_progress", "pending"]
        assert (await client.get(f"/history/{taken}")).json() == {}
        await client.post("/queue", json={"delete": [taken, "nobody"]})
        await client.post("/interrupt", json={"prompt_id": stopped})
        await client.post("/interrupt")  # what is drawn
        await ended(client, comfy, drawn)
        assert family.gate
        family.gate.set()
        found = await ended(client, comfy, left)
        assert found["status"]["status_str"] == "success"
        interrupted = (await client.get(f"/history/{drawn}")).json()[drawn]["status"]
        assert (interrupted["status_str"], interrupted["completed"]) == ("error", False)
        assert interrupted["messages"][-1][0] == "execution_interrupted"
        assert (await client.get(f"/history/{taken}")).json() == {}
        assert family.drawn == [3]
        pages = [
            (await client.get("/api/jobs", params={"status": state})).json() for state in ("cancelled", "completed")
        ]
        assert [page["pagination"]["total"] for page in pages] == [3, 1]
        assert (await client.post(f"/api/jobs/{left}/cancel")).json() == {"cancelled": False}

    tell(story)


def test_a_failure_is_told_in_a_sentence(tell: Callable[..., None], family: FakeFamily) -> None:
    family.at_step = {2: raises(NumericalError("The picture came out black."))}

    async def story(client: Client, comfy: Any) -> None:
        prompt_id = await post(client, graph())
        status = (await ended(client, comfy, prompt_id))["status"]
        kind, data = status["messages"][-1]
        assert (status["status_str"], kind) == ("error", "execution_error")
        assert data["exception_message"] == "The picture came out black."
        assert (data["node_type"], data["traceback"]) == ("KSampler", [])
        job = (await client.get(f"/api/jobs/{prompt_id}")).json()
        assert (job["status"], job["execution_error"]["exception_type"]) == ("failed", "NumericalError")

    tell(story)


def test_a_prompt_has_a_deadline_from_when_it_came(tell: Callable[..., None], family: FakeFamily) -> None:
    family.gate = threading.Event()

    async def story(client: Client, comfy: Any) -> None:
        answer = await client.post("/prompt", json={"prompt": graph()}, headers={"x-deadline-s": "1"})
        data = (await ended(client, comfy, answer.json()["prompt_id"]))["status"]["messages"][-1][1]
        assert data["exception_type"] == "DeadlineExceeded"
        answer = await client.post("/prompt", json={"prompt": graph()}, headers={"x-deadline-s": "soon"})
        assert answer.status_code == 400

    tell(story)


def test_more_than_may_wait_is_refused_and_harms_nobody(tell: Callable[..., None], family: FakeFamily) -> None:
    family.gate = threading.Event()

    async def story(client: Client, comfy: Any) -> None:
        accepted = [await post(client, graph(seed=0))]
        await asyncio.to_thread(family.entered.wait)
        accepted += [await post(client, graph(seed=seed, count=2)) for seed in (1, 2)]  # each is one request
        full = await client.post("/prompt", json={"prompt": graph(seed=9)})
        assert (full.status_code, full.json()["error"]["code"]) == (429, "queue_full")
        assert full.json()["error"]["message"] == "2 requests are waiting already; try again later."
        assert full.headers["retry-after"]
        assert family.gate
        family.gate.set()
        for each in accepted:
            assert (await ended(client, comfy, each))["status"]["completed"]

    tell(story, queue=2)


def test_a_worker_that_leaves_draws_what_it_accepted(tell: Callable[..., None], family: FakeFamily) -> None:
    family.gate = threading.Event()

    async def story(client: Client, comfy: Any) -> None:
        accepted = [await post(client, graph(seed=seed)) for seed in range(2)]
        comfy.api.engine.drain()
        refused = await client.post("/prompt", content=b"unread")
        assert (refused.status_code, comfy.busy) == (503, True)
        assert family.gate
        family.gate.set()
        for each in accepted:
            assert (await ended(client, comfy, each))["status"]["completed"]
        assert not comfy.busy

    tell(story)


def test_the_history_has_pages_and_can_be_cleared(tell: Callable[..., None]) -> None:
    async def story(client: Client, comfy: Any) -> None:
        ids = [await post(client, graph(seed=seed)) for seed in range(4)]
        for each in ids:
            await ended(client, comfy, each)

        async def listed(query: str = "") -> list[str]:
            return [*(await client.get(f"/history{query}")).json()]

        assert await listed() == ids
        assert await listed("?max_items=2") == ids[2:]
        assert await listed("?max_items=2&offset=1") == ids[1:3]
        assert (await client.get("/history?max_items=x")).status_code == 400
        await client.post("/history", json={"delete": [ids[0], "../../x"]})
        assert await listed() == ids[1:]
        await client.post("/history", json={"clear": True})
        assert await listed() == []
        assert (await client.get(f"/api/jobs/{ids[1]}")).status_code == 404

    tell(story)


def test_ended_prompts_at_hand_have_a_bound_in_bytes(
    tell: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a page sends beside a graph is kept; the history has all of it from the disk."""
    monkeypatch.setattr(service, "HELD", 50_000)

    async def story(client: Client, comfy: Any) -> None:
        page = {"extra_pnginfo": {"workflow": "x" * 30_000}}
        ids, histories = list[str](), list[Any]()
        for seed in (1, 2):
            ids.append(await post(client, graph(seed=seed), extra_data=page))
            histories.append(await ended(client, comfy, ids[-1]))
        assert [job.id for job in comfy.jobs()] == ids[1:]
        assert all(found["prompt"][3] == page and found["outputs"] for found in histories)
        again = await ended(client, comfy, await post(client, graph(seed=1), extra_data=page))
        assert again["outputs"] == histories[0]["outputs"]  # an equal one is not drawn again

    tell(story)


def test_another_worker_answers_for_what_this_one_drew(tell: Callable[..., None]) -> None:
    """And one that starts later: by the volume."""
    told: dict[str, Any] = {}

    async def draw(client: Client, comfy: Any) -> None:
        told["id"] = await post(client, graph())
        told["entry"] = await ended(client, comfy, told["id"])

    async def ask(client: Client, comfy: Any) -> None:
        assert (await client.get("/history")).json() == {told["id"]: told["entry"]}
        assert (await client.get(f"/history/{told['id']}")).json() == {told["id"]: told["entry"]}
        assert (await client.get(f"/api/jobs/{told['id']}")).json()["status"] == "completed"
        [image] = told["entry"]["outputs"]["9"]["images"]
        assert (await client.get("/view", params=image)).content.startswith(b"\x89PNG")

    tell(draw)
    tell(ask)


def test_a_prompt_that_comes_again_under_its_id_is_one(tell: Callable[..., None], family: FakeFamily) -> None:
    family.gate = threading.Event()

    async def story(client: Client, comfy: Any) -> None:
        assert await post(client, graph(), prompt_id="mine") == await post(client, graph(), prompt_id="mine") == "mine"
        other = await client.post("/prompt", json={"prompt": graph(seed=8), "prompt_id": "mine"})
        assert (other.status_code, len(comfy.active)) == (400, 1)

    tell(story)


def png(colour: str = "red", size: tuple[int, int] = (64, 64), mode: str = "RGB") -> bytes:
    """An image that somebody sends."""
    import io

    from PIL import Image

    buffer = io.BytesIO()
    Image.new(mode, size, colour).save(buffer, "PNG")
    return buffer.getvalue()


def test_uploads_are_kept_under_names_of_their_own(tell: Callable[..., None]) -> None:
    async def story(client: Client, comfy: Any) -> None:
        async def send(data: bytes, name: str = "x.png", **fields: str) -> Any:
            answer = await client.post("/upload/image", files={"image": (name, data)}, data=fields)
            assert answer.status_code == 200, answer.text
            return answer.json()

        assert await send(png()) == {"name": "x.png", "subfolder": "", "type": "input"}
        assert (await send(png()))["name"] == "x.png"
        assert (await send(png("blue")))["name"] == "x (1).png"
        assert (await send(png("green"), overwrite="true"))["name"] == "x.png"
        there = await send(png(), subfolder="a/b", type="temp")
        assert there == {"name": "x.png", "subfolder": "a/b", "type": "temp"}
        assert (await client.get("/view?filename=x.png&subfolder=a/b&type=temp")).content == png()
        assert (await client.get("/view?filename=x.png%20[input]")).content == png("green")
        await send(png(), subfolder="z.png")
        assert (await send(png(), "z.png"))["name"] == "z (1).png"
        page = await send(b"<script>", "page.html")
        shown = await client.get("/view", params={"filename": page["name"], "type": "input"})
        assert shown.headers["content-disposition"].startswith("attachment")
        assert shown.headers["content-type"] == "application/octet-stream"

    tell(story)


def test_a_mask_becomes_the_alpha_of_what_was_sent_before(tell: Callable[..., None]) -> None:
    async def story(client: Client, comfy: Any) -> None:
        await client.post("/upload/image", files={"image": ("x.png", png())})
        half = png("#00000080", mode="RGBA")
        original = json.dumps({"filename": "x.png", "subfolder": "", "type": "input"})
        await client.post(
            "/upload/image", files={"image": ("w.png", inscribed(png(), {"workflow": '{"title": "caf\\u00e9"}'}))}
        )
        of = {"original_ref": json.dumps({"filename": "w.png", "type": "input"})}
        await client.post("/upload/mask", files={"image": ("mw.png", half)}, data=of)
        assert (
            texts((await client.get("/view?filename=mw.png&type=input")).content)["workflow"]
            == '{"title": "caf\\u00e9"}'
        )
        comfy.archive._tidied = 0.0
        answer = await client.post("/upload/mask", files={"image": ("m.png", half)}, data={"original_ref": original})
        await until(lambda: comfy.archive._tidied > 0)  # as with every file that comes
        assert answer.json()["name"] == "m.png"
        answers = [
            await client.get(f"/view?filename=m.png&type=input{more}") for more in ("&channel=a", "&channel=rgb")
        ]
        assert [pixel(answer.content) for answer in answers] == [(0, 0, 0, 128), (255, 0, 0)]
        lost = await client.post(
            "/upload/mask", files={"image": ("m.png", half)}, data={"original_ref": '{"filename": "none.png"}'}
        )
        assert lost.status_code == 404
        below = {"original_ref": '{"filename": "y.png", "subfolder": "x.png", "type": "input"}'}
        lost = await client.post("/upload/mask", files={"image": ("m.png", half)}, data=below)
        assert lost.status_code == 404

    tell(story)


def pixel(data: bytes) -> Any:
    """The first of a picture."""
    import io

    from PIL import Image

    with Image.open(io.BytesIO(data)) as picture:
        return picture.getpixel((0, 0))


def test_a_picture_may_be_looked_at_smaller(tell: Callable[..., None]) -> None:
    async def story(client: Client, comfy: Any) -> None:
        await client.post("/upload/image", files={"image": ("x.png", png())})
        for preview, media in (("webp;90", "webp"), ("jpeg", "jpeg"), ("bmp", "webp")):
            answer = await client.get("/view", params={"filename": "x.png", "type": "input", "preview": preview})
            assert answer.headers["content-type"] == f"image/{media}"
        await client.post("/upload/image", files={"image": ("x.txt", b"no picture")})
        answer = await client.get("/view?filename=x.txt&type=input&preview=webp")
        assert answer.status_code == 400

    tell(story)


TRAVERSALS = [
    ("filename=../../secret", 400),
    ("filename=..%2f..%2fsecret", 400),
    ("filename=%2e%2e/secret", 400),
    ("filename=..%252fsecret", 400),
    ("filename=/etc/passwd", 400),
    ("filename=%2Fetc%2Fpasswd", 400),
    ("filename=..%5csecret", 400),
    ("filename=C:%5cx", 400),
    ("filename=x%00.png", 400),
    ("filename=", 400),
    ("", 400),
    ("filename=x.png&type=../..", 400),
    ("filename=x.png&type=jobs", 400),
    ("filename=x.png&subfolder=..", 403),
    ("filename=x.png&subfolder=/etc", 403),
    ("filename=x.png&subfolder=a/../../..", 403),
    ("filename=x.png&subfolder=%2e%2e%2f%2e%2e", 403),
    ("filename=key.png&subfolder=link", 403),
    ("filename=link.png", 404),
    ("filename=none.png", 404),
]


@pytest.mark.parametrize(("query", "status"), TRAVERSALS)
def test_nothing_outside_is_shown(tell: Callable[..., None], tmp_path: Path, query: str, status: int) -> None:
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret/key.png").write_bytes(b"secret")
    output = tmp_path / "comfy/output"
    output.mkdir(parents=True)
    (output / "link").symlink_to(tmp_path / "secret")
    (output / "link.png").symlink_to(tmp_path / "secret/key.png")

    async def story(client: Client, comfy: Any) -> None:
        answer = await client.get(f"/view?{query}")
        assert answer.status_code == status
        assert "secret" not in answer.text

    tell(story)


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("../x.png", {}),
        ("/etc/x.png", {}),
        ("a\\..\\x.png", {}),
        (".x.png", {}),
        ("x.png", {"subfolder": ".."}),
        ("x.png", {"subfolder": "/tmp"}),
        ("x.png", {"subfolder": "a/../../.."}),
        ("x.png", {"type": "../.."}),
        ("x.png", {"type": "jobs"}),
    ],
)
def test_nothing_outside_is_written(
    tell: Callable[..., None], tmp_path: Path, name: str, fields: dict[str, str]
) -> None:
    async def story(client: Client, comfy: Any) -> None:
        answer = await client.post("/upload/image", files={"image": (name, png())}, data=fields)
        assert answer.status_code in (400, 403)
        mask = {"original_ref": json.dumps({"filename": name, **fields})}
        answer = await client.post("/upload/mask", files={"image": ("m.png", png())}, data=mask)
        assert answer.status_code in (400, 403, 404)

    tell(story)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_what_a_worker_says_of_itself(tell: Callable[..., None]) -> None:
    async def story(client: Client, comfy: Any) -> None:
        async def get(path: str) -> Any:
            answer = await client.get(path)
            assert answer.status_code == 200, path
            return answer.json()

        stats = await get("/system_stats")
        assert (stats["system"]["argv"], stats["devices"][0]["type"]) == (["--disable-api-nodes"], "cpu")
        assert stats["system"]["ram_total"] > stats["system"]["ram_free"] > 0
        assert (await get("/features"))["max_upload_size"] == 50_000_000
        assert "spark.safetensors" in await get("/models/checkpoints")
        assert {"checkpoints", "loras", "vae", "text_encoders", "embeddings"} <= {*await get("/models")}
        assert await get("/embeddings") == []
        assert (await client.get("/models/nobody")).status_code == 404
        assert (await get("/object_info")).keys() >= {"KSampler", "SaveImage"}
        assert (await get("/object_info/KSampler")).keys() == {"KSampler"}
        assert await get("/object_info/Nobody") == {}
        assert (await client.post("/free", json={"unload_models": True})).status_code == 200

    tell(story)


def test_a_second_sampler_draws_on_the_picture_of_the_first(tell: Callable[..., None], tmp_path: Path) -> None:
    """Two runs, of which the history shows one picture."""
    painter = Editor()

    async def story(client: Client, comfy: Any) -> None:
        made = graph(seed=2)
        again = {**made["3"]["inputs"], "seed": 3, "denoise": 0.5, "latent_image": ["12", 0]}
        made |= {
            "11": node("ImageScale", image=["8", 0], upscale_method="lanczos", width=128, height=128, crop="disabled")
        }
        made |= {"12": node("VAEEncode", pixels=["11", 0], vae=["4", 2]), "13": node("KSampler", **again)}
        made |= {"14": node("VAEDecode", samples=["13", 0], vae=["4", 2])}
        made["9"]["inputs"]["images"] = ["14", 0]
        prompt_id = await post(client, made)
        found = await ended(client, comfy, prompt_id)
        assert found["status"]["completed"], found
        [image] = found["outputs"]["9"]["images"]
        data = (await client.get("/view", params=image)).content
        assert data[16:24] == (128).to_bytes(4) * 2
        assert comfy.find(prompt_id).pictures == []  # which would stay in memory

    tell(story, painter)


def test_a_prompt_whose_client_is_cancelled_is_drawn(tell: Callable[..., None], family: FakeFamily) -> None:
    """It was accepted: while its record is written, whoever mounts this app may end its request."""
    writing, go = threading.Event(), threading.Event()

    class Slow(Disk):
        def put(self, name: str, data: bytes, anew: bool = False) -> None:
            if name.startswith("jobs/") and not go.is_set():
                writing.set()
                go.wait()
            super().put(name, data, anew)

    async def story(client: Client, comfy: Any) -> None:
        comfy.archive._shelf = Slow(comfy.archive.shelf._root, shared=True)
        asked = asyncio.create_task(post(client, graph(), prompt_id="a"))
        await asyncio.to_thread(writing.wait)
        asked.cancel()
        await asyncio.gather(asked, return_exceptions=True)
        go.set()
        assert (await ended(client, comfy, "a"))["status"]["completed"]
        assert not comfy.busy

    tell(story)


def test_what_hangs_on_the_volume_takes_no_thread_that_others_need(tell: Callable[..., None]) -> None:
    """Prompts whose image never comes end by their deadlines, and pictures are encoded meanwhile."""
    go = threading.Event()

    class Hanging(Disk):
        def get(self, name: str) -> bytes:
            go.wait()
            return super().get(name)

    async def story(client: Client, comfy: Any) -> None:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
        await client.post("/upload/image", files={"image": ("x.png", png())})
        comfy.archive._shelf = Hanging(comfy.archive.shelf._root, shared=True)
        made = graph()
        made["5"] = node("VAEEncode", pixels=["10", 0], vae=["4", 2])
        made["10"] = node("LoadImage", image="x.png")
        late = await client.post("/prompt", json={"prompt": made}, headers={"x-deadline-s": "0.2"})
        assert late.status_code == 504
        try:
            assert (await client.get("/features")).status_code == 200
            assert (await ended(client, comfy, await post(client, graph())))["status"]["completed"]
        finally:
            go.set()

    tell(story, deadline_s=30.0)


def test_what_the_engine_tells_too_late_revives_nothing(tell: Callable[..., None], family: FakeFamily) -> None:
    """A picture begins while its prompt is taken back: what was told of that comes when it has ended."""
    family.gate, begun = threading.Event(), threading.Semaphore(0)
    family.at_step = {1: begun.release}

    async def story(client: Client, comfy: Any) -> None:
        first, second = [comfy.active[await post(client, graph(seed=seed))] for seed in range(2)]
        await asyncio.to_thread(family.entered.wait)
        await until(lambda: comfy.api.engine.waiting == 1)
        comfy.cancel(second)
        assert family.gate
        family.gate.set()
        begun.acquire()
        begun.acquire()  # on this loop, which hears of the second's begin only then
        await second.over.wait()
        await first.over.wait()
        assert (second.state, second.started, second.executed) == ("cancelled", None, [])

    tell(story)


def test_what_is_too_old_goes_though_nothing_is_drawn(tell: Callable[..., None], tmp_path: Path) -> None:
    """Neither does a file that cannot be removed harm a prompt: what a link of its owner's leads to stays."""
    (theirs := tmp_path / "theirs").mkdir()
    (old := theirs / "old.png").write_bytes(png())
    os.utime(old, (1, 1))

    async def story(client: Client, comfy: Any) -> None:
        await client.post("/upload/image", files={"image": ("x.png", png())})
        os.utime(tmp_path / "comfy/input/x.png", (1, 1))
        comfy.archive._tidied = 0.0
        await client.post("/upload/image", files={"image": ("y.png", png())})
        await asyncio.gather(*comfy._tasks)
        assert os.listdir(tmp_path / "comfy/input") == ["y.png"]
        (tmp_path / "comfy/input").rename(tmp_path / "away")
        (tmp_path / "comfy/input").symlink_to(theirs)
        comfy.archive._tidied = 0.0
        assert (await ended(client, comfy, await post(client, graph())))["status"]["completed"]
        await asyncio.gather(*comfy._tasks)
        assert old.exists()

    tell(story)


def test_uploads_of_one_name_never_run_out(tell: Callable[..., None]) -> None:
    async def story(client: Client, comfy: Any) -> None:
        names = []
        for data in (*range(25), 24):
            answer = await client.post("/upload/image", files={"image": ("x.png", b"%d" % data)})
            names.append(answer.json()["name"])
        assert names[19] == "x (19).png"
        assert names[24] == names[25] != names[23]
        assert "x (20).png" not in names
        assert (await client.get("/view", params={"filename": names[24], "type": "input"})).content == b"24"
        inner = await client.post("/upload/image", files={"image": ("y.png", b"")}, data={"subfolder": "x.png"})
        assert (inner.status_code, inner.json()["error"]["code"]) == (503, "volume_failed")

    tell(story)


@pytest.mark.parametrize("listens", [False, True], ids=["it only posted", "it listened and left"])
def test_a_client_that_goes_to_another_worker_meanwhile_hears_of_the_end(
    tell: Callable[..., None], family: FakeFamily, listens: bool
) -> None:
    family.gate = threading.Event()
    comfies: list[Any] = []

    async def other(client: Client, comfy: Any) -> None:
        comfies.append(comfy)

    async def story(client: Client, comfy: Any) -> None:
        before = Listener("me")
        if listens:
            comfy.listeners.add(before)
        prompt_id = await post(client, graph(), client_id="me")
        comfy.listeners.remove(before)
        after = Listener("me")
        forwarding = Forwarding(comfies[0], after)
        await forwarding.begin()
        await forwarding.look()
        assert not after.behind
        assert family.gate
        family.gate.set()
        await ended(client, comfy, prompt_id)
        await forwarding.look()
        told = []
        while after.behind:
            told.append(json.loads(str(await after.next())))
        assert [each["type"] for each in told[-2:]] == ["execution_success", "executing"]
        assert told[-1]["data"] == {"node": None, "prompt_id": prompt_id}
        again = Forwarding(comfies[0], late := Listener("me"))
        await again.begin()
        await again.look()
        assert not late.behind

    tell(other)
    tell(story)
