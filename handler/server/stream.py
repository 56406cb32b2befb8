"""Answers as server-sent events: partial pictures while they come, then the result, or the error.

A stream always ends with a terminal event, for a client does not notice one that is cut short. Comments keep it alive.
What is refused at once is refused with its HTTP status, as without a stream.
"""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from starlette.responses import StreamingResponse

from handler.api import OnPartial, Reply

PATIENCE_S = 10.0  # proxies cut what says nothing for 30 s and more
HEADERS = {"cache-control": "no-store", "x-accel-buffering": "no"}
ALIVE = b": still here\n\n"
Completed = Callable[[dict[str, Any]], list[dict[str, Any]]]


async def stream(call: Callable[[OnPartial], Awaitable[Reply]], completed: Completed) -> Reply | StreamingResponse:
    """Run `call` as a stream; the Reply itself if it failed before there was anything to say.

    `completed` makes the last events of the body. Closing the stream cancels the call.
    """
    loop, events = asyncio.get_running_loop(), asyncio.Queue[dict[str, Any]]()
    task = asyncio.ensure_future(call(lambda event: loop.call_soon_threadsafe(events.put_nowait, event)))
    try:
        first = await _next(events, task)
    except asyncio.CancelledError:
        task.cancel()
        raise
    if first is None and task.done() and task.result().status >= 400:
        return task.result()

    async def body() -> AsyncIterator[bytes]:
        try:
            event = first
            while event or not task.done():
                yield _sent(event) if event else ALIVE
                event = await _next(events, task)
            reply = task.result()
            for last in [{"error": reply.body["error"]}] if reply.status >= 400 else completed(reply.body):
                yield _sent(last)
        finally:
            task.cancel()

    return StreamingResponse(body(), headers=HEADERS, media_type="text/event-stream")


async def _next(events: asyncio.Queue[dict[str, Any]], task: asyncio.Future[Reply]) -> dict[str, Any] | None:
    """The next event; None if the call has ended and all were taken, or nothing came for a while."""
    waiting = asyncio.ensure_future(events.get())
    either: set[asyncio.Future[Any]] = {waiting, task}
    try:
        await asyncio.wait(either, timeout=PATIENCE_S, return_when=asyncio.FIRST_COMPLETED)
        if waiting.done():
            return waiting.result()
        with contextlib.suppress(asyncio.QueueEmpty):
            return events.get_nowait()
        return None
    finally:
        waiting.cancel()


def _sent(event: dict[str, Any]) -> bytes:
    name = f"event: {event['type']}\n" if "type" in event else ""
    return f"{name}data: {json.dumps(event)}\n\n".encode()
