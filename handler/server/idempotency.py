"""Requests that come again under the same Idempotency-Key: they get what the first one gets, not another picture.

A client that lost its connection, or its patience, asks again without knowing how far the first try came. Under its key
it finds the running job, or the answer for a while. So a job with a key outlives its last client by a moment. Whoever
waits for it does so until its own deadline; the job has none but that somebody waits.
"""

import asyncio
import hashlib
import math
import re
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from starlette.datastructures import Headers

from handler.api.reply import Reply, error_reply
from handler.core.caller import CALLER
from handler.core.deadline import LATE, Deadline
from handler.core.errors import DeadlineExceeded, InvalidValue, KeyReused, KindlingError
from handler.core.recipe import Picture

HEADER = "idempotency-key"
KEY = re.compile(r"[!-~]{1,255}")
REPEATED = {"idempotent-replayed": "true"}
GRACE_S = 10.0  # OpenAI's client waits 0.5 to 8 s before it tries again
KEPT_S, KEPT, KEPT_BYTES = 600.0, 256, 64_000_000  # of answers
KEPT_JOBS = 1000
Key = tuple[bytes, str]
Start = Callable[[Deadline], Awaitable[Reply]]


def key_of(headers: Headers) -> Key | None:
    """The caller's own name for its request, if it gave one; whoever has another key has other names."""
    given = headers.get(HEADER)
    if given is None:
        return None
    if not KEY.fullmatch(given):
        raise InvalidValue("Idempotency-Key should be 1 to 255 visible ASCII characters.", "Idempotency-Key")
    return CALLER.get(), given


def fingerprint(path: str, body: bytes, form: Mapping[str, Any] | None, *accepted: str) -> bytes:
    """Of what is asked; of a form by its fields, for with another boundary it is still the same.

    `accepted` are the formats of a picture that is sent by itself.
    """
    digest = hashlib.sha256(repr((path, *accepted)).encode())
    fields = [("", body)] if form is None else [(n, each) for n, v in form.items() for each in _several(v)]
    for name, value in fields:
        data = value if isinstance(value, bytes) else repr(value).encode()
        digest.update(repr((name, len(data))).encode())
        digest.update(data)
    return digest.digest()


def _several(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


@dataclass(slots=True, eq=False)
class Call:
    """One request under way, or its good answer; `until` is when that is forgotten.

    `waiting` has, of each who waits, what is done once that one's time is short; `deadline` never comes, but hurries
    while there is such a one. `grace` is until when who left may come back, in the loop's seconds; `pictures` are for
    the first who gets the answer. `job_s` is for how long the job that the answer accepts may be asked for; 0 for none.
    """

    asked: bytes
    reply: asyncio.Future[Reply]
    deadline: Deadline
    waiting: set[asyncio.Future[None]] = field(default_factory=set)
    grace: float = 0.0
    ending: asyncio.TimerHandle | None = None
    pictures: tuple[Picture, ...] = ()
    size: int = 0
    until: float = math.inf
    job_s: float = 0.0

    def pace(self, _: object = None) -> None:
        """Hurry, or no longer, as those who wait now would have it."""
        self.deadline.hurry(any(short.done() for short in self.waiting))


class Repeats:
    """The calls that can be found again. Failures are not kept: they may be tried again under the same key.

    `late` makes the error of whose deadline passes.
    """

    def __init__(self, late: Callable[[], KindlingError] = lambda: DeadlineExceeded(LATE)) -> None:
        self._late = late
        self._calls: dict[Key, Call] = {}

    def knows(self, key: Key | None) -> bool:
        """Whether a request under `key` is under way, or its answer is here."""
        self._forget()
        return key in self._calls

    async def call(
        self,
        key: Key | None,
        asked: bytes,
        start: Start,
        deadline: Deadline | None = None,
        job_s: float = 0.0,
    ) -> Reply:
        """What `start` answers, or what it answered, or will, to the first who asked the same under this `key`.

        `asked` is a `fingerprint`. Whoever asks waits until `deadline`. What accepts a job that may be asked for in the
        next `job_s` seconds is kept for as long.
        """
        deadline = deadline or Deadline()
        if key is None:
            return await start(deadline)
        known = self.knows(key)
        call = self._calls[key] if known else self._begin(key, asked, start, job_s)
        if call.asked != asked:
            raise KeyReused("This Idempotency-Key came with another request before; use a new one.", "Idempotency-Key")
        try:
            reply = await self._follow(key, call, deadline)
        except DeadlineExceeded:
            return error_reply(self._late())
        pictures, call.pictures = call.pictures, ()
        return replace(reply, headers=reply.headers | (REPEATED if known else {}), pictures=pictures)

    def forget(self, key: Key, reply: Reply) -> None:
        """The answer under this `key`, if it is still `reply`, is good no longer."""
        call = self._calls.get(key)
        if call and call.until < math.inf and call.reply.result().content is reply.content:
            del self._calls[key]

    def _begin(self, key: Key, asked: bytes, start: Start, job_s: float) -> Call:
        unending = Deadline()
        call = self._calls[key] = Call(asked, asyncio.ensure_future(start(unending)), unending, job_s=job_s)
        call.reply.add_done_callback(lambda _: self._keep(key, call))
        return call

    async def _follow(self, key: Key, call: Call, deadline: Deadline) -> Reply:
        """Wait for the reply without ending the call when whoever waits goes away."""
        loop = asyncio.get_running_loop()
        short = asyncio.ensure_future(deadline.short())
        call.waiting.add(short)
        short.add_done_callback(call.pace)
        if call.ending:
            call.ending.cancel()
        try:
            return await deadline.hold(asyncio.shield(call.reply))
        except asyncio.CancelledError:  # it goes away, and may come back
            call.grace = loop.time() + GRACE_S
            raise
        finally:
            call.waiting.discard(short)
            short.cancel()
            call.pace()
            if not call.waiting and not call.reply.done():
                call.ending = loop.call_later(max(0.0, call.grace - loop.time()), self._abandon, key, call)

    def _abandon(self, key: Key, call: Call) -> None:
        if not call.waiting and not call.reply.done():
            del self._calls[key]  # first: nobody may find what is being cancelled
            call.reply.cancel()

    def _keep(self, key: Key, call: Call) -> None:
        """Keep a good answer for a while, and as the youngest."""
        if self._calls.get(key) is not call:
            return
        del self._calls[key]
        if call.reply.cancelled() or (reply := call.reply.result()).status >= 400:
            return
        call.size = sum(len(each.data) for each in reply.pictures if not each.url)
        call.pictures = tuple(replace(each, data=b"") for each in reply.pictures)  # only counted: the body has all
        call.until = time.monotonic() + (call.job_s or min(KEPT_S, reply.lasts_s))
        call.reply = asyncio.get_running_loop().create_future()
        call.reply.set_result(replace(reply, smaller=None, stored=None, pictures=()))
        self._calls[key] = call
        self._forget()

    def _forget(self) -> None:
        """Drop answers that are too old, too many or too large together; the oldest first. Jobs are counted apart."""
        kept = [(key, call) for key, call in self._calls.items() if call.until < math.inf]
        self._drop([one for one in kept if not one[1].job_s], KEPT)
        self._drop([one for one in kept if one[1].job_s], KEPT_JOBS)

    def _drop(self, kept: list[tuple[Key, Call]], most: int) -> None:
        count, size, now = len(kept), sum(call.size for _, call in kept), time.monotonic()
        for key, call in kept:
            if call.until > now and count <= most and size <= KEPT_BYTES:
                continue  # a younger one may end earlier, with its URL
            del self._calls[key]
            count, size = count - 1, size - call.size
