"""Answers as server-sent events: partial pictures while they come, then the result, or the error.

A stream always ends with a terminal event, for a client does not notice one that is cut short. Comments keep it alive.
What is refused at once is refused with its HTTP status, as without a stream.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from itertools import chain
from typing import Any

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from handler.api.pieces import encoded, pieces
from handler.api.reply import Reply
from handler.api.showing import OnPartial
from handler.server.access import spread

HELD = 4  # events: a request has three partial pictures at most, and of steps only the last one counts
PATIENCE_S = 10.0  # proxies cut what says nothing for 30 s and more
HEADERS = {"cache-control": "no-store", "x-accel-buffering": "no"}
PROGRESS = ".progress"  # of the type of an event
ALIVE = b": still here\n\n"
Completed = Callable[[dict[str, Any]], list[dict[str, Any]]]


def wanted(payload: Any, within: str = "") -> bool:
    """Whether a body asks for events: by its field `within`, where that is named, else by itself."""
    said = payload.get(within) if within and isinstance(payload, dict) else payload
    return isinstance(said, dict) and said.get("stream") is True


class Events:
    """What there is to say and was not sent yet. A slow reader misses the oldest of it, and holds up nobody."""

    def __init__(self, task: "asyncio.Future[Reply]") -> None:
        self._task = task
        self._held: deque[dict[str, Any]] = deque(maxlen=HELD)
        self._came = asyncio.Event()

    def put(self, event: dict[str, Any]) -> None:
        """On the event loop's thread. Of two steps in a row the later one says all."""
        kind = event.get("type", "")
        if kind.endswith(PROGRESS) and self._held and self._held[-1].get("type") == kind:
            self._held.pop()
        self._held.append(event)
        self._came.set()

    async def next(self) -> dict[str, Any] | None:
        """The next event; None if the call has ended and all were taken, or nothing came for a while."""
        if not self._held:
            self._came.clear()
            waiting = asyncio.ensure_future(self._came.wait())
            either: set[asyncio.Future[Any]] = {waiting, self._task}
            try:
                await asyncio.wait(either, timeout=PATIENCE_S, return_when=asyncio.FIRST_COMPLETED)
            finally:
                waiting.cancel()
        return self._held.popleft() if self._held else None


class Streaming(StreamingResponse):
    """A stream of events that ends its `task` with itself, also if nobody was left to hear the first of them."""

    def __init__(self, body: AsyncIterator[bytes], task: "asyncio.Future[Reply]") -> None:
        super().__init__(body, headers=HEADERS, media_type="text/event-stream")
        self._task = task

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:  # not in the body: what was never begun has no end
            self._task.cancel()


async def stream(
    call: Callable[[OnPartial], Awaitable[Reply]], completed: Completed, always: bool = False
) -> Reply | Streaming:
    """Run `call` as a stream; the Reply itself if it failed before there was anything to say, unless `always`.

    `completed` makes the last events of the body. The end of the answer, however it comes, cancels the call.
    """
    loop = asyncio.get_running_loop()
    task = asyncio.ensure_future(call(lambda event: loop.call_soon_threadsafe(events.put, event)))
    events = Events(task)
    try:
        first = await events.next()
    except asyncio.CancelledError:
        task.cancel()
        raise
    if first is None and task.done() and task.result().status >= 400 and not always:
        return task.result()

    async def body() -> AsyncIterator[bytes]:
        event = first
        while event or not task.done():
            yield b"".join(_sent(event)) if event else ALIVE
            event = await events.next()
        reply = task.result()
        for last in [{"error": reply.content["error"]}] if reply.status >= 400 else completed(reply.content):
            async for piece in spread(_sent(last)):
                yield piece

    return Streaming(body(), task)


def _sent(event: dict[str, Any]) -> Iterator[bytes]:
    name = f"event: {event['type']}\n" if "type" in event else ""
    return chain([f"{name}data: ".encode()], pieces(encoded(event)), [b"\n\n"])
