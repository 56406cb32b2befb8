"""uvicorn's protocol, but it notes when each request began, waits for no head forever, and answers junk as all else."""

import asyncio
import json
import secrets
import time
from typing import Any

from uvicorn.config import Config

from handler.api.reply import error_reply
from handler.core.errors import RequestError
from handler.server.access import ARRIVED, HEADER, JSON
from handler.server.auth import DEFAULTS
from handler.server.parsing import Parsed

NOT_HTTP = error_reply(RequestError("What came is not a request in HTTP/1.1, or its head is too large."))


class Wire(Parsed):
    """One connection."""

    def __init__(self, config: Config, *args: Any, **options: Any) -> None:
        super().__init__(config, *args, **options)
        self._noted: object = self  # the request that was the last when the time of another was noted
        self._patience: asyncio.TimerHandle | None = None
        self._junk = False  # came, and what may follow it is junk too

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Wait for the first request as for each that follows."""
        super().connection_made(transport)
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait no longer."""
        self._stop_waiting()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Note the time if a request begins: the one before, if any, is all there, and nothing came since.

        Of a body that still comes when it is answered, nobody tells the end; a request may begin with any part then.
        """
        if self._junk:
            return
        before = self.cycle
        unread = before and before.more_body and before.response_complete
        if unread or (self._noted is not before and not (before and before.more_body)):
            self._noted = before
            self.app_state = {**self.app_state, ARRIVED: time.perf_counter()}
            self._wait()
        super().data_received(data)
        if self.cycle is not before or self.over:
            self._stop_waiting()

    @property
    def over(self) -> bool:
        """Whether what may follow is junk too."""
        return self._junk or super().over

    def _wait(self) -> None:
        """For a head, as long as for a request on a connection that is kept."""
        self._stop_waiting()
        self._patience = self.loop.call_later(self.timeout_keep_alive, self._hang_up, self.cycle)

    def _stop_waiting(self) -> None:
        if self._patience:
            self._patience.cancel()

    def _hang_up(self, before: Any) -> None:
        """Unless a head came after all; while the answer `before` it is still to come, wait on."""
        if self.cycle is not before:
            return
        if before is None or before.response_complete:
            self.transport.close()
        else:
            self._wait()

    def send_400_response(self, msg: str) -> None:
        """Answer what cannot be parsed, and hang up; if it came after a whole request, only that is answered."""
        self._junk = True
        if self.cycle and not (self.cycle.more_body or self.cycle.response_complete):
            self.cycle.keep_alive = False
            return
        body = json.dumps(NOT_HTTP.content).encode()
        own = {"content-type": JSON, "content-length": str(len(body)), "connection": "close"}
        headers = {HEADER.decode(): secrets.token_hex(16), **own, **DEFAULTS}
        lines = [f"{name}: {value}\r\n" for name, value in headers.items()]
        self.transport.write("".join(["HTTP/1.1 400 Bad Request\r\n", *lines, "\r\n"]).encode() + body)
        self.transport.close()

    def _unsupported_upgrade_warning(self) -> None:
        """Say nothing: who asks for a WebSocket is answered as for anything else that there is not."""
