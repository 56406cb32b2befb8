"""Connections: how many there may be, how long each waits for its client, and what a client may leave unread.

Whatever is spoken on one, HTTP or a websocket, and by whichever event loop. When there is no room, the connection that
has waited longest for its client gives way: one on which nothing is asked, or else one whose request is not whole yet.
"""

import asyncio
import contextlib
import fcntl
import math
import resource
import struct
import termios
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

TICK_S = 1.0  # how often all are looked at
MOST = 1024  # connections, where that many descriptors are free twice
PIECE = 64 << 10  # bytes of an answer that are handed to a transport at once
HEAD_ALONE = 8 << 10  # bytes that wait, until the loop's next turn, for what may follow them at once
TAKEN = 16 << 10  # bytes that a client should at least send, or take, while it is waited for
HEAD, BODY, REST, IDLE, NOTHING = "head", "body", "rest", "idle", ""  # what may be waited for


@dataclass(frozen=True, slots=True)
class Limits:
    """Of all connections together and of each; seconds are without progress, those of a head and a rest in all."""

    most: int = MOST
    idle_s: int = 75  # between requests: proxies keep such for 60 s, and ask again on one that is being closed
    head_s: float = 20.0  # for a head to be whole
    body_s: float = 30.0  # without `TAKEN` bytes of a body
    write_s: float = 30.0  # without `TAKEN` bytes of an answer being taken
    rest_s: float = 30.0  # for what a client still sends though it was answered
    silent_s: float = 5.0  # of those, without a byte
    rest: int = 256 << 20  # bytes of it
    unsent: int = 256 << 20  # bytes of all answers that are not taken yet; if there are more, `hurry_s` is `write_s`
    hurry_s: float = 2.0


def room() -> int:
    """How many connections may be open: half of this process's descriptors. The other half is for its own files, and
    for what is accepted before another gives way."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MOST if limit == resource.RLIM_INFINITY else max(1, min(MOST, limit // 2))


class Connections:
    """All of one process. `speak` makes what speaks on each, as uvicorn makes a protocol."""

    def __init__(self, limits: Limits, speak: Callable[..., Any]) -> None:
        self.limits, self._speak = limits, speak
        self._open: set[Connection] = set()
        self._idle: dict[Connection, None] = {}  # the longest first, as all that is kept in order
        self._reading: dict[Connection, None] = {}
        self._looking: asyncio.TimerHandle | None = None
        self.scarce = False  # more is unsent than may be

    def __call__(self, **given: Any) -> "Connection":
        return Connection(self, self._speak(**given))

    def enter(self, one: "Connection") -> bool:
        """Whether there is room for `one`, after another gave way."""
        self._open.add(one)
        if not self._looking:
            self._looking = one.loop.call_later(TICK_S, self._look, one.loop)
        if len(self._open) <= self.limits.most:
            return True
        eldest = next(iter(self._idle), None) or next(iter(self._reading), None) or self._stuck(one.loop.time())
        self.leave(eldest or one)
        if eldest:
            eldest.abort()
        return eldest is not None

    def _stuck(self, now: float) -> "Connection | None":
        """The one whose client has taken nothing for the longest time, if any."""
        stuck = [each for each in self._open if each.stuck_s(now) > self.limits.hurry_s]
        return max(stuck, key=lambda each: each.stuck_s(now), default=None)

    def order(self, one: "Connection") -> None:
        """Let `one` be the last to give way among those which wait for the same."""
        self._idle.pop(one, None)
        self._reading.pop(one, None)
        if one.waits and one in self._open:
            (self._reading if one.waits == BODY else self._idle)[one] = None

    def leave(self, one: "Connection") -> None:
        """It is closed, or will be in this turn of the loop."""
        self._open.discard(one)
        self._idle.pop(one, None)
        self._reading.pop(one, None)

    def _look(self, loop: asyncio.AbstractEventLoop) -> None:
        self._looking = loop.call_later(TICK_S, self._look, loop) if self._open else None
        self.scarce = sum(each.unsent for each in self._open) > self.limits.unsent
        for each in list(self._open):
            each.look(loop.time())


class Connection(asyncio.Protocol, asyncio.Transport):
    """One: to the event loop a protocol, and to what speaks on it its transport."""

    def __init__(self, all_: Connections, speaks: Any) -> None:
        self._all, self._speaks, self.loop = all_, speaks, speaks.loop
        self.waits = NOTHING
        self._began = self._since = 0.0  # of what it waits for: when it began, and when there was progress
        self._came = 0  # bytes of that
        self._written = self._taken = 0  # bytes, and how many were taken at `_taken_at`
        self._taken_at = self.loop.time()
        self._ends = False  # was answered and hears no more; what still comes is dropped
        self._held = b""  # is sent with what is written next, or in the loop's next turn

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._transport, self._socket = transport, transport.get_extra_info("socket")
        has_room = self._all.enter(self)
        self._speaks.connection_made(self)
        if not has_room:
            self._speaks.crowded()

    def data_received(self, data: bytes) -> None:
        if self._ends:
            self.drop(len(data))
        else:
            self._speaks.data_received(data)

    def eof_received(self) -> bool | None:
        """Both sides end then."""
        return None

    def connection_lost(self, exc: Exception | None) -> None:
        self._all.leave(self)
        self._speaks.connection_lost(exc)

    def pause_writing(self) -> None:
        self._speaks.pause_writing()

    def resume_writing(self) -> None:
        self._speaks.resume_writing()

    def get_protocol(self) -> Any:
        return self._speaks

    def set_protocol(self, protocol: Any) -> None:
        self._speaks = protocol

    def is_closing(self) -> bool:
        return self._ends or self._transport.is_closing()

    def write(self, data: Any) -> None:
        """Send it. An answer's head leaves with its body: that is one packet, and wakes one reader once."""
        if self._ends:
            return
        self._written += len(data)
        if self._held:
            # Not `writelines`, by which asyncio of Python 3.12 waits to send on a connection that is closed already.
            self._transport.write(b"".join((self._held, data)))
            self._held = b""
        elif len(data) <= HEAD_ALONE:
            self._held = bytes(data)
            self.loop.call_soon(self._let_go)
        else:
            self._transport.write(data)

    def _let_go(self) -> None:
        """Send what nothing followed."""
        if self._held and not self._transport.is_closing():
            self._transport.write(self._held)
        self._held = b""

    def abort(self) -> None:
        self._transport.abort()

    def pause_reading(self) -> None:
        self._transport.pause_reading()

    def resume_reading(self) -> None:
        self._transport.resume_reading()

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self._transport.get_extra_info(name, default)

    def close(self) -> None:
        """Close it. A client that still sends would be told of that before it has read its answer, and would not read
        it then; so what it sends is read and dropped for a while (RFC 9112, 9.6)."""
        if self.is_closing():
            return
        self._let_go()
        if not getattr(self._speaks, "sends", False):
            return self._transport.close()
        self._ends = True
        self.expect(REST)
        self._speaks.connections.discard(self._speaks)  # whoever waits for all answers does not wait for this
        self._transport.write_eof()
        self._transport.resume_reading()

    def expect(self, what: str) -> None:
        """From now on it waits for that."""
        self.waits, self._came = what, 0
        self._began = self._since = self.loop.time()
        self._all.order(self)

    def progress(self, size: int) -> None:
        """So many bytes came of what it waits for."""
        self._came += size

    def drop(self, size: int) -> None:
        """So many came that nobody reads."""
        self._came += size
        self._since = self.loop.time()
        if self._came > self._all.limits.rest:
            self.abort()

    @property
    def unsent(self) -> int:
        """Bytes of its answer that are not taken yet, as far as that is known."""
        return self._buffered + getattr(self._speaks, "unwritten", 0)

    @property
    def _buffered(self) -> int:
        return int(self._transport.get_write_buffer_size())

    @property
    def _sending(self) -> int:
        """Bytes that the kernel has and its client does not: of megabytes it takes more only a third at a time."""
        with contextlib.suppress(OSError, ValueError):  # the socket is closed, or its system does not tell
            told = fcntl.ioctl(self._socket.fileno(), termios.TIOCOUTQ, bytes(4))
            return int(struct.unpack("i", told)[0])
        return 0

    def look(self, now: float) -> None:
        """End what it has waited for too long."""
        self._look_at_answer(now)
        limits, waited = self._all.limits, now - self._since
        if waited > {HEAD: limits.head_s, IDLE: limits.idle_s}.get(self.waits, math.inf):
            self._transport.close()
        elif self.waits == REST and (waited > limits.silent_s or now - self._began > limits.rest_s):
            self.abort()
        elif self.waits == BODY and waited > limits.body_s:
            self._late(now)

    def _late(self, now: float) -> None:
        """Of a body too little came, unless nobody read on."""
        if self._came >= TAKEN or not self._transport.is_reading():
            self._came, self._since = 0, now
        else:
            self._speaks.late()

    def stuck_s(self, now: float) -> float:
        """For how long its client has taken nothing worth mentioning of what there is."""
        return now - self._taken_at if self._buffered else 0.0

    def _look_at_answer(self, now: float) -> None:
        buffered, limits = self._buffered, self._all.limits
        taken = self._written - buffered - self._sending
        if not buffered or taken - self._taken >= TAKEN:
            self._taken, self._taken_at = taken, now
        elif self.stuck_s(now) > (limits.hurry_s if self._all.scarce else limits.write_s):
            self.abort()
