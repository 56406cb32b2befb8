"""Places in line for requests whose bodies are still being read.

A full queue refuses by a request's head, before its body is read, and again when its pictures would join. In between,
images are sent and decoded, while those who send a few words join: so nobody with images would ever get in. Who was let
in by its head keeps a place until then. A place is not kept for long, and of all not more than half, none of a single
one: bodies that never come keep nobody out.
"""

import time
from collections.abc import Callable
from contextvars import ContextVar
from functools import partial

KEPT_S = 10.0
_mine: ContextVar[object] = ContextVar("place", default=None)  # of the request that is answered here


class Places:
    """Of a queue of `queue` requests. Safe from any thread."""

    def __init__(self, queue: int) -> None:
        self._most = queue // 2
        self._until: dict[object, float] = {}  # in `time.monotonic`'s seconds

    def take(self) -> Callable[[], object]:
        """Keep one for the request of this context; call what is returned when that has ended, joined or not."""
        place = object()
        _mine.set(place)
        if self.others < self._most:
            self._until[place] = time.monotonic() + KEPT_S
        return partial(self._until.pop, place, None)

    def leave(self) -> None:
        """The request of this context has joined."""
        self._until.pop(_mine.get(), None)

    @property
    def others(self) -> int:
        """How many are kept, but for the one of this context."""
        now, mine = time.monotonic(), _mine.get()
        return sum(until > now and place is not mine for place, until in self._until.copy().items())
