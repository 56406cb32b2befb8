"""Refusals: at which pace they leave, in a clock's seconds; and that who was let in stays in, whatever it sends."""

import asyncio
import contextlib
import json
import socket
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import Future
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from starlette.types import Message
from test_faults import PATIENCE_S, ROUTE, Faulty, faulty

from handler import Settings
from handler.engine.engine import Engine
from handler.server.app import create_app
from handler.server.refusals import AT_ONCE_S, LATEST_S, RATE, Refusals


class Clock(asyncio.SelectorEventLoop):
    """An event loop whose time goes on when nothing else does."""

    now = 0.0

    def time(self) -> float:
        return self.now

    def _run_once(self) -> None:
        if not self._ready and self._scheduled:  # type: ignore[attr-defined]
            self.now = max(self.now, self._scheduled[0]._when)  # type: ignore[attr-defined]
        super()._run_once()  # type: ignore[misc]


def seconds(work: Callable[[], Awaitable[object]]) -> float:
    """How long it takes by the clock."""
    with contextlib.closing(Clock()) as loop:
        loop.run_until_complete(work())
        return loop.now


def test_a_few_refusals_leave_at_once_and_many_one_after_another() -> None:
    async def closed_loop(clients: int, each: int) -> None:
        refusals = Refusals()

        async def client() -> None:
            for _ in range(each):
                await refusals.turn()

        await asyncio.gather(*(client() for _ in range(clients)))

    few = int(RATE * AT_ONCE_S)
    assert seconds(lambda: closed_loop(few, 1)) == 0
    assert seconds(lambda: closed_loop(50, 100)) == pytest.approx(5000 / RATE - AT_ONCE_S, rel=0.01)


def test_no_refusal_waits_for_long_however_many_there_are() -> None:
    async def at_once() -> None:
        refusals = Refusals()
        await asyncio.gather(*(refusals.turn() for _ in range(10 * int(RATE * LATEST_S))))

    assert seconds(at_once) == pytest.approx(LATEST_S, rel=0.01)


@pytest.mark.parametrize(
    ("path", "status", "paced"),
    [("/nowhere", 404, True), ("/v1/models", 401, True), ("/health", 503, False), ("/ping", 204, False)],
)
def test_what_is_refused_is_paced_and_no_probe(path: str, status: int, paced: bool) -> None:
    count = 2 * int(RATE * AT_ONCE_S)

    answers, app = list[int](), create_app(Engine(Settings(api_keys=("one",))))

    async def ask() -> None:
        async def send(message: Message) -> None:
            if message["type"] == "http.response.start":
                answers.append(message["status"])

        async def receive() -> Message:
            return {"type": "http.request"}

        headers = [(b"authorization", b"Bearer one")] if status == 404 else []
        scope = {"type": "http", "method": "GET", "path": path, "headers": headers, "query_string": b""}
        await app(scope, receive, send)

    async def all_at_once() -> None:
        await asyncio.gather(*(ask() for _ in range(count)))

    took = seconds(all_at_once)
    assert answers == [status] * count
    assert took == (pytest.approx(AT_ONCE_S, rel=0.05) if paced else 0)


def test_who_waits_to_be_refused_keeps_no_place() -> None:
    engine, at_once = Engine(Settings(api_keys=("one",))), int(RATE * AT_ONCE_S)
    app, kept = create_app(engine), list[int]()
    headers = [(b"authorization", b"Bearer one"), (b"content-type", b"application/json")]

    async def ask(path: str) -> None:
        async def send(message: Message) -> None:
            if message["type"] == "http.response.start" and path == ROUTE:
                kept.append(engine.queue.places.others)

        async def receive() -> Message:
            return {"type": "http.request", "body": b"{"}

        scope = {"type": "http", "method": "POST", "path": path, "headers": headers, "query_string": b""}
        await app(scope, receive, send)

    async def all_at_once() -> None:
        await asyncio.gather(*(ask("/nowhere") for _ in range(at_once)))  # who may be refused at once
        await asyncio.gather(*(ask(ROUTE) for _ in range(at_once)))

    seconds(all_at_once)
    assert kept == [0] * at_once


@pytest.fixture
def server() -> Iterator[Faulty]:
    """Whose queue holds two, of which one may be kept for who still sends; the other is taken."""
    with faulty(KINDLING_QUEUE="2") as started:
        yield started


def filled(server: Faulty) -> list[Future[httpx.Response]]:
    """A request that is drawn until `release`, and one that waits."""
    running = [server.hold(), server.begin("fine")]
    server.waiting(1)
    return running


def announced(server: Faulty, path: str, size: int) -> socket.socket:
    """A connection on which a body was asked for, after a head that was let in."""
    address = urlsplit(server.url)
    connection = socket.create_connection((address.hostname, address.port), PATIENCE_S)
    lines = (f"POST {path} HTTP/1.1", "Host: localhost", f"Content-Length: {size}")
    connection.sendall("\r\n".join((*lines, "Expect: 100-continue", "", "")).encode())
    assert connection.recv(1 << 10).startswith(b"HTTP/1.1 100 ")
    return connection


WAYS = {  # of asking for the same
    "plain": (ROUTE, {}),
    "stream": (ROUTE, {"stream": True}),
    "native": ("/generate", {}),
    "job": (ROUTE, {"async": True}),
}


@pytest.mark.parametrize(("path", "fields"), WAYS.values(), ids=WAYS)
def test_who_was_let_in_by_its_head_stays_in(server: Faulty, path: str, fields: dict[str, Any]) -> None:
    running, body = filled(server), json.dumps({"prompt": "fine", **fields}).encode()
    connection = announced(server, path, len(body))
    assert server.post("one too many").status_code == 429
    connection.sendall(body)
    server.waiting(2)
    server.release()
    with connection, connection.makefile("rb") as answer:
        assert answer.readline().split()[1] in (b"200", b"202")
    assert [one.result().status_code for one in running] == [200, 200]


@pytest.mark.parametrize("body", [b"{", b""], ids=["refused", "gone"])
def test_who_comes_to_nothing_gives_its_place_back(server: Faulty, body: bytes) -> None:
    running, hasty = filled(server), {"x-deadline-s": "0.1"}
    with announced(server, ROUTE, 1) as connection:
        assert server.post("one too many", hasty).status_code == 429
        connection.sendall(body)
    while (answer := server.post("one more", hasty)).status_code == 429:  # until that is noticed
        pass
    assert answer.status_code == 504  # it waited
    server.release()
    assert [one.result().status_code for one in running] == [200, 200]
