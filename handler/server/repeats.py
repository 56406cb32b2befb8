"""Requests that come again under the same Idempotency-Key: they get what the first one gets, not another picture.

A client that lost its connection, or its patience, asks again without knowing how far the first try came. Under its key
it finds the running job, or the answer for a while. So a job with a key outlives its last client by a moment.
"""

import asyncio
import hashlib
import math
import re
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace

from starlette.datastructures import Headers

from handler.api import Reply
from handler.errors import InvalidValue, KeyReused

HEADER = "idempotency-key"
KEY = re.compile(r"[!-~]{1,255}")
REPEATED = {"idempotent-replayed": "true"}
GRACE_S = 10.0  # OpenAI's client waits 0.5 to 8 s before it tries again
KEPT_S, KEPT, KEPT_BYTES = 600.0, 256, 64_000_000  # of answers
Key = tuple[bytes, str]


def key_of(headers: Headers) -> Key | None:
    """The caller's own name for its request, if it gave one; whoever has another API key has other names."""
    given = headers.get(HEADER)
    if given is None:
        return None
    if not KEY.fullmatch(given):
        raise InvalidValue("Idempotency-Key should be 1 to 255 visible ASCII characters.", "Idempotency-Key")
    return hashlib.sha256(headers.get("authorization", "").encode()).digest(), given


@dataclass(slots=True, eq=False)
class Call:
    """One request under way, or its good answer; `until` is when that is forgotten."""

    asked: bytes
    reply: asyncio.Future[Reply]
    waiting: int = 0
    ending: asyncio.TimerHandle | None = None  # once nobody waits
    size: int = 0
    until: float = math.inf


class Repeats:
    """The calls that can be found again. Failures are not kept: they may be tried again under the same key."""

    def __init__(self) -> None:
        self._calls: dict[Key, Call] = {}

    async def call(self, key: Key | None, asked: bytes, start: Callable[[], Awaitable[Reply]]) -> Reply:
        """What `start` answers, or what it answered, or will, to the first who asked the same under this `key`."""
        if key is None:
            return await start()
        self._forget()
        call, digest = self._calls.get(key), hashlib.sha256(asked).digest()
        if call is None:
            return await self._follow(key, self._begin(key, digest, start))
        if call.asked != digest:
            raise KeyReused("This Idempotency-Key came with another request before; use a new one.", "Idempotency-Key")
        return _again(await self._follow(key, call))

    def _begin(self, key: Key, asked: bytes, start: Callable[[], Awaitable[Reply]]) -> Call:
        call = self._calls[key] = Call(asked, asyncio.ensure_future(start()))
        call.reply.add_done_callback(lambda _: self._keep(key, call))
        return call

    async def _follow(self, key: Key, call: Call) -> Reply:
        """Wait for the reply without ending the call when whoever waits goes away."""
        call.waiting += 1
        if call.ending:
            call.ending.cancel()
        try:
            return await asyncio.shield(call.reply)
        finally:
            call.waiting -= 1
            if not call.waiting and not call.reply.done():
                call.ending = asyncio.get_running_loop().call_later(GRACE_S, self._abandon, key, call)

    def _abandon(self, key: Key, call: Call) -> None:
        if not call.waiting and not call.reply.done():
            del self._calls[key]  # first: nobody may find what is being cancelled
            call.reply.cancel()

    def _keep(self, key: Key, call: Call) -> None:
        """Keep a good answer as its body alone, for a while, and as the youngest."""
        if self._calls.get(key) is not call:
            return
        del self._calls[key]
        if call.reply.cancelled() or (reply := call.reply.result()).status >= 400:
            return
        call.size = sum(len(picture.data) for picture in reply.pictures) * 4 // 3
        call.until = time.monotonic() + min(KEPT_S, reply.lasts_s)
        call.reply = asyncio.get_running_loop().create_future()
        call.reply.set_result(_again(reply))
        self._calls[key] = call
        self._forget()

    def _forget(self) -> None:
        """Drop answers that are too old, too many or too large together; the oldest first."""
        kept = [(key, call) for key, call in self._calls.items() if call.until < math.inf]
        count, size, now = len(kept), sum(call.size for _, call in kept), time.monotonic()
        for key, call in kept:
            if call.until > now and count <= KEPT and size <= KEPT_BYTES:
                continue  # a younger one may end earlier, with its URL
            del self._calls[key]
            count, size = count - 1, size - call.size


def _again(reply: Reply) -> Reply:
    """`reply` as a repetition has it: its pictures were counted before."""
    return replace(reply, headers=reply.headers | REPEATED, pictures=(), smaller=None, stored=None)
