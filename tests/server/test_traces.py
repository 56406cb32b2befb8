"""Traces, as a real receiver gets them."""

import asyncio
import itertools
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest

from fakes import RECIPE, FakeFamily, raises
from handler import Engine
from handler.core.errors import NumericalError, SettingsError
from handler.core.recipe import Picture
from handler.core.version import __version__
from handler.server import traces
from handler.server.access import Observed
from handler.server.app import create_app
from handler.worker.clock import Ledger, Phase
from otlp_plane import Receiver, receiving
from serving import serving

ROOT = Path(__file__).parents[2]
KEY, PROMPT = "canary-key-0451", "canary prompt, never to be seen"
ROUTE = "/v1/images/generations"
OK = {"prompt": PROMPT, "seed": 5, "size": "64x128", "num_inference_steps": 2}
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
STAGES = ["queue", "encode", "denoise", "decode", "serialize"]


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as receiver:
        yield receiver


@pytest.fixture
def engine(family: FakeFamily) -> Iterator[Engine]:
    with family.engine(api_keys=(KEY,)) as engine:
        yield engine


def made(engine: Engine, endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Observed:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint)
    return create_app(engine, public=True)


@pytest.fixture
def app(engine: Engine, receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> Iterator[Observed]:
    app = made(engine, receiver.url, monkeypatch)
    yield app
    close(app)


def close(app: Observed) -> None:
    assert app.traces
    app.traces.close()


def ask(app: Observed, *requests: tuple[str, str, dict[str, object]]) -> list[httpx.Response]:
    """Each request, its method, path and options, one after the other."""

    async def main() -> list[httpx.Response]:
        transport, headers = httpx.ASGITransport(app), {"authorization": f"Bearer {KEY}"}
        async with httpx.AsyncClient(transport=transport, base_url="http://kindling", headers=headers) as client:
            return [await client.request(method, path, **options) for method, path, options in requests]  # type: ignore[arg-type]

    return asyncio.run(main())


def test_a_request_is_a_span_below_its_callers_with_the_stages_of_its_pictures(
    app: Observed, receiver: Receiver
) -> None:
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-01", "x-request-id": "mine-1"}
    [answer] = ask(app, ("POST", ROUTE, {"json": OK | {"n": 2}, "headers": headers}))
    assert answer.status_code == 200
    close(app)
    root = receiver.wait_for(f"POST {ROUTE}")
    assert (root.trace, root.parent, root.kind, root.failed) == (TRACE, PARENT, 2, False)
    assert root.attributes == {
        "http.request.method": "POST",
        "http.route": ROUTE,
        "http.response.status_code": 200,
        "kindling.request_id": "mine-1",
        "kindling.pictures": 2,
        "kindling.steps": 2,
        "kindling.size": "64x128",
    }
    below = receiver.below(root)
    assert {span.trace for span in below} == {TRACE}
    first, second = ([span for span in below if span.attributes == {"kindling.picture": n}] for n in (0, 1))
    for stages in (first, second):
        assert [span.name for span in stages] == STAGES
        assert all(earlier.end == later.start for earlier, later in itertools.pairwise(stages))
        assert root.start <= stages[0].start < stages[-1].end <= root.end
    assert abs(second[0].start - first[-1].start) < 1000  # ns: the second waits while the first one is encoded
    assert len(receiver.spans) == 1 + 2 * len(STAGES)
    told = {"service.name": "kindling", "service.version": __version__, "kindling.model": "spark"}
    assert told.items() <= root.resource.items()
    assert b"canary" not in b"".join(receiver.bodies)


def test_a_job_is_a_span_below_its_callers_too(app: Observed, receiver: Receiver) -> None:
    async def main() -> None:
        transport, headers = httpx.ASGITransport(app), {"authorization": f"Bearer {KEY}"}
        async with httpx.AsyncClient(transport=transport, base_url="http://kindling", headers=headers) as client:
            traced = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
            job = (await client.post(ROUTE, json=OK | {"async": True}, headers=traced)).json()
            await client.get(f"/v1/jobs/{job['id']}/events")  # until it has ended

    asyncio.run(main())
    close(app)
    root = receiver.wait_for(f"POST {ROUTE} (job)")
    assert (root.trace, root.parent) == (TRACE, PARENT)


@pytest.mark.parametrize(("end", "starts"), [(18.0, [10, 11, 13, 14, 15, 17]), (17.9, [10, 11, 13, 10, 11, 13])])
def test_pictures_follow_each_other_if_there_was_time_for_that(end: float, starts: list[float]) -> None:
    picture = Picture(b"", "png", RECIPE, stages={"queue": 1.0, "denoise": 2.0, "decode": 1.0, "serialize": 0.5})
    laid = [start for name, _, start, _ in traces.laid_out([picture] * 2, 10.0, end) if name != "serialize"]
    assert laid == starts


def test_what_is_refused_or_fails_is_told_and_probes_are_not(
    app: Observed, receiver: Receiver, family: FakeFamily
) -> None:
    family.at_step = {2: raises(NumericalError("NaN."))}
    ask(
        app,
        ("POST", ROUTE, {"json": OK}),
        ("POST", ROUTE, {"json": OK | {"stream": True}}),
        ("POST", "/generate", {"content": b"{", "headers": {"traceparent": "00-nonsense", "tracestate": PROMPT}}),
        ("GET", "/v1/models", {"headers": {"authorization": "Bearer no"}}),
        ("GET", f"/nowhere?prompt={PROMPT}", {}),
        (PROMPT.split()[0], "/generate", {}),
        *(("GET", path, {}) for path in traces.PROBES),
    )
    close(app)
    told = {
        (span.name, span.attributes["http.response.status_code"], span.attributes["error.type"], span.failed)
        for span in receiver.spans
    }
    assert told == {
        (f"POST {ROUTE}", 500, "numerical_error", True),
        ("POST /generate", 400, "invalid_json", False),
        ("GET /v1/models", 401, "invalid_api_key", False),
        ("GET other", 404, "not_found", False),
        ("_OTHER /generate", 405, "method_not_allowed", False),
    }
    assert len(receiver.spans) == len({span.trace for span in receiver.spans}) == 6
    assert not any(span.parent for span in receiver.spans)
    assert b"canary" not in b"".join(receiver.bodies)


def test_a_stream_has_its_stages_too(app: Observed, receiver: Receiver) -> None:
    ask(app, ("POST", ROUTE, {"json": OK | {"stream": True, "partial_images": 1}}))
    close(app)
    assert [span.name for span in receiver.below(receiver.wait_for(f"POST {ROUTE}"))] == STAGES


def test_a_caller_may_choose_not_to_be_traced(app: Observed, receiver: Receiver) -> None:
    ask(app, ("POST", ROUTE, {"json": OK, "headers": {"traceparent": f"00-{TRACE}-{PARENT}-00"}}))
    close(app)
    assert not receiver.spans


def test_a_receiver_that_does_not_answer_costs_only_spans(
    engine: Engine, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its answers wait until all is over, so whatever here waited for them would never be done."""
    for name, value in {"MAX_QUEUE_SIZE": "4", "MAX_EXPORT_BATCH_SIZE": "2", "SCHEDULE_DELAY": "10"}.items():
        monkeypatch.setenv(f"OTEL_BSP_{name}", value)
    monkeypatch.setattr(traces, "FLUSH_S", 0.1)
    receiver.open.clear()
    app = made(engine, receiver.url, monkeypatch)
    answers = ask(app, *[("POST", ROUTE, {"json": OK})] * 5)
    assert {answer.status_code for answer in answers} == {200}
    assert receiver.asked.wait(60)
    close(app)
    assert not receiver.open.is_set()
    receiver.open.set()
    for thread in threading.enumerate():  # the SDK's, that it may close what it has opened
        if thread.daemon and thread.name in ("OtelBatchSpanRecordProcessor", "traces"):
            thread.join(60)


def test_no_receiver_costs_only_spans(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with receiving() as gone:
        pass
    app = made(engine, gone.url, monkeypatch)
    assert [answer.status_code for answer in ask(app, ("POST", ROUTE, {"json": OK}))] == [200]
    close(app)
    assert "exporting spans batch" in caplog.text
    assert "canary" not in caplog.text


@pytest.mark.parametrize("outcome", ["ready", "failed"])
def test_a_cold_start_is_a_span_with_its_phases(
    receiver: Receiver, outcome: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failed one is sent at once, for the process may end; a good one when the others are."""
    monkeypatch.setattr(traces, "FLUSH_S", 60.0)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", receiver.url + "/v1/traces")
    found = traces.tracing("spark")
    assert found
    phases = [Phase("import", 0.5, 2.0), Phase("weights", 2.5, 1.25)]
    told = {"device": "cpu", "plan": "EAGER", "plan_reason": "off", "phase": "weights", "reason": "why"}
    now = time.time_ns()
    found.cold_start(Ledger(outcome=outcome, total_s=4.0, budget_s=240.0, phases=phases, **told))  # type: ignore[arg-type]
    names = [span.name for span in receiver.spans]
    assert names == ([] if outcome == "ready" else ["cold start", "import", "weights"])
    found.close()
    start = receiver.wait_for("cold start")
    told |= {"outcome": outcome, "budget_s": 240.0}  # type: ignore[dict-item]
    assert start.attributes == {f"kindling.{name}": value for name, value in told.items()}
    assert (start.failed, start.parent) == (outcome == "failed", "")
    assert abs(start.end - now) < 60e9
    below = [(each.name, ns(each.start - start.start), ns(each.end - each.start)) for each in receiver.below(start)]
    assert (ns(start.end - start.start), below) == (4.0, [("import", 0.5, 2.0), ("weights", 2.5, 1.25)])


def test_the_end_waits_three_seconds_for_a_receiver(monkeypatch: pytest.MonkeyPatch) -> None:
    assert traces.FLUSH_S == 3.0
    monkeypatch.setattr(traces, "FLUSH_S", 0.0)
    never, ended = threading.Event(), threading.Event()

    def shutdown() -> None:
        never.wait()
        ended.set()

    provider = SimpleNamespace(get_tracer=lambda *_: None, shutdown=shutdown, force_flush=shutdown)
    traces.Traces(provider).close()  # type: ignore[arg-type]
    assert not ended.is_set()
    never.set()
    assert ended.wait(60)


def test_the_cold_start_of_a_real_server_is_a_trace(receiver: Receiver) -> None:
    with serving({"OTEL_EXPORTER_OTLP_ENDPOINT": receiver.url, "OTEL_SERVICE_NAME": "studio"}) as server:
        ledger = httpx.get(server.url + "/health/ready").json()["cold_start"]
        assert httpx.post(server.url + ROUTE, json={"prompt": PROMPT}, timeout=60).status_code == 200
        server.process.terminate()
        assert server.process.wait(60) == 0  # what was not sent yet is sent before
    start, request = receiver.wait_for("cold start"), receiver.spans[-1]
    phases = [(phase["name"], phase["start_s"], phase["seconds"]) for phase in ledger["phases"]]
    below = receiver.below(start)
    assert [(span.name, ns(span.start - start.start), ns(span.end - span.start)) for span in below] == phases
    assert ns(start.end - start.start) == ledger["total_s"]
    assert (start.attributes["kindling.outcome"], start.failed, start.parent) == ("ready", False, "")
    assert request.trace != start.trace
    assert start.resource["service.name"] == "studio"
    assert start.resource["kindling.model"] == "spark"


def ns(span: int) -> float:
    """Nanoseconds as seconds, rounded like the ledger's."""
    return round(span / 1e9, 3)


@pytest.mark.parametrize(
    ("environ", "code", "outcome"),
    [
        ({"KINDLING_COLD_START_BUDGET_S": "2"}, 124, "exceeded its budget"),
        ({"KINDLING_DEVICE": "cuda"}, 1, "no GPU"),
    ],
)
def test_a_cold_start_that_fails_is_told_before_the_process_ends(
    receiver: Receiver, environ: dict[str, str], code: int, outcome: str
) -> None:
    command = [sys.executable, "-m", "handler", "serve", "--port", "0"]
    environ = {"HOME": "/tmp", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": receiver.url + "/v1/traces", **environ}
    out = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=120, check=False)
    assert out.returncode == code, out.stderr
    span = receiver.wait_for("cold start")
    assert (span.failed, span.attributes["kindling.outcome"]) == (True, "failed")
    assert outcome in span.attributes["kindling.reason"]
    ledger = next(json.loads(line) for line in out.stderr.splitlines() if line.startswith('{"cold_start"'))
    assert [each.name for each in receiver.below(span)] == [each["name"] for each in ledger["cold_start"]["phases"]]


def test_without_an_endpoint_nothing_is_imported() -> None:
    code = (
        "import sys; from handler import Engine, Settings, create_app; create_app(Engine(Settings()), False);"
        "print(sorted(name for name in sys.modules if name.startswith('opentelemetry')))"
    )
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env={}, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_an_endpoint_without_the_packages_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:4318")
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(SettingsError, match=r"OTEL_EXPORTER_OTLP_ENDPOINT .* pip install opentelemetry-sdk"):
        traces.tracing("spark")


def test_a_clock_of_seconds_becomes_the_wall_clock() -> None:
    before = time.time_ns()
    at = traces._since(1000.0)
    assert before <= at(1000.0) <= time.time_ns()
    assert (at(1000.5) - at(1000.0), at(999.0) - at(1000.0)) == (500_000_000, -1_000_000_000)
