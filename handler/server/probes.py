"""Probes on a port of their own: no load reaches the thread and the loop that answer them.

Whatever is in `health.PROBES` is answered there, and nothing else, once on each connection. That the server itself
still answers is not proven by that: if it has not for long, that is told.
"""

import asyncio
import http
import socket
import threading
from collections.abc import Callable

from handler.engine.engine import Engine
from handler.engine.intake import EngineState
from handler.server.auth import DEFAULTS
from handler.server.health import PROBES

HEAD = 8 << 10  # bytes of a request's head, at most
HEAD_S = 5.0  # for it to come
CONNECTIONS = 64  # at a time; of more the oldest is closed, for a probe is over at once
Answer = Callable[[bytes], bytes]


def answer_probes(listener: socket.socket, engine: Engine, stuck: Callable[[], bool]) -> None:
    """Answer on `listener` until this process ends; returns at once. `stuck` is whether the server is."""

    def answer_head(head: bytes) -> bytes:
        return answer(head, engine.state, stuck())

    threading.Thread(target=lambda: asyncio.run(_serve(listener, answer_head)), name="probes", daemon=True).start()


async def _serve(listener: socket.socket, answer: Answer) -> None:
    loop, connections = asyncio.get_running_loop(), list[Probe]()
    server = await loop.create_server(lambda: Probe(answer, connections), sock=listener, backlog=CONNECTIONS)
    await server.serve_forever()


class Probe(asyncio.Protocol):
    """One connection, among the others, oldest first."""

    def __init__(self, answer: Answer, connections: "list[Probe]") -> None:
        self._answer, self._connections, self._head = answer, connections, b""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Wait for a head, but not for ever."""
        self.transport = transport
        self._patience = asyncio.get_running_loop().call_later(HEAD_S, transport.abort)
        self._connections.append(self)
        if len(self._connections) > CONNECTIONS:
            self._connections[0].transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait no longer."""
        self._patience.cancel()
        self._connections.remove(self)

    def data_received(self, data: bytes) -> None:
        """Answer once the head is whole."""
        if self.transport.is_closing():
            return
        self._head += data
        if b"\r\n\r\n" in self._head:
            self.transport.write(self._answer(self._head))
            self.transport.close()
        elif len(self._head) > HEAD:
            self.transport.abort()


def answer(head: bytes, state: EngineState, stuck: bool) -> bytes:
    """To a request with this head."""
    method, _, rest = head.partition(b"\r\n")[0].decode("latin-1").partition(" ")
    path = rest.partition(" ")[0].partition("?")[0]
    status, body = PROBES[path](state) if path in PROBES else (404, b"")
    if method not in ("GET", "HEAD"):
        status, body = 405, b""
    elif stuck and path in PROBES:
        status, body = 503, b""
    sized = {} if status == 204 else {"content-length": str(len(body))}
    typed = {"content-type": "application/json"} if body else {}
    headers = {**sized, **typed, "connection": "close", **DEFAULTS}
    lines = [f"HTTP/1.1 {status} {http.HTTPStatus(status).phrase}", *map(": ".join, headers.items()), "", ""]
    return "\r\n".join(lines).encode() + (body if method == "GET" else b"")
