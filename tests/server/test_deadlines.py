"""One end for each request, from its first byte to its answer, and one for the exit of the process, on real servers."""

import asyncio
import json
import math
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from starlette.datastructures import Headers
from test_faults import Faulty, error, faulty

from fakes import FakeFamily, raises
from handler import Api, Engine, Picture, Recipe, Settings
from handler.api import store
from handler.api.hands import Hands
from handler.api.store import Store
from handler.core.deadline import EXIT_S, Deadline
from handler.core.errors import DeadlineExceeded, NotReady, QueueFull
from handler.engine.pace import Pace
from handler.engine.queue import Queue
from handler.server import shutdown
from handler.server.patience import patience
from s3_plane import BUCKET, KEY, SECRET, Broken

ROUTE = "/v1/images/generations"
RECIPE = Recipe("spark", "1", "a red circle", (64, 64), 1, 0.0, "flow-match-euler", 7)
STORED = {
    "KINDLING_STORE_BUCKET": BUCKET,
    "BUCKET_ACCESS_KEY_ID": KEY,
    "BUCKET_SECRET_ACCESS_KEY": SECRET,
    "AWS_EC2_METADATA_DISABLED": "true",
}
URL = {"response_format": "url"}


@pytest.fixture(scope="module")
def silent() -> Iterator[Broken]:
    """A store that accepts, and never answers."""
    with Broken(0) as broken:
        yield broken


@pytest.fixture(scope="module")
def server(silent: Broken) -> Iterator[Faulty]:
    """Over that store, with room for one that waits."""
    with faulty(**STORED, BUCKET_ENDPOINT_URL=silent.url, KINDLING_QUEUE="1") as started:
        yield started


def delivered(answer: httpx.Response) -> str:
    """Why a picture came as base64."""
    assert answer.status_code == 200, answer.text
    [picture] = answer.json()["data"]
    assert picture["b64_json"]
    return str(answer.json()["delivery"])


def test_a_store_that_does_not_answer_leaves_base64_within_the_deadline(server: Faulty) -> None:
    assert "in the time that the request had left" in delivered(server.post("fine", {"x-deadline-s": "4"}, **URL))


def test_so_it_does_for_each_who_waits_under_one_key(server: Faulty) -> None:
    """The one with the shorter end is answered by then, and the other too."""
    key = {"idempotency-key": "stored"}
    patient = server.begin("hold stored", key | {"x-deadline-s": "60"}, **URL)
    server.wait_for("^holding")
    server.release()
    hasty = server.post("hold stored", key | {"x-deadline-s": "4"}, **URL)
    assert "in the time that the request had left" in delivered(hasty)
    assert delivered(hasty) == delivered(patient.result())


def test_who_repeats_a_key_waits_until_its_own_end(server: Faulty) -> None:
    key = {"idempotency-key": "ends"}
    hasty = server.begin("hold ends", key | {"x-deadline-s": "4"})
    server.wait_for("^holding")
    patient = server.begin("hold ends", key | {"x-deadline-s": "60"})
    hastier = server.post("hold ends", key | {"x-deadline-s": "0.2"})
    assert error(hastier) == error(hasty.result()) == (504, "deadline_exceeded", "false")
    assert not patient.done()
    server.release()
    assert patient.result().status_code == 200


def test_when_all_ends_under_a_key_have_come_nothing_is_drawn_any_more(server: Faulty) -> None:
    key = {"idempotency-key": "over", "x-deadline-s": "4"}
    hasty = server.hold("hold over", key)
    assert error(hasty.result()) == (504, "deadline_exceeded", "false")
    server.release()
    assert server.steps("hold over") == 2


def raw(server: Faulty, *parts: bytes) -> bytes:
    """What is answered to these bytes, after which nothing comes."""
    with socket.socket() as client:
        client.settimeout(60)
        client.connect((urlsplit(server.url).hostname, urlsplit(server.url).port))
        for part in parts:
            client.sendall(part)
        return b"".join(iter(lambda: client.recv(1 << 20), b""))


def test_a_body_that_does_not_come_in_time_is_waited_for_no_longer(server: Faulty) -> None:
    head = "host: 127.0.0.1\r\nconnection: close\r\nx-deadline-s: 0.3\r\ncontent-length: 99\r\n\r\n"
    answer = raw(server, f"POST {ROUTE} HTTP/1.1\r\n{head}".encode(), b"{")
    assert answer.startswith(b"HTTP/1.1 504")
    assert b'"deadline_exceeded"' in answer


@pytest.mark.parametrize("junk", [b"GARBAGE\r\n\r\n", b"GET /ping HTTP/9.9\r\n\r\n", b"GET / HTTP/1.1\r\n: x\r\n\r\n"])
def test_what_is_no_http_is_answered_like_all_else(server: Faulty, junk: bytes) -> None:
    head, _, body = raw(server, junk).partition(b"\r\n\r\n")
    lines = head.decode().lower().split("\r\n")
    assert lines[0].startswith("http/1.1 400")
    names = {line.partition(":")[0]: line.partition(": ")[2] for line in lines[1:]}
    assert names.keys() >= {"x-request-id", "cache-control", "x-content-type-options", "content-security-policy"}
    assert (names["content-type"], int(names["content-length"])) == ("application/json", len(body))
    assert json.loads(body)["error"]["code"] == "invalid_request"


CONNECTION = """
import asyncio, json, sys, time
import uvicorn
from uvicorn.server import ServerState
from handler.server.access import ARRIVED
from handler.server.connections import Connections, Limits
from handler.server.wire import Wire

class Transport:
    said = b""
    def get_extra_info(self, name, default=None): return None
    def write(self, data): self.said += data
    def write_eof(self): self.closed = True
    def get_write_buffer_size(self): return 0
    def is_closing(self): return False
    def pause_reading(self): pass
    resume_reading = pause_reading

async def main():
    arrived, requests = [], asyncio.Semaphore(0)

    async def app(scope, receive, send):
        arrived.append(scope["state"][ARRIVED])
        while scope["path"] == "/" and (await receive())["more_body"]:
            pass
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body"})
        requests.release()

    transport = Transport()
    config, connections = uvicorn.Config(app, ws="none", log_level="critical"), Connections(Limits(), Wire)
    given = {"config": config, "server_state": ServerState(), "app_state": {}}
    wire = connections(**given)
    wire.connection_made(transport)
    times = []
    for _ in range(2):
        for part in (b"POST / HTTP/1.1\\r\\nhost: here", b"\\r\\ncontent-length: 2\\r\\n\\r\\n", b"a", b"b"):
            times.append(time.perf_counter())
            wire.data_received(part)
        await requests.acquire()
    for _ in range(2):  # answered before its body is there
        times.append(time.perf_counter())
        wire.data_received(b"POST /full HTTP/1.1\\r\\nhost: here\\r\\ncontent-length: 2\\r\\n\\r\\n")
        await requests.acquire()
        for part in (b"a", b"b"):
            times.append(time.perf_counter())
            wire.data_received(part)
    times.append(time.perf_counter())
    junk = Transport()
    other = connections(**given)
    other.connection_made(junk)
    other.data_received(b"GARBAGE\\r\\n\\r\\n")
    print(json.dumps([arrived, times, junk.said.decode(), junk.closed]))

asyncio.run(main())
"""


def test_a_request_begins_with_its_first_byte_and_junk_is_answered() -> None:
    done = subprocess.run([sys.executable, "-c", CONNECTION], capture_output=True, text=True, check=True)
    arrived, times, said, closed = json.loads(done.stdout)
    assert closed
    assert times[0] <= arrived[0] < times[1]
    assert times[4] <= arrived[1] < times[5]  # the second on the same connection
    assert times[8] <= arrived[2] < times[9]
    assert times[11] <= arrived[3] < times[12]  # the fourth, though of the third nobody read the body
    head, _, body = said.partition("\r\n\r\n")
    assert head.startswith("HTTP/1.1 400 ")
    assert "x-request-id: " in head
    assert json.loads(body)["error"]["code"] == "invalid_request"


def test_a_websocket_is_asked_for_in_vain_and_told_so_in_http(server: Faulty) -> None:
    asked = {"connection": "upgrade", "upgrade": "websocket", "sec-websocket-key": "x", "sec-websocket-version": "13"}
    answer = httpx.get(server.url + "/nowhere", headers=asked)
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")
    assert answer.headers["x-request-id"]


def test_a_full_queue_refuses_a_fresh_key_before_its_body_is_read(server: Faulty) -> None:
    running = server.hold()
    waiting = server.begin("fine")
    server.waiting(1)
    head = (
        f"POST {ROUTE} HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: close\r\nidempotency-key: fresh\r\n"
        "content-length: 5000000\r\nexpect: 100-continue\r\n\r\n"
    )
    answer = raw(server, head.encode())  # which never sends its body
    assert answer.startswith(b"HTTP/1.1 429")
    assert b"100 Continue" not in answer
    server.release()
    assert {running.result().status_code, waiting.result().status_code} == {200}


def test_idle_connections_are_kept_longer_than_proxies_keep_theirs() -> None:
    from handler.server import process

    assert process._config(None).timeout_keep_alive == 75  # type: ignore[arg-type]


@pytest.mark.parametrize("left_s", [0.0, -1.0])
def test_whose_time_is_up_is_told_that_and_not_to_come_back(left_s: float) -> None:
    with pytest.raises(DeadlineExceeded):
        Queue(1, 1).require_room(Pace(), left_s)
    with pytest.raises(QueueFull):
        Queue(0, 1).require_room(Pace(), 1.0)


def test_a_request_whose_time_was_up_before_it_came_to_the_line_is_late(family: FakeFamily) -> None:
    with family.engine() as engine:
        reply = asyncio.run(_called(engine, Deadline(time.perf_counter())))
    assert (reply.status, reply.content["error"]["code"]) == (504, "deadline_exceeded")
    assert family.drawn == []


async def _called(engine: Engine, deadline: Deadline) -> Any:
    return await Api(engine).call("/generate", {"prompt": "x"}, deadline=deadline)


def test_images_that_take_too_long_to_decode_are_late(family: FakeFamily, monkeypatch: pytest.MonkeyPatch) -> None:
    """As are pictures that take too long to encode."""
    go = threading.Event()

    def slow(*_: object) -> Any:
        assert go.wait(60)
        raise AssertionError("nobody waits for this")

    monkeypatch.setattr("handler.api.codec.encode", slow)
    with family.engine() as engine:

        async def main() -> Any:
            reply = await _called(engine, Deadline.within(0.2))
            go.set()
            return reply

        assert asyncio.run(main()).status == 504


def test_an_upload_is_given_up_when_there_is_only_time_to_answer(silent: Broken) -> None:
    kept = Store(BUCKET, silent.url, "", "", 60)

    async def main() -> Picture:
        deadline = Deadline.within(60)
        asyncio.get_running_loop().call_soon(deadline.hurry)
        return await kept.keep(Picture(b"drawn", "png", RECIPE), deadline)

    picture = asyncio.run(main())
    assert (picture.url, picture.undelivered, picture.data) == ("", store.SHORT, b"drawn")


def test_hands_work_at_once_up_to_their_number_and_skip_what_is_cancelled() -> None:
    hands, go, begun = Hands(2, 0, "test"), threading.Event(), [threading.Event() for _ in range(2)]

    def wait(mine: threading.Event) -> int:
        mine.set()
        assert go.wait(60)
        return threading.get_ident()

    first = [hands.run(lambda mine=mine: wait(mine)) for mine in begun]
    assert all(mine.wait(60) for mine in begun)
    late, never = hands.run(lambda: 1 // 0), hands.run(lambda: 1 // 1)
    assert never.cancel()
    go.set()
    assert len({each.result(60) for each in first}) == 2
    assert isinstance(late.exception(60), ZeroDivisionError)
    assert hands.run(threading.current_thread).result(60).daemon


def test_hands_for_whom_there_was_no_thread_have_their_place_again(monkeypatch: pytest.MonkeyPatch) -> None:
    hands = Hands(1, 0, "test")
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", lambda _: raises(RuntimeError("can't start new thread"))())
        with pytest.raises(RuntimeError, match="new thread"):
            hands.run(lambda: 1)
    assert hands.run(lambda: 2).result(60) == 2


def test_hands_that_nobody_waits_for_keep_no_others_from_work_up_to_a_number() -> None:
    hands, go, begun = Hands(1, 2, "test"), threading.Event(), [threading.Event() for _ in range(3)]

    def hang(mine: threading.Event) -> None:
        mine.set()
        assert go.wait(60)

    waiting = None
    for mine in begun:
        running = hands.run(lambda mine=mine: hang(mine))
        waiting = hands.run(lambda: 1)
        assert mine.wait(60)
        assert not waiting.done()  # the one place is taken
        hands.forsake(running)
        if mine is not begun[-1]:
            assert waiting.result(60) == 1
    assert waiting
    assert not waiting.done()  # all spare ones are at it too
    hands.forsake(waiting)
    assert waiting.cancelled()
    last = hands.run(lambda: 2)
    go.set()
    assert last.result(60) == 2


def test_the_stages_of_an_exit_fit_into_it() -> None:
    from handler.engine.engine import LAST_S
    from handler.server.traces import FLUSH_S

    assert shutdown.DRAIN_S + shutdown.ANSWER_S + max(LAST_S, FLUSH_S) < EXIT_S < 30


def test_a_lane_stops_within_its_exit_whatever_is_drawn_or_published(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that hangs, and a volume that does."""
    from types import SimpleNamespace

    begun, go = [threading.Event(), threading.Event()], threading.Event()

    def hang(which: int) -> Any:
        begun[which].set()
        go.wait(60)
        return []

    worker: Any = SimpleNamespace(
        unpublished=True,
        publish=lambda _: hang(0),
        draw_some=lambda *_: hang(1),
        gains={},
        facts={},
        watch=lambda alarm: None,
    )
    engine = Engine(Settings(), boot=lambda *_: worker)
    engine.start()

    async def main() -> None:
        running = asyncio.create_task(engine.submit(RECIPE))
        assert await asyncio.to_thread(begun[1].wait, 60)
        engine.exit.begin(0.2)
        await asyncio.to_thread(engine.stop)
        with pytest.raises(NotReady):
            await running

    asyncio.run(main())
    assert engine.alive
    assert begun[0].is_set()
    go.set()


SHORT_EXIT = {"FAULTY_DRAIN_S": "1"}


def test_told_to_stop_a_drawn_picture_is_answered_though_the_store_hangs(silent: Broken) -> None:
    with faulty(**STORED, **SHORT_EXIT, BUCKET_ENDPOINT_URL=silent.url) as own:
        asking, keyed = own.begin("fine", **URL), own.begin("fine", {"idempotency-key": "last"}, **URL)
        own.wait_for("uploading")
        own.wait_for("uploading")
        own.process.send_signal(signal.SIGTERM)
        assert {delivered(asking.result()), delivered(keyed.result())}
        assert own.ends() == 0


def test_told_to_stop_it_ends_in_time_whatever_hangs() -> None:
    """A picture that hangs in a step, a body that never comes, a thread that the interpreter would join."""
    with faulty(**SHORT_EXIT, FAULTY_EXIT_S="4", FAULTY_JOIN="1") as own:
        running = own.begin("hang")
        own.wait_for("step 2 of hang")
        with socket.socket() as client:
            client.connect((urlsplit(own.url).hostname, urlsplit(own.url).port))
            client.settimeout(60)
            client.sendall(f"POST {ROUTE} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: 9\r\n\r\n".encode())
            own.until(lambda _: own.count("inflight") >= 0)
            own.process.send_signal(signal.SIGTERM)
            answer = b"".join(iter(lambda: client.recv(1 << 16), b""))
        assert answer.startswith(b"HTTP/1.1 503")
        assert b'"not_ready"' in answer
        assert b"x-content-type-options: nosniff" in answer
        assert error(running.result()) == (503, "not_ready", None)
        assert own.ends() == 0


@pytest.mark.parametrize(("said", "seconds"), [("1000000000", 1e9), ("007.50", 7.5), ("0.25", 0.25), (None, math.inf)])
def test_any_number_of_seconds_may_be_said(said: str | None, seconds: float) -> None:
    assert patience(Headers({"x-deadline-s": said} if said else {})) == seconds
