"""uvicorn's protocol, but for two things: it notes when each request began, and answers what is no HTTP as all else."""

import json
import secrets
import time
from typing import TYPE_CHECKING, Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol

from handler.errors import RequestError
from handler.reply import refusal
from handler.server.guard import DEFAULTS
from handler.server.observe import ARRIVED, HEADER, JSON

NOT_HTTP = refusal(RequestError("What came is not a request in HTTP/1.1, or its head is too large."))

if TYPE_CHECKING:  # one of two classes that are alike in what is used here
    from uvicorn.protocols.http.h11_impl import H11Protocol as Base
else:
    Base = AutoHTTPProtocol


class Wire(Base):
    """One connection."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._noted: object = self  # the request that was the last when the time of another was noted

    def data_received(self, data: bytes) -> None:
        """Note the time if a request begins: the one before, if any, is all there, and nothing came since.

        Of a body that still comes when it is answered, nobody tells the end; a request may begin with any part then.
        """
        before = self.cycle
        unread = before and before.more_body and before.response_complete
        if unread or (self._noted is not before and not (before and before.more_body)):
            self._noted = before
            self.app_state = {**self.app_state, ARRIVED: time.perf_counter()}
        super().data_received(data)

    def send_400_response(self, msg: str) -> None:
        """Answer what cannot be parsed, and hang up."""
        body = json.dumps(NOT_HTTP.content).encode()
        own = {"content-type": JSON, "content-length": str(len(body)), "connection": "close"}
        headers = {HEADER.decode(): secrets.token_hex(16), **own, **DEFAULTS}
        lines = [f"{name}: {value}\r\n" for name, value in headers.items()]
        self.transport.write("".join(["HTTP/1.1 400 Bad Request\r\n", *lines, "\r\n"]).encode() + body)
        self.transport.close()

    def _unsupported_upgrade_warning(self) -> None:
        """Say nothing: who asks for a WebSocket is answered as for anything else that there is not."""
