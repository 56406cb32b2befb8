"""What a request that fails leaves behind: of its pictures none is counted, kept or uploaded, though some came out."""

import asyncio
import contextlib
import socket
import threading
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from fakes import FakeFamily
from handler import Api, Picture, Recipe, Settings
from handler.api import store
from handler.api.delivery import delivered
from handler.api.links import Links
from handler.api.store import Store
from handler.core.deadline import Deadline
from handler.core.errors import DeadlineExceeded, NumericalError
from handler.core.request import ImageRequest
from s3_plane import BUCKET, KEY, SECRET, Broken
from threads import until

ASKED = {"prompt": "a red circle", "seed": 7, "num_inference_steps": 1, "response_format": "url"}
LARGE = Picture(bytes(64 << 20), "png", Recipe("spark", "1", "a red circle", (64, 64), 1, 0.0, "flow-match-euler", 7))


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    store._client.cache_clear()
    keys = {"BUCKET_ACCESS_KEY_ID": KEY, "BUCKET_SECRET_ACCESS_KEY": SECRET}
    for name, value in {**keys, "AWS_EC2_METADATA_DISABLED": "true", "AWS_CONFIG_FILE": "none"}.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("where", ["store", "links"])
def test_pictures_of_a_request_that_fails_are_neither_counted_nor_kept(tmp_path: Path, where: str) -> None:
    """The second fails once all that can happen to the first has happened."""
    family, counted, kept = FakeFamily(), list[Any](), {"store_bucket": BUCKET}
    with Broken(500) as double, contextlib.ExitStack() as stack:
        stored = {**kept, "store_endpoint": double.url} if where == "store" else {}
        engine = stack.enter_context(family.engine(volume=tmp_path, batch=1, **stored))
        links = Links(engine.settings)

        async def main() -> Any:
            loop = asyncio.get_running_loop()
            loop.set_default_executor(ThreadPoolExecutor(1))  # so that what is handed in last is done last

            async def quiet() -> None:
                for _ in range(20):
                    await asyncio.to_thread(lambda: None)

            def fail() -> None:
                if family.drawn:
                    asyncio.run_coroutine_threadsafe(quiet(), loop).result(60)
                    raise NumericalError("NaN.")

            family.at_step[1] = fail
            api = Api(engine, counted.append, counted.append, links)
            return await api.call("/generate", {**ASKED, "n": 2}, base="http://here")

        reply = asyncio.run(main())
        until(lambda: not store._hands._running)
        assert (reply.status, family.drawn, counted, double.tries) == (500, [7], [], 0)
        assert not links._keeper._near._files
        assert not [*tmp_path.rglob("kept/pictures/*")]


def test_pictures_of_a_request_that_came_out_are_counted_once(tmp_path: Path) -> None:
    counted, uploaded = list[Picture](), list[float]()
    with Broken(500) as double, FakeFamily().engine(store_bucket=BUCKET, store_endpoint=double.url) as engine:
        reply = asyncio.run(Api(engine, counted.append, uploaded.append).call("/generate", {**ASKED, "n": 2}))
    assert (reply.status, [picture.recipe.seed for picture in counted], len(uploaded)) == (200, [7, 8], 2)
    assert all("upload" not in picture.stages for picture in counted)  # that is told apart


@dataclass
class Slow:
    """A store that reads heads, and bodies only once it may."""

    arrived: threading.Event = field(default_factory=threading.Event)
    gate: threading.Event = field(default_factory=threading.Event)
    ended: threading.Event = field(default_factory=threading.Event)
    received: int = 0
    connections: int = 0

    @contextlib.contextmanager
    def serving(self) -> Iterator[str]:
        with socket.create_server(("127.0.0.1", 0)) as server:
            threading.Thread(target=self._serve, args=(server,), daemon=True).start()
            yield f"http://127.0.0.1:{server.getsockname()[1]}"
            self.gate.set()

    def _serve(self, server: socket.socket) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                connection, _ = server.accept()
                self.connections += 1
                with connection:
                    self._take(connection)

    def _take(self, connection: socket.socket) -> None:
        head = b""
        while b"\r\n\r\n" not in head:
            head += connection.recv(1)
        connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        self.arrived.set()
        assert self.gate.wait(60)
        with contextlib.suppress(ConnectionError):
            while data := connection.recv(1 << 20):
                self.received += len(data)
        self.ended.set()

    def broken_off(self, ask: Callable[[str], Coroutine[Any, Any, None]]) -> None:
        """What `ask` uploads here never comes whole."""
        with self.serving() as url:
            asyncio.run(ask(url))
            self.gate.set()
            assert self.ended.wait(60)
            until(lambda: not store._hands._running)
        assert self.received < len(LARGE.data)


@pytest.mark.parametrize("how", ["who asked leaves", "its time is up"])
def test_an_upload_that_nobody_waits_for_breaks_off(how: str) -> None:
    """And is not tried again: of half a body a store keeps nothing."""
    slow = Slow()

    async def main(url: str) -> None:
        found = Store.of(Settings(store_bucket=BUCKET, store_endpoint=url))
        assert found
        deadline = Deadline()
        keeping = asyncio.create_task(found.keep(LARGE, deadline))
        assert await asyncio.to_thread(slow.arrived.wait, 60)
        if how == "its time is up":
            deadline.hurry()
            assert (await keeping).undelivered == store.SHORT
        else:
            keeping.cancel()
            with pytest.raises(asyncio.CancelledError):
                await keeping

    slow.broken_off(main)
    assert slow.connections == 1


def test_what_is_on_its_way_as_a_requests_time_ends_breaks_off_too() -> None:
    """Its time is up when all are on their way."""
    slow, asked = Slow(), ImageRequest(prompt="x", response_format="url")

    async def main(url: str) -> None:
        found = Store.of(Settings(store_bucket=BUCKET, store_endpoint=url))
        deadline = Deadline()
        keeping = asyncio.create_task(delivered([LARGE], asked, deadline, found, None, None))
        assert await asyncio.to_thread(slow.arrived.wait, 60)
        deadline.no_later(0.0)
        deadline.hurry()
        with pytest.raises(DeadlineExceeded):
            await keeping

    slow.broken_off(main)
