"""uvicorn's protocol with h11; what follows a request waits unparsed until that is answered: so heads have an end."""

from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from handler.server.comfy import SOCKETS

# The states of a client whose request is all there; in the second it asks for an upgrade.
OVER = (h11.DONE, h11.MIGHT_SWITCH_PROTOCOL)  # type: ignore[attr-defined]


class Parsed(H11Protocol):
    """One connection. Feed it little at once: h11 limits only a head that is not whole yet."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._waiting: list[bytes] = []

    def data_received(self, data: bytes) -> None:
        """Read on, or once the answer is out."""
        if self.conn.their_state in OVER:
            self._waiting.append(data)
            self.flow.pause_reading()
        else:
            super().data_received(data)

    def _should_upgrade(self) -> bool:
        """Only where there is a websocket; elsewhere an upgrade is passed over."""
        path = self.scope["raw_path"]
        return bool(self.ws_protocol_class) and self._get_upgrade() == b"websocket" and path in SOCKETS

    def on_response_complete(self) -> None:
        """Read what waited, as little at once as it came."""
        super().on_response_complete()
        waiting, self._waiting = self._waiting, []
        for data in waiting:
            if not self.transport.is_closing():
                self.data_received(data)
