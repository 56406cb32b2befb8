"""What an operator sees of the endpoint: metrics, request ids, the log's lines, and when to try again."""

import asyncio
import json
import logging
import re
import resource
import threading
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, TypeVar, get_args

import httpx
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp

from fakes import RECIPE, FakeFamily, raises
from handler import Api, Engine, Picture, Settings, create_app
from handler.core.errors import NumericalError
from handler.engine.intake import EngineState
from handler.engine.pace import Pace, Run
from handler.model import readings
from handler.server import access, metrics, wire
from handler.worker.clock import Phase
from serving import Served

T = TypeVar("T")
KEY, PROMPT = "canary-key-0451", "canary prompt, never to be seen: a façade"
AUTH = {"authorization": f"Bearer {KEY}"}
OK = {"prompt": PROMPT, "seed": 5, "size": "64x128", "num_inference_steps": 2, "n": 2}
ROUTE = "/v1/images/generations"


@pytest.fixture
def engine(family: FakeFamily) -> Iterator[Engine]:
    with family.engine(queue=2, api_keys=(KEY,), gpu_price=3.6, metadata=False) as engine:
        yield engine


def talk(app: ASGIApp, about: Callable[[httpx.AsyncClient], Awaitable[T]]) -> T:
    """Run `about` with a client of `app`."""

    async def main() -> T:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://kindling", headers=AUTH) as client:
            return await about(client)

    return asyncio.run(main())


@pytest.fixture
def app(engine: Engine) -> ASGIApp:
    return create_app(engine, public=True)


def samples(text: str) -> dict[tuple[str, ...], float]:
    """Each value by its name and the values of its labels, in the order of their names."""
    found = [each for family in text_string_to_metric_families(text) for each in family.samples]
    return {(each.name, *(each.labels[name] for name in sorted(each.labels))): each.value for each in found}


def test_the_metrics_tell_what_was_drawn_and_refused(app: ASGIApp, family: FakeFamily) -> None:
    async def main(client: httpx.AsyncClient) -> str:
        assert (await client.post(ROUTE, json=OK)).status_code == 200
        assert (await client.post("/generate", json={"prompt": "x", "stream": True})).status_code == 200
        family.at_step = {1: raises(NumericalError("NaN."))}
        assert (await client.post(ROUTE, json=OK)).status_code == 500
        for path in ("/nowhere", "/v1/models/spark", "/v1/models/none", "/generate"):
            await client.get(path)
        assert (await client.get("/metrics", headers={"authorization": "Bearer no"})).status_code == 401
        answer = await client.get("/metrics")
        assert answer.headers["content-type"].startswith("text/plain")
        return answer.text

    text = talk(app, main)
    found = samples(text)
    requests = {key[1:]: value for key, value in found.items() if key[0] == "kindling_requests_total"}
    assert requests == {
        ("", ROUTE, "200"): 1,
        ("", "/generate", "200"): 1,
        ("numerical_error", ROUTE, "500"): 1,
        ("not_found", "other", "404"): 1,
        ("", "/v1/models/{id:path}", "200"): 1,
        ("model_not_found", "/v1/models/{id:path}", "404"): 1,
        ("method_not_allowed", "/generate", "405"): 1,
        ("invalid_api_key", "/metrics", "401"): 1,
    }
    assert (found["kindling_images_total",], found["kindling_steps_total",]) == (3, 2 * 2 + 4)
    assert found["kindling_queue_wait_seconds_count",] == 3
    for stage in ("encode", "denoise", "decode", "serialize"):
        assert found["kindling_stage_seconds_count", stage] == 3
    assert found["kindling_request_seconds_count", ROUTE] == 2
    assert [found[f"kindling_{name}",] for name in ("queue_depth", "queue_limit", "inflight")] == [0, 2, 0]
    assert [found["kindling_state", state] for state in ("starting", "ready", "failed", "stopped")] == [0, 1, 0, 0]
    assert found["kindling_boot_outcome", "ready"] == 1
    assert found["kindling_spend_dollars", "process"] > 0
    assert re.search(r"(?m)^\w+_bytes\{[^}]*peak[^}]*\} (\S+)", text)  # as benchmarks/serving.py reads it
    assert found["kindling_memory_bytes", "host_peak"] > 1e7


def test_what_is_counted_is_what_was_measured(engine: Engine) -> None:
    """By value: stages of two pictures, an upload, a request, the start."""
    told = metrics.Metrics(engine)
    for queue, denoise, steps in ((3.5, 2.0, 4), (0.25, 8.0, 6)):
        stages = {"queue": queue, "denoise": denoise, "serialize": 0.125}
        told.picture(Picture(b"", "png", replace(RECIPE, steps=steps), stages=stages))
    told.uploaded(1.5)
    told.count(ROUTE, 200, "", 7.25)
    engine.ledger.total_s, engine.ledger.phases = 33.5, [Phase("weights", 1.0, 12.25), Phase("warm", 13.25, 0.5)]
    found = samples(told.text().decode())
    assert found["kindling_queue_wait_seconds_sum",] == 3.75
    stages = {key[1]: value for key, value in found.items() if key[0] == "kindling_stage_seconds_sum"}
    assert stages == {"denoise": 10.0, "serialize": 0.25, "upload": 1.5}
    assert found["kindling_request_seconds_sum", ROUTE] == 7.25
    assert (found["kindling_images_total",], found["kindling_steps_total",]) == (2, 10)
    assert found["kindling_cold_start_seconds",] == 33.5
    assert [found["kindling_load_seconds", phase] for phase in ("weights", "warm")] == [12.25, 0.5]


def test_how_jobs_ended_is_counted_by_where_they_were(engine: Engine) -> None:
    kinds, counts = ("cancelled", "deadline_exceeded", "out_of_memory"), iter(range(1, 7))
    engine.queue.ended.update({(kind, where): next(counts) for kind in kinds for where in ("queue", "denoise")})  # type: ignore[misc]
    found = samples(metrics.Metrics(engine).text().decode())
    names = ("cancelled", "deadline_exceeded", "oom")
    told = [found[f"kindling_{name}_total", where] for name in names for where in ("queue", "denoise")]
    assert told == [1, 2, 3, 4, 5, 6]


def test_what_is_drawn_and_what_waits_is_told_while_it_is_so(engine: Engine, family: FakeFamily) -> None:
    family.gate = threading.Event()

    def told() -> list[float]:
        found = samples(metrics.Metrics(engine).text().decode())
        return [found[f"kindling_{name}",] for name in ("inflight", "queue_depth")]

    async def main() -> None:
        running = asyncio.create_task(engine.submit(RECIPE))
        assert await asyncio.to_thread(family.entered.wait, 30)
        waiting = [asyncio.create_task(engine.submit(RECIPE)) for _ in range(2)]
        await asyncio.sleep(0)
        assert told() == [1, 2]
        assert family.gate
        family.gate.set()
        await asyncio.gather(running, *waiting)
        assert told() == [0, 0]

    asyncio.run(main())


def test_a_requests_line_sums_what_its_pictures_took() -> None:
    pictures = tuple(
        Picture(b"", "png", replace(RECIPE, seed=seed), stages={"queue": queue, "denoise": 2.0, "serialize": 0.125})
        for seed, queue in ((5, 3.5), (6, 0.25))
    )
    stages = {"queue": 3.75, "denoise": 4.0, "serialize": 0.25}
    assert access._drawn(pictures) == {"n": 2, "size": "256x256", "steps": 4, "seed": 5, "stages_s": stages}
    assert access._drawn(()) == {}


def test_a_picture_is_counted_once_whoever_gets_it(app: ASGIApp, family: FakeFamily) -> None:
    """The first who asked under a key has left when it is there; the second gets it, and a third later."""
    family.gate = threading.Event()
    key = {"idempotency-key": "one"}

    async def main(client: httpx.AsyncClient) -> None:
        first = asyncio.create_task(client.post(ROUTE, json=OK, headers=key))
        assert await asyncio.to_thread(family.entered.wait, 10)
        second = asyncio.create_task(client.post(ROUTE, json=OK, headers=key))
        await asyncio.sleep(0)
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        assert family.gate
        family.gate.set()
        assert (await second).status_code == 200
        assert (await client.post(ROUTE, json=OK, headers=key)).status_code == 200

    talk(app, main)
    found = samples(talk(app, lambda client: client.get("/metrics")).text)
    assert found["kindling_images_total",] == found["kindling_queue_wait_seconds_count",] == 2
    assert found["kindling_stage_seconds_count", "serialize"] == 2


def test_a_worker_that_could_not_be_compiled_is_counted_and_says_why(app: ASGIApp, engine: Engine) -> None:
    async def main(client: httpx.AsyncClient) -> tuple[str, str, Any, Any]:
        engine.ledger.plan = "EAGER"
        before = (await client.get("/metrics")).text
        engine.ledger.compile_failure = "compiling failed: no g++"
        after = (await client.get("/metrics")).text
        told = [(await client.get(path)).json() for path in ("/health/ready", "/v1/receipt")]
        return before, after, *told

    before, after, ready, receipt = talk(app, main)
    assert [samples(text)["kindling_compile_failed",] for text in (before, after)] == [0, 1]
    assert ready["cold_start"]["compile_failure"] == receipt["compile_failure"] == "compiling failed: no g++"


def test_a_gpu_is_told_as_far_as_it_answers(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses() -> int:
        raise RuntimeError("Not Supported")  # as NVML says of a slice of a GPU

    cuda = SimpleNamespace(
        mem_get_info=lambda: (3, 10), max_memory_allocated=lambda: 8, temperature=lambda: 41, utilization=refuses
    )
    monkeypatch.setattr(readings, "cuda_of", lambda device: cuda)
    found = samples(metrics.Metrics(engine).text().decode())
    assert [found["kindling_memory_bytes", kind] for kind in ("gpu_peak", "gpu_used", "gpu_total")] == [8, 7, 10]
    assert found["kindling_gpu_temperature_celsius",] == 41
    assert ("kindling_gpu_utilization_ratio",) not in found


def test_a_device_is_asked_once_for_all_that_it_tells(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    told = {"gpu_peak": 3.0, "host_peak": 2.0, "gpu_utilization": 0.5, "gpu_temperature": 40.0}

    def readings(device: str) -> dict[str, float]:
        asked.append(device)
        return told

    engine.worker = None
    monkeypatch.setattr("handler.server.metrics.readings", readings)
    found = samples(metrics.Metrics(engine).text().decode())
    assert asked == ["cpu"]
    assert found["kindling_memory_bytes", "gpu_peak"] == 3.0
    assert found["kindling_gpu_utilization_ratio",] == 0.5
    assert found["kindling_gpu_temperature_celsius",] == 40.0


@pytest.mark.parametrize("given", ["", "a b", "x" * 129, "é", 'inject"\t'])
def test_every_answer_has_a_request_id(app: ASGIApp, given: str) -> None:
    async def main(client: httpx.AsyncClient) -> list[httpx.Response]:
        headers = httpx.Headers({"x-request-id": given} if given else {}, encoding="utf-8")
        stranger = httpx.Headers({**headers, "authorization": "no"}, encoding="utf-8")
        return [
            await client.post(ROUTE, json={"prompt": "x", "stream": True}, headers=headers),
            await client.post(ROUTE, content=b"{", headers=headers),
            await client.get("/nowhere", headers=headers),
            await client.get("/ping", headers=stranger),
            await client.get("/metrics", headers=stranger),
        ]

    answers = talk(app, main)
    assert [answer.status_code for answer in answers] == [200, 400, 404, 200, 401]
    ids = [answer.headers["x-request-id"] for answer in answers]
    assert all(re.fullmatch("[0-9a-f]{32}", each) for each in ids)
    assert len(set(ids)) == len(ids)


def test_a_drawing_request_is_one_line_that_keeps_secrets(engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)

    async def main(client: httpx.AsyncClient) -> None:
        answer = await client.post(ROUTE, json=OK, headers={"x-request-id": "mine-1"})
        assert answer.headers["x-request-id"] == "mine-1"
        await client.post("/generate", json=OK | {"frames": 7})
        await client.post(ROUTE, json=OK | {"stream": True})
        await client.post(ROUTE, content=rb'{"prompt": "\ud800 canary"}')
        await client.post(ROUTE, json=OK, headers={"authorization": f"Basic {KEY}"})
        await client.get("/metrics")

    async def by_other_names(client: httpx.AsyncClient) -> None:
        await client.post("/", json={"inputs": PROMPT})
        await client.post("/generate", json={"positive_prompt": PROMPT})

    talk(create_app(engine, public=True), main)
    first, second, *others = [json.loads(each.message) for each in caplog.records if each.name == "kindling.requests"]
    assert (first["request_id"], first["route"], first["status"], first["error"]) == ("mine-1", ROUTE, 200, None)
    assert (first["n"], first["size"], first["steps"], first["seed"]) == (2, "64x128", 2, 5)
    assert set(first["stages_s"]) == {"queue", "encode", "denoise", "decode", "serialize"}
    assert first["seconds"] >= first["stages_s"]["denoise"]
    assert first["prompt_length"] == len(PROMPT)
    assert (second["status"], second["error"]) == (400, "unknown_parameter")
    assert first["prompt_hash"] == second["prompt_hash"]
    assert [each["status"] for each in others][-1] == 401
    assert len(others) == 3
    assert "canary" not in caplog.text
    caplog.clear()
    talk(create_app(engine, public=True), by_other_names)
    said = [json.loads(each.message) for each in caplog.records if each.name == "kindling.requests"]
    assert [each["prompt_length"] for each in said] == [len(PROMPT)] * 2
    caplog.clear()
    talk(create_app(engine, public=True), main)  # another app: another key
    assert first["prompt_hash"] not in caplog.text


def test_a_real_server_logs_no_prompt(server: Served) -> None:
    answer = httpx.post(server.url + ROUTE, json={"prompt": PROMPT, "num_inference_steps": 1}, timeout=120)
    line = server.wait_for(rf'^{{.*"{answer.headers["x-request-id"]}".*$')[0]
    assert json.loads(line)["status"] == 200
    assert "canary" not in "".join(server.lines)
    found = samples(httpx.get(server.url + "/metrics").text)
    assert found["kindling_load_seconds", "weights"] > 0
    assert found["kindling_plan", "EAGER"] == 1


def test_a_client_that_leaves_a_stream_is_counted_as_gone(app: ASGIApp, family: FakeFamily) -> None:
    """As with uvicorn, where sending to who has left raises."""
    gate = threading.Event()

    def waits() -> None:
        assert gate.wait(60)

    family.at_step = {4: waits}
    body = json.dumps({"prompt": "x", "stream": True, "partial_images": 1, "num_inference_steps": 4}).encode()
    headers = [(name.encode(), value.encode()) for name, value in AUTH.items()]
    scope: dict[str, Any] = {"type": "http", "method": "POST", "path": ROUTE, "query_string": b"", "headers": headers}
    said = iter([{"type": "http.request", "body": body}])

    async def receive() -> Any:
        return next(said, None) or await asyncio.Event().wait()

    async def send(message: Any) -> None:
        if message["type"] == "http.response.body":
            raise OSError

    async def main() -> None:
        with pytest.raises(ClientDisconnect):
            await app({**scope, "asgi": {"version": "3.0", "spec_version": "2.4"}}, receive, send)

    asyncio.run(main())
    gate.set()
    found = samples(talk(app, lambda client: client.get("/metrics")).text)
    assert found["kindling_requests_total", "cancelled", ROUTE, "499"] == 1


def test_a_client_that_leaves_while_it_asks_is_counted_as_gone(app: ASGIApp, caplog: pytest.LogCaptureFixture) -> None:
    headers = [(name.encode(), value.encode()) for name, value in AUTH.items()]
    scope: dict[str, Any] = {"type": "http", "method": "POST", "path": ROUTE, "query_string": b"", "headers": headers}
    said = iter([{"type": "http.request", "body": b"{", "more_body": True}, {"type": "http.disconnect"}])

    async def receive() -> Any:
        return next(said)

    async def send(message: Any) -> None:
        pass

    asyncio.run(app({**scope, "asgi": {"version": "3.0"}}, receive, send))  # type: ignore[arg-type]
    found = samples(talk(app, lambda client: client.get("/metrics")).text)
    assert found["kindling_requests_total", "cancelled", ROUTE, "499"] == 1
    assert "a request failed" not in caplog.text


def test_what_the_server_answered_instead_is_what_is_counted(app: ASGIApp, caplog: pytest.LogCaptureFixture) -> None:
    """A body that is too slow, which looks like a client that left to all else."""

    async def main(client: httpx.AsyncClient) -> str:
        async def receive() -> dict[str, Any]:
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            """Nobody hears it."""

        headers = [(b"authorization", AUTH["authorization"].encode()), (b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": ROUTE, "headers": headers, "query_string": b""}
        await app(scope | {"state": {access.INSTEAD: wire.LATE}}, receive, send)
        return (await client.get("/metrics")).text

    with caplog.at_level(logging.INFO):
        found = samples(talk(app, main))
    assert found["kindling_requests_total", "request_timeout", ROUTE, "408"] == 1
    [line] = [json.loads(each.message) for each in caplog.records if ROUTE in each.message]
    assert (line["status"], line["error"]) == (408, "request_timeout")


@pytest.mark.parametrize(("took", "told"), [((), "5"), ((10.0, 20.5, 90.0), "41"), ((0.001,), "1"), ((100.0,), "120")])
def test_a_full_queue_says_when_to_come_back(
    engine: Engine, family: FakeFamily, took: tuple[float, ...], told: str
) -> None:
    family.gate = threading.Event()

    async def main() -> None:
        running = asyncio.create_task(engine.submit(RECIPE))
        assert await asyncio.to_thread(family.entered.wait, 10)
        waiting = [asyncio.create_task(engine.submit(RECIPE)) for _ in range(2)]
        await asyncio.sleep(0)
        engine._executor.pace = Pace.of(tuple(Run(1.0, seconds) for seconds in took)) if took else Pace()
        reply = await Api(engine).call("/generate", {"prompt": "x"})
        assert (reply.status, reply.headers) == (429, {"retry-after": told})
        assert family.gate
        family.gate.set()
        await asyncio.gather(running, *waiting)
        assert len(engine._executor.pace.runs) == len(took) + 3

    asyncio.run(main())


@pytest.mark.parametrize(("started", "told"), [(0.0, "5"), (33.2, "34"), (500.0, "120")])
def test_a_worker_that_stops_says_how_long_another_takes_to_start(engine: Engine, started: float, told: str) -> None:
    engine.state, engine.ledger.total_s = "stopped", started
    reply = asyncio.run(Api(engine).call("/generate", {"prompt": "x"}))
    assert (reply.status, reply.headers) == (503, {"retry-after": told})
    engine.state = "ready"


def test_where_the_histograms_have_their_bounds(engine: Engine) -> None:
    """Dashboards and alerts hang on them: another bound makes the past and the present incomparable."""
    told = metrics.Metrics(engine)
    told.count("/ping", 200, "", 0.2)
    told.picture(Picture(b"", "png", RECIPE, stages={"queue": 0.2, "encode": 0.2}))
    bounds: dict[str, list[str]] = {}
    for family in text_string_to_metric_families(told.text().decode()):
        for each in family.samples:
            if "le" in each.labels:
                bounds.setdefault(each.name, []).append(each.labels["le"])
    wanted = "0.001 0.0025 0.005 0.01 0.025 0.05 0.1 0.25 0.5 1.0 2.5 5.0 10.0 25.0 60.0 120.0 300.0 +Inf"
    names = ("kindling_request_seconds_bucket", "kindling_queue_wait_seconds_bucket", "kindling_stage_seconds_bucket")
    assert bounds == dict.fromkeys(names, wanted.split())


def test_what_is_not_known_yet_is_not_told(family: FakeFamily) -> None:
    engine = Engine(Settings(queue=7), boot=family.boot)
    found = samples(metrics.Metrics(engine).text().decode())
    told = {key: value for key, value in found.items() if not key[0].endswith(("_total", "_created", "_bytes"))}
    states = {("kindling_state", state): float(state == "starting") for state in get_args(EngineState)}
    numbers = {"queue_depth": 0, "queue_limit": 7, "inflight": 0}
    assert {key: value for key, value in told.items() if "seconds_" not in key[0] and "spend" not in key[0]} == {
        **{("kindling_" + name,): value for name, value in numbers.items()},
        **states,
        ("kindling_boot_outcome", "starting"): 1,
    }
    engine.ledger.plan, engine.ledger.total_s, engine.ledger.outcome = "EAGER", 12.5, "ready"
    engine.ledger.phases.append(Phase("weights", 1.0, 2.5))
    found = samples(metrics.Metrics(engine).text().decode())
    assert (found["kindling_plan", "EAGER"], found["kindling_compile_failed",]) == (1, 0)
    assert (found["kindling_cold_start_seconds",], found["kindling_load_seconds", "weights"]) == (12.5, 2.5)
    assert found["kindling_boot_outcome", "ready"] == 1
    engine.ledger.compile_failure = "no compiler"
    assert samples(metrics.Metrics(engine).text().decode())["kindling_compile_failed",] == 1


def test_a_processes_own_peak_is_told_before_there_is_a_worker(family: FakeFamily) -> None:
    engine = Engine(Settings(), boot=family.boot)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    found = samples(metrics.Metrics(engine).text().decode())
    assert {key for key in found if key[0] == "kindling_memory_bytes"} == {("kindling_memory_bytes", "host_peak")}
    assert 0.5 * before < found["kindling_memory_bytes", "host_peak"] < 1.5 * before


@pytest.mark.parametrize(("device", "told"), [("cuda", torch.cuda), ("cpu", None)])
def test_only_a_worker_on_a_gpu_is_asked_for_its(device: str, told: Any) -> None:
    assert readings.cuda_of(device) is told
