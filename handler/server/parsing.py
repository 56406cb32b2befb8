"""uvicorn's protocol with httptools, within bounds: of a head, of what frames a body, of requests that wait."""

import sys
from typing import Any

from handler.core.errors import SettingsError
from handler.server.comfy import SOCKETS

try:
    from httptools import HttpRequestParser
    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
except ImportError:  # another parser would have other bounds
    raise SettingsError(
        "Serving needs httptools, which requirements.txt names: pip install -r requirements.txt.", "httptools"
    ) from None

HEAD = 64 << 10  # bytes of a request's head, at most; and of what frames its body, beyond as much as the body has
LINE = 16 << 10  # bytes of one header, with its name
LINES = 100  # headers
PART = 4 << 10  # bytes that are parsed at once, so that bounds do not depend on how it comes


class Parsed(HttpToolsProtocol):
    """One connection. Where requests come before those ahead of them are answered, what follows waits unparsed."""

    _bare = 0  # bytes since there was a head, more than of a body
    _part = b""
    _in_head = _in_body = False

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._unparsed = bytearray()

    @property
    def over(self) -> bool:
        """Whether nothing more will be parsed: this connection ends, or is a websocket now."""
        return self.transport.is_closing() or self.transport.get_protocol() is not self

    def data_received(self, data: bytes) -> None:
        """Read on."""
        self._unparsed += data
        self._read_on()

    def _read_on(self) -> None:
        while self._unparsed and not self.pipeline and not self.over:
            part = bytes(self._unparsed[:PART])
            del self._unparsed[:PART]
            self._parse(part)
        if self.over:
            self._unparsed.clear()
        if self._unparsed:
            self.flow.pause_reading()

    def _parse(self, data: bytes) -> None:
        """Refuse what goes on without being a body: heads, chunks that are mostly their own frames, trailers."""
        self._part = data
        self._bare += len(data)
        super().data_received(data)
        self._bare = max(0, self._bare)
        if self._bare > HEAD and not self.over:
            self.send_400_response("")

    def on_response_complete(self) -> None:
        """Read what waited."""
        super().on_response_complete()
        self._read_on()

    def on_message_begin(self) -> None:
        """A head begins."""
        self._in_head, self._in_body = True, False
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        """One of a head; trailers are none."""
        if self._in_body:
            return
        if len(name) + len(value) > LINE or len(self.headers) >= LINES:
            raise ValueError("too large")  # which the parser takes for what cannot be parsed
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """A head came to its end."""
        self._bare, self._in_head, self._in_body = 0, False, True
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """A part of a body came, which may have been framed by as much."""
        self._bare -= 2 * len(body)
        super().on_body(body)

    def _should_upgrade(self) -> bool:
        """Whether the head is to be read again: httptools takes it for the end of what is HTTP."""
        return any(name == b"upgrade" for name, _ in self.headers)

    def handle_websocket_upgrade(self) -> None:
        """Where there is a websocket, become one. Elsewhere read the head again without its upgrade, and what came
        after it: a server may ignore one (RFC 9110, 7.8)."""
        if self.ws_protocol_class and self._get_upgrade() == b"websocket" and self.url.partition(b"?")[0] in SOCKETS:
            return super().handle_websocket_upgrade()
        upgrade = sys.exception()
        assert upgrade is not None
        rest = self._part[upgrade.args[0] :]
        lines = [b"%s: %s\r\n" % header for header in self.headers if header[0] != b"upgrade"]
        self.parser = HttpRequestParser(self)  # one that has read the last request of a connection reads no other
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
        first = b"%s %s HTTP/%s\r\n" % (self.scope["method"].encode(), self.url, self.scope["http_version"].encode())
        self._parse(b"".join([first, *lines, b"\r\n", rest]))
