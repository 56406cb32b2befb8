"""One front for several models that others draw: real servers and engines, whose events are pickled as by a network."""

import asyncio
import base64
import json
import pickle
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, aclosing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from fakes import FakeFamily, raises
from handler import Api, Engine, Event, ImageRequest, Look, Lost, Settings, create_front, draw_events
from handler.api.elsewhere.need import Need, replica_need
from handler.catalog.gpus import GPUS
from handler.catalog.models import find
from handler.core.errors import DeviceLost, SettingsError
from handler.server import sse
from serving import live
from threads import until

ROUTE = "/v1/images/generations"
RED: dict[str, Any] = {"prompt": "a circle", "size": "64x64", "seed": 7}


@dataclass
class Here:
    """Replicas in this process: `lost` of them are, each once it has a request, and `cold` is why there is none."""

    engine: Engine
    lost: int = 0
    cold: str = ""
    asked: list[ImageRequest] = field(default_factory=list)

    async def draw(self, request: ImageRequest, left_s: float, caller: bytes) -> AsyncIterator[Event]:
        self.asked.append(request)
        if self.cold:
            await asyncio.Event().wait()
        sent = pickle.loads(pickle.dumps(request))
        async with aclosing(draw_events(Api(self.engine), sent, left_s, caller)) as told:
            async for event in told:
                yield pickle.loads(pickle.dumps(event))
                if self.lost:
                    self.lost -= 1
                    raise Lost

    async def look(self) -> Look:
        return Look(0, self.cold) if self.cold else Look(1)


@dataclass
class Served:
    url: str
    app: Any
    spark: Here
    other: Here

    def post(self, path: str = ROUTE, headers: Any = None, **fields: Any) -> httpx.Response:
        return httpx.post(self.url + path, json=RED | fields, headers=headers, timeout=60)


@contextmanager
def front(volume: Path, family: FakeFamily | None = None, **settings: Any) -> Iterator[Served]:
    """A front for spark, which `family` draws, and SDXL."""
    with ExitStack() as stack:
        given = {"volume": volume, "allow_open": True, **settings}
        fakes = {"spark": family or FakeFamily(), "sdxl": FakeFamily()}
        engines = [stack.enter_context(each.engine(**given, model=name)) for name, each in fakes.items()]
        spark, other = map(Here, engines)
        app = create_front([(one.engine.settings, one) for one in (spark, other)])
        url = stack.enter_context(live(app))
        yield Served(url, app, spark, other)


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    with front(tmp_path) as found:
        yield found


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeFamily]:
    """Draws when its gate opens; streams say soon that they are alive, and so begin."""
    monkeypatch.setattr(sse, "PATIENCE_S", 0.2)
    family = FakeFamily(gate=threading.Event())
    yield family
    assert family.gate
    family.gate.set()


@pytest.mark.parametrize(
    ("fields", "drawn"),
    [({}, (1, 0)), ({"model": "spark"}, (1, 0)), ({"model": "SDXL"}, (0, 1))],
)
def test_a_name_chooses_who_draws(served: Served, fields: dict[str, Any], drawn: tuple[int, int]) -> None:
    assert served.post(**fields).status_code == 200
    assert (len(served.spark.asked), len(served.other.asked)) == drawn


def test_a_path_chooses_who_draws(served: Served) -> None:
    answer = httpx.post(f"{served.url}/models/sdxl", json={"inputs": "x"}, timeout=60)
    assert (answer.status_code, len(served.other.asked)) == (200, 1)


def test_all_models_are_listed(served: Served) -> None:
    names = [each["id"] for each in httpx.get(f"{served.url}/v1/models").json()["data"]]
    assert {"spark", "sdxl"} < {*names}
    assert httpx.get(f"{served.url}/v1/models/sdxl").json()["model"] == "sdxl"


def test_the_description_has_all_names(served: Served) -> None:
    shapes = httpx.get(f"{served.url}/openapi.json").json()["components"]["schemas"]
    assert {"spark", "sdxl", "stabilityai/stable-diffusion-xl-base-1.0"} < {*shapes["ModelName"]["enum"]}


@pytest.mark.parametrize(
    ("fields", "status", "code"),
    [
        ({"model": "nope"}, 404, "model_not_found"),
        ({"model": 7}, 400, "invalid_type"),
        ({"num_inference_steps": 49, "size": None}, 422, "out_of_range"),
        ({"model": "sdxl", "size": "64x6400"}, 422, "out_of_range"),
        ({"response_format": "nope"}, 422, "out_of_range"),
    ],
)
def test_what_a_model_refuses_reaches_no_replica(
    served: Served, fields: dict[str, Any], status: int, code: str
) -> None:
    path = "/generate" if "num_inference_steps" in fields else ROUTE
    asked = {name: value for name, value in (RED | fields).items() if value is not None}
    answer = httpx.post(served.url + path, json=asked)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    assert served.spark.asked + served.other.asked == []


def test_two_models_of_one_name_are_refused(tmp_path: Path) -> None:
    engine = Engine(Settings(volume=tmp_path, allow_open=True))
    with pytest.raises(SettingsError, match="called 'spark'"):
        create_front([(engine.settings, Here(engine))] * 2)


def test_it_is_open_to_nobody_unless_told(tmp_path: Path) -> None:
    engine = Engine(Settings(volume=tmp_path))
    with pytest.raises(SettingsError, match="KINDLING_API_KEYS"):
        create_front([(engine.settings, Here(engine))])


def test_an_answer_is_the_one_that_a_worker_gives(served: Served) -> None:
    """With several pictures, and with a URL, which is the front's own."""
    answer = served.post(n=2, response_format="url")
    first, second = (httpx.get(each["url"]).content for each in answer.json()["data"])
    assert first != second
    assert base64.b64decode(served.post().json()["data"][0]["b64_json"]) == first


def test_a_stream_tells_steps_and_shows_pictures(served: Served) -> None:
    text = served.post(stream=True, partial_images=1, progress=True).text
    kinds = [line.rpartition(".")[2] for line in text.splitlines() if line.startswith("event: ")]
    assert [kinds[0], kinds[-1]] == ["progress", "completed"]
    assert "partial_image" in kinds


def test_a_job_is_drawn_elsewhere_and_found_here(served: Served) -> None:
    place = served.post(headers={"prefer": "respond-async"}, model="sdxl").json()["urls"]["get"]
    until(lambda: httpx.get(place).json()["status"] == "succeeded")
    assert len(served.other.asked) == 1


def test_a_lost_replica_is_followed_by_another(served: Served) -> None:
    served.spark.lost = 1
    assert served.post().status_code == 200
    assert len(served.spark.asked) == 2


def test_what_ends_replica_after_replica_ends_two(served: Served) -> None:
    served.spark.lost = 9
    answer = served.post()
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "not_ready")
    assert int(answer.headers["retry-after"]) > 0
    assert len(served.spark.asked) == 2


def test_a_replica_that_says_it_is_lost_is_asked_no_more(tmp_path: Path) -> None:
    with front(tmp_path, FakeFamily(at_step={1: raises(DeviceLost("gone"))})) as served:
        assert served.post().json()["error"]["code"] in ("device_lost", "start_failed")
        assert len(served.spark.asked) == 2


def test_a_key_brings_one_picture_whoever_draws(served: Served) -> None:
    answers = [served.post(headers={"idempotency-key": "a"}, seed=None) for _ in range(2)]
    assert answers[0].content == answers[1].content
    assert len(served.spark.asked) == 1


def test_a_model_that_cannot_start_says_why(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("handler.api.elsewhere.replicated.LOOK_S", 0.01)
    served.other.cold = "its files are not there"
    answer = served.post(model="sdxl")
    assert answer.status_code == 503
    assert "its files are not there" in answer.json()["error"]["message"]
    assert "retry-after" in answer.headers
    assert served.post().status_code == 200  # the others go on


def test_a_replica_whose_network_timed_out_is_lost_and_nobody_waits_for_it(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def unreachable(self: Here, request: ImageRequest, left_s: float, caller: bytes) -> AsyncIterator[Event]:
        raise TimeoutError("connection timed out")
        yield

    monkeypatch.setattr(Here, "draw", unreachable)
    answer = served.post(headers={"x-deadline-s": "40"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "not_ready")
    assert "were lost" in answer.json()["error"]["message"]


def test_too_late_for_a_cold_one_is_told_as_that(served: Served) -> None:
    served.other.cold = "unsaid"
    answer = served.post(model="sdxl", headers={"x-deadline-s": "0.3"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "not_ready")
    assert "has started yet" in answer.json()["error"]["message"]


def test_more_than_may_wait_are_refused_and_a_cold_start_counts(tmp_path: Path) -> None:
    with front(tmp_path, queue=1) as served:
        served.other.cold = "not yet"
        asking = threading.Thread(target=served.post, kwargs={"model": "sdxl", "headers": {"x-deadline-s": "5"}})
        asking.start()
        until(lambda: httpx.get(f"{served.url}/v1/status").json()["waiting"] == 1)
        answer = served.post(model="sdxl")
        asking.join()
    assert (answer.status_code, answer.json()["error"]["code"]) == (429, "queue_full")
    assert int(answer.headers["retry-after"]) == 15  # two pictures of 5 s, and a start of as many


def test_whoever_leaves_ends_what_is_drawn(tmp_path: Path, held: FakeFamily) -> None:
    with front(tmp_path, held) as served:
        with httpx.stream("POST", served.url + ROUTE, json=RED | {"stream": True, "progress": True}, timeout=60):
            pass
        until(lambda: served.spark.engine.drawing == 0)
        assert held.gate
        held.gate.set()
        assert served.post().status_code == 200
    assert len(held.drawn) == 1


def test_whoever_leaves_with_a_key_may_come_back(tmp_path: Path, held: FakeFamily) -> None:
    with front(tmp_path, held) as served:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(served.url + ROUTE, json=RED, headers={"idempotency-key": "a"}, timeout=1)
        assert held.gate
        held.gate.set()
        assert served.post(headers={"idempotency-key": "a"}).status_code == 200
    assert (len(held.drawn), len(served.spark.asked)) == (1, 1)


def as_ray(app: Any) -> Any:
    """Around `app`: when its client leaves, what hears it fails, and it is cancelled."""

    async def around(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return await app(scope, receive, send)
        came = asyncio.Queue[Any]()

        async def fetch() -> None:
            while (message := await receive())["type"] != "http.disconnect":
                came.put_nowait(message)
            came.put_nowait(OSError("cancelled"))

        async def hear() -> Any:
            if isinstance(message := await came.get(), Exception):
                raise message
            return message

        answering, fetching = asyncio.ensure_future(app(scope, hear, send)), asyncio.ensure_future(fetch())
        await asyncio.wait({answering, fetching}, return_when=asyncio.FIRST_COMPLETED)
        for task in (answering, fetching):
            task.cancel()
        await asyncio.wait({answering, fetching})

    return around


@pytest.mark.parametrize(("sent", "stream"), [(0.5, False), (1.0, False), (1.0, True)])
def test_whoever_leaves_is_counted_as_that_though_the_server_cancels(
    tmp_path: Path, held: FakeFamily, sent: float, stream: bool
) -> None:
    body = json.dumps(RED | {"stream": stream, "progress": stream}).encode()
    head = f"POST {ROUTE} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    with front(tmp_path, held) as served, live(as_ray(served.app)) as url:
        with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as client:
            client.sendall(head.encode() + body[: round(sent * len(body))])
            if stream:
                client.recv(1)
            elif sent == 1:
                until(lambda: served.spark.asked)
        told = f'kindling_requests_total{{reason="cancelled",route="{ROUTE}",status="499"}} 1.0'
        until(lambda: f'route="{ROUTE}"' in httpx.get(f"{url}/metrics").text)
        assert told in httpx.get(f"{url}/metrics").text


@pytest.mark.parametrize(
    ("model", "gpu", "settings", "need"),
    [
        ("spark", None, {}, Need(0, 1)),
        ("spark", None, {"batch": 4}, Need(0, 4)),
        ("flux-schnell", "H100", {}, Need(0.35, 1)),
        ("flux-schnell", "T4", {}, Need(1, 1)),
        ("flux-schnell", "H100", {"ulysses_degree": 2}, Need(2, 1)),
    ],
)
def test_a_replica_needs_what_its_outlook_says(
    tmp_path: Path, model: str, gpu: str | None, settings: dict[str, Any], need: Need
) -> None:
    chosen = Settings(volume=tmp_path, model=model, **settings)
    assert replica_need(chosen, find(model), GPUS[gpu] if gpu else None) == need
