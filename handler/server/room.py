"""Room for the bodies of all requests together, so that no number of them takes the memory that drawing needs."""

from handler.core.errors import QueueFull
from handler.core.settings import Settings
from handler.server.record import Seen

HELD, LARGEST = 256_000_000, 4  # bytes of all together; more where so many of the largest bodies come to more
SMALL = 64 << 10  # bytes of each that are not counted, so that what is small is never in want of room


class Room:
    """What bodies hold, in bytes, each until its request has been answered. For one event loop."""

    def __init__(self, settings: Settings) -> None:
        self._most = max(HELD, LARGEST * int(max(settings.max_body_mb, settings.max_edit_mb) * 1e6))
        self._held: dict[Seen, int] = {}
        self._all = 0

    def take(self, seen: Seen, size: int) -> None:
        """The body of this request has `size` bytes by now; QueueFull if there is no room for them."""
        more = max(0, size - SMALL)
        others = self._all - self._held.get(seen, 0)
        if more and others + more > self._most:
            raise QueueFull("This worker holds as many bytes of requests as it can; try again later.")
        self._held[seen], self._all = more, others + more

    def hand(self, seen: Seen, last: Seen) -> None:
        """What this request brought is held by `last`, its job, from now on."""
        self._held[last] = self._held.pop(seen, 0)

    def leave(self, seen: Seen) -> None:
        """This request has been answered."""
        self._all -= self._held.pop(seen, 0)
