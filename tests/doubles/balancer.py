"""A load balancer as platforms have them: in turn to each worker whose /health answered 200 when it was last asked.

Workers are told apart by their address. `impatient` makes it pass a request on that a worker refuses because it stops,
as proxies do that are told to; a worker that is taken away by `remove` gets no more, as where a platform ends it.
"""

import asyncio
import contextlib
import itertools
import threading
from collections import Counter
from collections.abc import Callable

import aiohttp
from aiohttp import web

PROBE_S, PROBE_TIMEOUT_S, PATIENCE_S = 0.1, 2, 120
PASSED = ("content-type", "retry-after")


class Balancer:
    """Use as a context; `url` is where callers ask. Its state is for reading: by `until`, from any other thread."""

    def __init__(self, impatient: bool = False) -> None:
        self.probed: Counter[str] = Counter()  # how often each was asked for its health
        self.inside: set[str] = set()
        self.let_in: set[str] = set()  # ever
        self.answered: Counter[str] = Counter()
        self._impatient, self._workers = impatient, list[str]()
        self._changed, self._turn = threading.Condition(), itertools.count()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)

    def __enter__(self) -> "Balancer":
        self._thread.start()
        self.url = asyncio.run_coroutine_threadsafe(self._begin(), self._loop).result(PATIENCE_S)
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result(PATIENCE_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def add(self, worker: str) -> None:
        with self._changed:
            self._workers.append(worker)

    def remove(self, worker: str) -> None:
        with self._changed:
            self._workers.remove(worker)
            self.inside.discard(worker)

    def until(self, true: Callable[[], bool]) -> None:
        """Wait for what a probe or an answer brings about."""
        with self._changed:
            assert self._changed.wait_for(true, PATIENCE_S), (self.inside, self.answered)

    async def _begin(self) -> str:
        self._session = aiohttp.ClientSession()
        app = web.Application(client_max_size=1 << 24)
        app.router.add_route("*", "/{path:.*}", self._pass_on)
        self._runner = web.AppRunner(app, access_log=None)
        await self._runner.setup()
        await (site := web.TCPSite(self._runner, "127.0.0.1", 0)).start()
        self._probing = asyncio.create_task(self._probe())
        assert site._server
        return f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}"  # type: ignore[attr-defined]

    async def _end(self) -> None:
        self._probing.cancel()
        await self._runner.cleanup()
        await self._session.close()

    async def _probe(self) -> None:
        while True:
            await asyncio.gather(*map(self._ask, self._workers))
            await asyncio.sleep(PROBE_S)

    async def _ask(self, worker: str) -> None:
        healthy = False
        timeout = aiohttp.ClientTimeout(total=PROBE_TIMEOUT_S)
        with contextlib.suppress(aiohttp.ClientError, TimeoutError):
            async with self._session.get(f"{worker}/health", timeout=timeout) as answer:
                healthy = answer.status == 200
        with self._changed:
            self.probed[worker] += 1
            if worker in self._workers:  # still
                (self.inside.add if healthy else self.inside.discard)(worker)
                self.let_in |= self.inside
            self._changed.notify_all()

    async def _pass_on(self, request: web.Request) -> web.Response:
        body, reply = await request.read(), None
        found = sorted(self.inside)
        first = next(self._turn)
        for worker in (found[(first + place) % len(found)] for place in range(len(found))):
            reply = await self._reply(worker, request, body) or reply
            if reply and (reply.status != 503 or not self._impatient):
                break
        return reply or web.Response(status=503, text="no worker is ready")

    async def _reply(self, worker: str, request: web.Request, body: bytes) -> web.Response | None:
        """What `worker` answers; None if it has left, and was not asked."""
        headers = {name: value for name, value in request.headers.items() if name.lower() in PASSED}
        try:
            async with self._session.request(
                request.method, worker + request.path_qs, data=body, headers=headers
            ) as answer:
                told = {name: answer.headers[name] for name in PASSED if name in answer.headers}
                reply = web.Response(status=answer.status, body=await answer.read(), headers=told)
        except (aiohttp.ClientOSError, aiohttp.ServerDisconnectedError):  # also of a connection that it kept
            return None
        except aiohttp.ClientError as error:
            return web.Response(status=502, text=repr(error))
        with self._changed:
            self.answered[worker] += 1
            self._changed.notify_all()
        return reply
