"""By when an answer is wanted, and by when a process that was told to leave is gone: one absolute end, handed through.

Times are `time.perf_counter`'s seconds, which never go back.
"""

import asyncio
import contextlib
import math
import time
from collections.abc import Awaitable
from typing import Self, TypeVar

from handler.core.errors import DeadlineExceeded

T = TypeVar("T")
LATE = "The picture was not ready in the time that this request may take. Ask for less, or allow more."
EXIT_S = 28.0  # a platform kills what has not left about 30 s after it was told to
DRAIN_S = 22.0  # of `EXIT_S`, for what was accepted
EARLIER, LEAST_S = 1 / 20, 0.05  # than a client hangs up it is answered: this share of its patience, at least that
SHARE, MOST_S = 1 / 4, 1.0  # what is kept of a request's time to answer in


class Deadline:
    """One end, `at`; never, if nothing else is said. Only `left_s` and `require_time` are for any thread."""

    def __init__(self, at: float = math.inf, kept_s: float = 0.0) -> None:
        self.at = at
        self._kept_s = kept_s
        self._short = asyncio.Event()

    @classmethod
    def within(cls, seconds: float, start: float | None = None) -> Self:
        """The end of so many seconds from `start`, or from now."""
        return cls((time.perf_counter() if start is None else start) + seconds, _kept(seconds))

    def no_later(self, seconds: float) -> None:
        """Let it end in so many seconds from now, if that is sooner."""
        if seconds < self.left_s:
            self.at, self._kept_s = time.perf_counter() + seconds, _kept(seconds)

    def begin(self, seconds: float) -> None:
        """Let an end that was never be in so many seconds from now."""
        if self.at == math.inf:
            self.at = time.perf_counter() + seconds

    @property
    def left_s(self) -> float:
        """Seconds until then; none is 0."""
        return max(0.0, self.at - time.perf_counter())

    def require_time(self) -> None:
        """Raise DeadlineExceeded if there is no time left."""
        if not self.left_s:
            raise DeadlineExceeded(LATE)

    def hurry(self, short: bool = True) -> None:
        """From now on there is only time to answer with what is there; or, if not `short`, what `at` says."""
        if short:
            self._short.set()
        else:
            self._short.clear()

    async def short(self) -> None:
        """Return once there is only time to answer with what is there."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_timeout(self.left_s - self._kept_s)):
                await self._short.wait()

    async def hold(self, work: Awaitable[T], late: str = LATE) -> T:
        """What `work` gives; if that is not there in time `work` is cancelled, and DeadlineExceeded says `late`."""
        task = asyncio.ensure_future(work)
        try:
            await asyncio.wait({task}, timeout=_timeout(self.left_s))
            if not task.done():
                raise DeadlineExceeded(late)
            return task.result()
        finally:
            task.cancel()


def before(seconds: float) -> float:
    """When to answer a client that hangs up after so many seconds, so that it hears why; within half of a moment."""
    return max(seconds / 2, seconds - max(seconds * EARLIER, LEAST_S))


def _kept(seconds: float) -> float:
    return min(seconds * SHARE, MOST_S)


def _timeout(seconds: float) -> float | None:
    return None if seconds == math.inf else seconds
