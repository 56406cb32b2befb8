"""uvicorn's protocol with httptools, but each head has an end, and a body is read though an upgrade is asked for."""

import sys

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from handler.server.comfy import SOCKETS


class Parsed(HttpToolsProtocol):
    """One connection. Feed it little at once: a head may be larger by that."""

    head: int  # bytes of one, at most
    _bare = 0  # bytes since there was a head or a part of a body
    _part = b""

    def data_received(self, data: bytes) -> None:
        """Read on; refuse what goes on for more than `head` bytes without being a body, as trailers may too."""
        self._part = data
        self._bare += len(data)
        super().data_received(data)
        if self._bare > self.head and not self.transport.is_closing():
            self.send_400_response("")

    def on_headers_complete(self) -> None:
        """A head came to its end."""
        self._bare = 0
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """A part of a body came."""
        self._bare = 0
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
        first = b"%s %s HTTP/%s\r\n" % (self.scope["method"].encode(), self.url, self.scope["http_version"].encode())
        self.data_received(b"".join([first, *lines, b"\r\n", rest]))
