"""Streamed answers over HTTP: the official client, on a real server; and what a client sees when things go wrong."""

import asyncio
import base64
import contextlib
import io
import json
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import openai
import pytest
from PIL import Image
from starlette.requests import ClientDisconnect
from starlette.responses import StreamingResponse

from fakes import FakeFamily, raises
from handler import Api, Engine, Settings
from handler.api.dialects import openai as dialect
from handler.api.dialects.routes import DIALECTS, HUB_ROUTE, WORKFLOWS, dialect_of
from handler.api.reply import Reply
from handler.api.showing import OnPartial
from handler.core.errors import NumericalError
from handler.server import sse as streams
from serving import Served, serving
from threads import until

ROUTE = "/v1/images/generations"
ASKED: dict[str, Any] = {"prompt": "a red circle on a blue background", "size": "256x256"}


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with serving() as served:
        yield served


@pytest.fixture(scope="module")
def client(server: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as client:
        yield client


def events(text: str) -> list[dict[str, Any]]:
    """The events of a stream, each of which says its type twice."""
    found = []
    for block in text.split("\n\n"):
        lines = dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith(":"))
        if lines:
            found.append(json.loads(lines["data"]))
            assert found[-1].get("type") == lines.get("event")
    return found


def test_the_official_client_streams(client: openai.OpenAI) -> None:
    whole = client.images.generate(model="spark", extra_body={"seed": 7}, **ASKED)
    with client.images.generate(
        model="spark", stream=True, partial_images=3, extra_body={"seed": 7}, **ASKED
    ) as stream:
        *partials, last = list(stream)
    assert [event.type for event in partials] == ["image_generation.partial_image"] * 3
    assert [event.partial_image_index for event in partials] == [0, 1, 2]
    for event in partials:
        assert Image.open(io.BytesIO(base64.b64decode(event.b64_json))).size == (32, 32)
    assert last.type == "image_generation.completed"
    assert whole.data
    assert last.b64_json == whole.data[0].b64_json
    assert (last.size, last.output_format) == ("256x256", "png")
    assert whole.usage
    assert last.usage.total_tokens == last.usage.input_tokens_details.text_tokens == whole.usage.input_tokens > 0


def test_the_async_client_streams_without_partial_pictures(server: Served) -> None:
    async def run() -> list[Any]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as client:
            stream = await client.images.generate(stream=True, **ASKED)
            return [event async for event in stream]

    assert [event.type for event in asyncio.run(run())] == ["image_generation.completed"]


def test_every_picture_of_n_has_its_last_event(server: Served) -> None:
    answer = httpx.post(server.url + ROUTE, json=ASKED | {"stream": True, "n": 2, "seed": 5}, timeout=60)
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert [(event["type"], event["seed"]) for event in events(answer.text)] == [
        ("image_generation.completed", 5),
        ("image_generation.completed", 6),
    ]


def test_our_own_route_streams_its_own_shape(server: Served) -> None:
    asked = {"prompt": "a red circle", "stream": True, "partial_images": 1}
    partial, last = events(httpx.post(f"{server.url}/generate", json=asked, timeout=60).text)
    assert partial["type"] == "image_generation.partial_image"
    assert last["images"][0]["parameters"]["prompt"] == "a red circle"


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"size": "17x17"}, 422, "size"),
        ({"partial_images": 4}, 422, "partial_images"),
        ({"nothing": 1}, 400, "nothing"),
    ],
)
def test_bad_input_has_its_status_as_without_a_stream(
    server: Served, fields: dict[str, Any], status: int, param: str
) -> None:
    answer = httpx.post(server.url + ROUTE, json=ASKED | {"stream": True} | fields, timeout=60)
    assert (answer.status_code, answer.json()["error"]["param"]) == (status, param)


def test_partial_pictures_without_a_stream_are_refused(server: Served) -> None:
    answer = httpx.post(server.url + ROUTE, json=ASKED | {"partial_images": 1}, timeout=60)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "unsupported_parameter")


@pytest.mark.parametrize("leaves", ["before the first event", "as the answer begins", "midway", "after the last"])
def test_a_client_that_leaves_a_stream_stops_its_work(family: FakeFamily, leaves: str) -> None:
    """Held at its third step, it never comes to a fourth."""
    holds, go = threading.Event(), threading.Event()
    at = {"before the first event": 0, "as the answer begins": 1, "midway": 2, "after the last": 99}[leaves]

    def hold() -> None:
        holds.set()
        assert go.wait(30)

    family.at_step = {3: hold} if at < 99 else {}
    said: list[str] = []

    async def send(message: Any) -> None:
        said.append(message["type"])
        if len(said) == at:
            raise OSError  # as uvicorn does where nobody listens any more

    async def receive() -> Any:
        await asyncio.Event().wait()

    async def main(engine: Engine) -> None:
        payload = ASKED | {"stream": True, "num_inference_steps": 8, "partial_images": 3 if at else 0}
        calls: list[asyncio.Task[Reply]] = []

        async def call(on_partial: OnPartial) -> Reply:
            calls.append(asyncio.current_task())  # type: ignore[arg-type]
            return await Api(engine).call(ROUTE, payload, on_partial=on_partial)

        asked = asyncio.create_task(streams.stream(call, dialect.completed))
        if at < 99:
            assert await asyncio.to_thread(holds.wait, 30)
        if at == 0:
            asked.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asked
            assert asked.cancelled()
        else:
            answer = await asked
            assert isinstance(answer, StreamingResponse)
            scope = {"type": "http", "asgi": {"version": "3.0", "spec_version": "2.4"}}
            with pytest.raises(ClientDisconnect) if at < 99 else contextlib.nullcontext():
                await answer(scope, receive, send)
        await asyncio.wait(calls)
        assert calls[0].cancelled() == (at < 99)
        go.set()

    with family.engine() as engine:
        asyncio.run(main(engine))
        until(lambda: not engine._executor.jobs)
        assert family.steps_run == (3 if at < 99 else 8)
        assert engine.queue.ended == ({("cancelled", "denoise"): 1} if at < 99 else {("drawn", "denoise"): 1})


def test_a_client_that_left_before_the_answer_began_stops_its_work(family: FakeFamily) -> None:
    """Where the server says that it is gone, before any byte was asked for: uvicorn, by the older protocol."""
    family.gate = threading.Event()

    async def main(engine: Engine) -> None:
        task = asyncio.create_task(Api(engine).call(ROUTE, ASKED))
        assert await asyncio.to_thread(family.entered.wait, 30)

        async def body() -> AsyncIterator[bytes]:
            raise AssertionError("nobody asks for this")
            yield b""

        async def receive() -> Any:
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            await asyncio.Event().wait()  # for who takes nothing

        scope = {"type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}}
        await streams.Streaming(body(), task)(scope, receive, send)
        await asyncio.wait([task])
        assert task.cancelled()
        assert family.gate
        family.gate.set()

    with family.engine() as engine:
        asyncio.run(main(engine))
        until(lambda: not engine._executor.jobs)
    assert family.steps_run == 1


def streamed(family: FakeFamily, **fields: Any) -> list[bytes] | Reply:
    """What a stream over a fake model sends."""

    async def run() -> list[bytes] | Reply:
        engine = Engine(Settings(), boot=family.boot)
        engine.start()
        try:
            payload = ASKED | {"stream": True} | fields
            found = await streams.stream(
                lambda each: Api(engine).call(ROUTE, payload, on_partial=each), dialect.completed
            )
            if isinstance(found, StreamingResponse):
                return [bytes(chunk) async for chunk in found.body_iterator]  # type: ignore[arg-type]
            return found
        finally:
            await asyncio.to_thread(engine.stop)

    return asyncio.run(run())


def test_an_error_midway_is_the_last_event() -> None:
    found = streamed(FakeFamily(at_step={3: raises(NumericalError("NaN."))}), partial_images=2)
    assert isinstance(found, list)
    *partials, last = events(b"".join(found).decode())
    assert [event["type"] for event in partials] == ["image_generation.partial_image"]
    assert last["error"]["code"] == "numerical_error"


def test_a_picture_that_comes_before_anything_was_said_is_a_stream_of_one_event() -> None:
    async def call(on_partial: OnPartial) -> Reply:
        return Reply(200, {"created": 1})

    async def run() -> tuple[Any, bytes]:
        found = await streams.stream(call, lambda body: [body | {"type": "a.kind"}])
        assert isinstance(found, StreamingResponse)
        return found.headers, b"".join([bytes(chunk) async for chunk in found.body_iterator])  # type: ignore[arg-type]

    headers, text = asyncio.run(run())
    assert text == b'event: a.kind\ndata: {"created":1,"type":"a.kind"}\n\n'
    assert headers["content-type"] == "text/event-stream; charset=utf-8"
    assert (headers["cache-control"], headers["x-accel-buffering"]) == ("no-store", "no")


def test_an_error_before_anything_was_said_is_a_reply() -> None:
    found = streamed(FakeFamily(at_step={1: raises(NumericalError("NaN."))}))
    assert isinstance(found, Reply)
    assert found.status == 500


def test_a_silent_stream_is_kept_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "PATIENCE_S", 0.01)
    gate = threading.Event()
    family = FakeFamily(gate=gate)
    alive = 0

    async def run() -> None:
        nonlocal alive
        engine = Engine(Settings(), boot=family.boot)
        engine.start()
        found = await streams.stream(
            lambda each: Api(engine).call(ROUTE, ASKED | {"stream": True}, on_partial=each), dialect.completed
        )
        assert isinstance(found, StreamingResponse)
        chunks = []
        async for chunk in found.body_iterator:
            chunks.append(bytes(chunk))  # type: ignore[arg-type]
            alive += chunk == streams.ALIVE
            if alive == 3:
                gate.set()
        assert events(b"".join(chunks).decode())[-1]["type"] == "image_generation.completed"
        await asyncio.to_thread(engine.stop)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(run())
    assert alive >= 3


def test_a_stream_is_alive_before_a_proxy_cuts_it_and_holds_all_that_one_request_says() -> None:
    assert streams.PATIENCE_S == 10.0
    assert streams.HELD == 4
    assert streams.HEADERS == {"cache-control": "no-store", "x-accel-buffering": "no"}


@pytest.mark.parametrize("status", [400, 404, 503])
def test_what_is_refused_after_a_while_of_silence_is_the_last_event(
    status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its status was 200 by then."""
    monkeypatch.setattr(streams, "PATIENCE_S", 0.01)
    go = asyncio.Event()

    async def call(on_partial: OnPartial) -> Reply:
        await go.wait()
        return Reply(status, {"error": {"code": "refused"}})

    async def run() -> list[bytes]:
        found = await streams.stream(call, dialect.completed)
        assert isinstance(found, StreamingResponse)
        go.set()
        return [bytes(chunk) async for chunk in found.body_iterator]  # type: ignore[arg-type]

    first, *others = asyncio.run(run())
    assert first == streams.ALIVE
    assert events(b"".join(others).decode()) == [{"error": {"code": "refused"}}]


def test_a_slow_reader_misses_the_oldest_partial_pictures_and_never_the_last_word(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(streams, "HELD", 2)
    told = threading.Event()
    reply = Reply(200, {"created": 1, "size": "8x8", "data": [{"b64_json": "", "seed": 1}], "output_format": "png"})

    async def call(on_partial: OnPartial) -> Reply:
        on_partial({"number": 0})
        await asyncio.sleep(0)
        await asyncio.to_thread(told.wait, 10)
        for number in range(1, 10):
            on_partial({"number": number})
        return reply

    async def run() -> str:
        found = await streams.stream(call, lambda body: [{"last": True}])
        assert isinstance(found, StreamingResponse)
        chunks = found.body_iterator.__aiter__()
        first = await chunks.__anext__()
        told.set()
        while [task for task in asyncio.all_tasks() if task.get_coro().__name__ == "call"]:  # type: ignore[union-attr]
            await asyncio.sleep(0)
        return b"".join([bytes(first), *[bytes(chunk) async for chunk in chunks]]).decode()  # type: ignore[arg-type]

    assert [event.get("number") for event in events(asyncio.run(run()))] == [0, 8, 9, None]


@pytest.mark.parametrize(
    ("route", "more", "kind"),
    [
        ("/generate", {}, "image_generation"),
        ("/fal/spark", {}, "image_generation"),
        (ROUTE, {"partial_images": 1}, "image_generation"),
        ("/v1/images/edits", {}, "image_edit"),
    ],
)
def test_each_step_is_an_event_where_that_is_asked_for(
    server: Served, route: str, more: dict[str, Any], kind: str
) -> None:
    data = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(data, "png")
    image = {"image": base64.b64encode(data.getvalue()).decode(), "strength": 1.0} if kind == "image_edit" else {}
    asked = {"prompt": "a red circle", "stream": True, "progress": True, "num_inference_steps": 4, **more, **image}
    *some, last = events(httpx.post(server.url + route, json=asked, timeout=60).text)
    steps = [event["steps"] for event in some if event["type"] == f"{kind}.progress"]
    assert steps == sorted(set(steps))  # a slow reader may miss some
    assert steps[-1] == 4
    assert {event["of"] for event in some if "of" in event} == {4}
    assert len(some) - len(steps) == more.get("partial_images", 0)
    assert last["type"] == f"{kind}.completed"


def test_steps_without_a_stream_change_nothing(server: Served) -> None:
    asked = ASKED | {"seed": 3}
    answers = [httpx.post(server.url + ROUTE, json=asked | more, timeout=60) for more in ({}, {"progress": True})]
    assert answers[0].json()["data"] == answers[1].json()["data"]


def test_of_steps_in_a_row_that_nobody_has_read_the_last_is_kept() -> None:
    async def run() -> list[Any]:
        events = streams.Events(asyncio.get_running_loop().create_future())
        events.put({"type": "image_generation.partial_image"})
        for i in range(9):
            events.put({"type": "image_generation.progress", "steps": i})
        return [await events.next() for _ in range(2)]

    picture, step = asyncio.run(run())
    assert picture["type"] == "image_generation.partial_image"
    assert step["steps"] == 8


@pytest.mark.parametrize("route", [*DIALECTS, HUB_ROUTE, WORKFLOWS])
def test_events_of_every_route_that_draws_have_a_type(route: str) -> None:
    """Also where no answer streams, for a job's events do."""
    found = dialect_of(route)
    assert found
    assert found.TYPE in ("image_generation", "image_edit")
