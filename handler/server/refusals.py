"""The pace at which refusals leave: whoever asks again at once gets no more of a processor than this.

A refusal costs little, but a client that is refused and asks again at once makes as many as there is time for, and
drawing needs Python's lock too, a thousand times for each picture. One that waits costs nothing.
"""

import asyncio
import math

RATE = 250  # a second
AT_ONCE_S = 0.1  # as many as leave in this time leave at once, after a while without any
LATEST_S = 1.5  # no refusal waits for longer, so that a server that leaves has sent them


class Refusals:
    """Of one event loop."""

    def __init__(self) -> None:
        self._next = -math.inf  # when one more may leave, in the loop's seconds

    async def turn(self) -> None:
        """Wait until one more may leave."""
        now = asyncio.get_running_loop().time()
        self._next = min(max(self._next, now - AT_ONCE_S) + 1 / RATE, now + LATEST_S)
        if self._next > now:
            await asyncio.sleep(self._next - now)
