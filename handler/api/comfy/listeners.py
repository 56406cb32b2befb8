"""Who listens to what is told of jobs: websockets, each with its client's id. One that does not read is let go.

All of this is for the event loop alone.
"""

import asyncio
import json
import struct
from collections import deque
from collections.abc import Iterator
from typing import Any

HELD = 20_000  # messages that wait for one client: one for each node of a graph comes at once
HELD_BYTES = 32 << 20
MOST = 64  # websockets
PREVIEW, DESCRIBED = 1, 4  # the events of binary messages: a picture, in JPEG (1) or PNG (2), and one with its node
KINDS = {"jpeg": 1, "png": 2}
Message = str | bytes


def message(kind: str, data: dict[str, Any]) -> str:
    """What is told, as JSON."""
    return json.dumps({"type": kind, "data": data}, separators=(",", ":"))


def picture(data: bytes, form: str) -> bytes:
    """An encoded picture as a binary message."""
    return struct.pack(">II", PREVIEW, KINDS[form]) + data


def described(data: bytes, form: str, whose: dict[str, Any]) -> bytes:
    """An encoded picture as a binary message that says `whose` it is."""
    said = json.dumps({**whose, "image_type": f"image/{form}"}).encode()
    return struct.pack(">II", DESCRIBED, len(said)) + said + data


class Listener:
    """One websocket, of the client with this id. It `knows` what is not in ComfyUI's first protocol if it says so.

    `over` is set once nothing more will come: it read too slowly, or there are too many.
    """

    def __init__(self, client: str) -> None:
        self.client = client
        self.over = self.knows = False
        self._held: deque[Message] = deque()
        self._bytes = 0
        self._came = asyncio.Event()

    def put(self, said: Message) -> None:
        """Let it have `said`, if it still listens."""
        if self.over:
            return
        self._held.append(said)
        self._bytes += len(said)
        if len(self._held) > HELD or self._bytes > HELD_BYTES:
            self.end()
        self._came.set()

    @property
    def behind(self) -> bool:
        """Whether it has not taken all yet: then it needs no preview."""
        return bool(self._held)

    async def next(self) -> Message | None:
        """What comes next; None if nothing will."""
        while not self._held and not self.over:
            self._came.clear()
            await self._came.wait()
        if self.over:
            return None
        said = self._held.popleft()
        self._bytes -= len(said)
        return said

    def end(self) -> None:
        """Tell it nothing more."""
        self.over = True
        self._held.clear()
        self._came.set()


class Listeners:
    """All websockets. Several may be of one client, as two tabs of a page are, and each hears all of it."""

    def __init__(self) -> None:
        self._listening: dict[Listener, None] = {}

    def __len__(self) -> int:
        return len(self._listening)

    def __contains__(self, client: str) -> bool:
        return any(self._of(client))

    def add(self, listener: Listener) -> None:
        """One more; where there are too many, whoever listened for longest hears no more."""
        while len(self._listening) >= MOST:
            self.remove(next(iter(self._listening)))
        self._listening[listener] = None

    def remove(self, listener: Listener) -> None:
        """It went away."""
        listener.end()
        self._listening.pop(listener, None)

    def tell(self, client: str | None, said: Message) -> None:
        """Tell one client; all, if None."""
        for listener in [*self._of(client)]:
            listener.put(said)

    def show(self, client: str, data: bytes, whose: dict[str, Any]) -> None:
        """Let one client see a small JPEG of what is coming, as each of its websockets knows to."""
        for listener in [*self._of(client)]:
            listener.put(described(data, "jpeg", whose) if listener.knows else picture(data, "jpeg"))

    def keen(self, client: str) -> bool:
        """Whether this client listens, and has taken all there was."""
        return any(not listener.behind for listener in self._of(client))

    def end(self) -> None:
        """Tell nobody anything more."""
        for listener in [*self._listening]:
            self.remove(listener)

    def _of(self, client: str | None) -> Iterator[Listener]:
        return (listener for listener in self._listening if client in (None, listener.client))
