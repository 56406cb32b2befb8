"""uvicorn's protocol, but it says what it waits for, notes when each request began, and answers junk as all else."""

import json
import secrets
import time
from functools import partial
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.config import Config

from handler.api.reply import Reply, error_reply
from handler.core.errors import BodyLate, NotReady, RequestError
from handler.server.access import ARRIVED, HEADER, INSTEAD, JSON
from handler.server.auth import DEFAULTS
from handler.server.connections import BODY, HEAD, IDLE, NOTHING, PIECE, REST, Connection
from handler.server.parsing import Parsed

NOT_HTTP = error_reply(RequestError("What came is not a request in HTTP/1.1, or its head is too large."))
LATE = error_reply(BodyLate("The body of the request did not come, or too slowly."))
CROWDED = error_reply(NotReady("All connections that this worker can have are in use; try again."))
REASONS = {400: "Bad Request", 408: "Request Timeout", 503: "Service Unavailable"}


class Wire(Parsed):
    """HTTP on one connection."""

    transport: Connection

    def __init__(self, config: Config, *args: Any, **options: Any) -> None:
        super().__init__(config, *args, **options)
        self.app = partial(_in_pieces, self.app)
        self._junk = False  # came, and what may follow it is junk too
        self._answered: Any = None  # the request that is answered now; `cycle` is the one that came last

    @property
    def over(self) -> bool:
        """Whether what may follow is junk too."""
        return self._junk or super().over

    @property
    def sends(self) -> bool:
        """Whether its client may be sending what nobody reads any more."""
        return self._junk or bool(self.cycle and self.cycle.more_body)

    @property
    def unwritten(self) -> int:
        """Bytes of the answer that were promised and not written yet."""
        cycle = self._answered
        return cycle.expected_content_length if cycle and cycle.response_started and not cycle.response_complete else 0

    @property
    def _answering(self) -> bool:
        return bool(self.cycle) and not self.cycle.response_complete

    def connection_made(self, transport: Any) -> None:
        """Wait for the first request."""
        super().connection_made(transport)
        self.transport.expect(HEAD)

    def connection_lost(self, exc: Exception | None) -> None:
        """Let the request that is answered know, as uvicorn does the one that came last."""
        if self._answered and not self._answered.response_complete:
            self._answered.disconnected = True
            self._answered.message_event.set()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        """A request begins."""
        self.app_state = {**self.app_state, ARRIVED: time.perf_counter()}
        super().on_message_begin()
        if not self._answering:
            self.transport.expect(HEAD)

    def on_headers_complete(self) -> None:
        """Its head is whole; a body may follow."""
        before = self.cycle
        super().on_headers_complete()
        if self.cycle is not before:
            self.transport.expect(BODY)
            if self.expect_100_continue:  # refused, it may send its body all the same, or another request in its place
                self.cycle.keep_alive = False

    def on_body(self, body: bytes) -> None:
        """A part of the body came; of one that is answered nothing is kept."""
        (self.transport.progress if self._answering else self.transport.drop)(len(body))
        super().on_body(body)

    def on_message_complete(self) -> None:
        """All of the request is there."""
        super().on_message_complete()
        if self.cycle and not self._answering:
            self.cycle.more_body = False
        self.transport.expect(NOTHING if self._answering else IDLE)

    def on_response_complete(self) -> None:
        """Wait for the rest of what was answered, or for another request, and begin with what has come of it."""
        if not self.transport.is_closing():
            comes, else_ = (BODY, NOTHING) if self._answering else (REST, HEAD if self._in_head else IDLE)
            self.transport.expect(comes if self.cycle.more_body else else_)
        super().on_response_complete()

    def handle_websocket_upgrade(self) -> None:
        """Whatever it becomes, it waits for nothing now."""
        self.transport.expect(NOTHING)
        super().handle_websocket_upgrade()

    def late(self) -> None:
        """Too little of a body came, if it was asked for and nothing is answered before."""
        if self.pipeline or self.cycle.waiting_for_100_continue:
            return
        if self.cycle.response_started:
            self.transport.abort()
            return
        self.cycle.disconnected, self.cycle.scope["state"][INSTEAD] = True, LATE
        self.cycle.message_event.set()
        self._refuse(LATE)

    def crowded(self) -> None:
        """There is no room for this connection."""
        self._write(CROWDED)
        self.transport.close()

    def send_400_response(self, msg: str) -> None:
        """Answer what cannot be parsed, and hang up; if it came after a whole request, only that is answered."""
        self._junk = True
        if self._answering and not self.cycle.more_body:
            self.cycle.keep_alive = False
        else:
            self._refuse(NOT_HTTP)

    def _start_asgi_task(self, cycle: Any, app: Any) -> None:
        self._answered = cycle
        super()._start_asgi_task(cycle, app)

    def _refuse(self, reply: Reply) -> None:
        self._junk = True
        self._write(reply)
        self.transport.close()

    def _write(self, reply: Reply) -> None:
        """An answer that no app has a part in."""
        body = json.dumps(reply.content).encode()
        own = {"content-type": JSON, "content-length": str(len(body)), "connection": "close"}
        headers = {HEADER.decode(): secrets.token_hex(16), **own, **reply.headers, **DEFAULTS}
        lines = [f"{name}: {value}\r\n" for name, value in headers.items()]
        head = f"HTTP/1.1 {reply.status} {REASONS[reply.status]}\r\n"
        self.transport.write("".join([head, *lines, "\r\n"]).encode() + body)

    def _unsupported_upgrade_warning(self) -> None:
        """Say nothing: who asks for a WebSocket is answered as for anything else that there is not."""


async def _in_pieces(app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
    """`app`, but of a large body no more is handed to a transport than its client takes."""

    async def pass_on(message: Message) -> None:
        body = memoryview(message.get("body", b""))
        if len(body) <= PIECE:
            return await send(message)
        for start in range(0, len(body), PIECE):
            more = message.get("more_body", False) or start + PIECE < len(body)
            await send({**message, "body": body[start : start + PIECE], "more_body": more})

    await app(scope, receive, pass_on)
