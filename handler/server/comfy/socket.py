"""ComfyUI's websocket: what is told of prompts goes out, and of what comes in only the first message matters."""

import asyncio
import contextlib
import uuid
from typing import Any

from starlette.websockets import WebSocket, WebSocketDisconnect

from handler.api.comfy.forwarding import Forwarding
from handler.api.comfy.listeners import Listener, message
from handler.api.comfy.service import Comfy
from handler.api.comfy.stats import features
from handler.core.untrusted import Malformed, parse
from handler.engine.intake import OPEN

LONGEST, LONGEST_FLAGS = 200, 64 << 10  # characters of a client's id, and of what it says that it can
TICK_S = 0.3
LEAVING, SLOW = 1001, 1013  # codes of RFC 6455 and its registry: going away; try again later


async def listen(websocket: WebSocket) -> None:
    """One client. Its prompts go on when it leaves."""
    comfy: Comfy = websocket.app.state.comfy
    listener = Listener((websocket.query_params.get("clientId") or uuid.uuid4().hex)[:LONGEST])
    forwarding = Forwarding(comfy, listener)
    await forwarding.begin()
    await websocket.accept()
    comfy.listeners.add(listener)
    _greet(comfy, listener)
    ways = (_send(websocket, listener), _receive(websocket, comfy, listener), _watch(comfy, forwarding))
    tasks = [asyncio.create_task(way) for way in ways]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if tasks[1] not in done:  # it is still there
            with contextlib.suppress(RuntimeError, WebSocketDisconnect):  # it went away just now
                await websocket.close(SLOW if listener.over else LEAVING)
    finally:
        comfy.listeners.remove(listener)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _greet(comfy: Comfy, listener: Listener) -> None:
    listener.put(message("status", {"status": comfy.remaining(), "sid": listener.client}))
    for job in comfy.active.values():
        if job.client == listener.client and job.executed:
            listener.put(message("executing", {"node": job.executed[-1], "prompt_id": job.id}))


async def _send(websocket: WebSocket, listener: Listener) -> None:
    """Until nothing more will come, or nobody takes it."""
    while (said := await listener.next()) is not None:
        if isinstance(said, bytes):
            await websocket.send_bytes(said)
        else:
            await websocket.send_text(said)


async def _receive(websocket: WebSocket, comfy: Comfy, listener: Listener) -> None:
    """Until it goes away."""
    first = True
    while (came := await websocket.receive())["type"] == "websocket.receive":
        if first and (flags := _flags(came.get("text"))) is not None:
            listener.knows = flags.get("supports_preview_metadata") is True
            listener.put(message("feature_flags", features(comfy.api.engine.settings)))
        first = False


def _flags(text: Any) -> dict[str, Any] | None:
    """What a client says that it can, which then wants to hear what this server can."""
    try:
        said = parse((text or "null")[:LONGEST_FLAGS])
    except Malformed:
        return None
    if not isinstance(said, dict) or said.get("type") != "feature_flags":
        return None
    found = said.get("data")
    return found if isinstance(found, dict) else {}


async def _watch(comfy: Comfy, forwarding: Forwarding) -> None:
    """Until this worker leaves; meanwhile, tell of prompts at other workers."""
    until, loop = 0.0, asyncio.get_running_loop()
    while comfy.busy or comfy.api.engine.state in OPEN:
        if loop.time() >= until:
            until = loop.time() + await forwarding.look()
        await asyncio.sleep(TICK_S)
