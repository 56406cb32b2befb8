"""A watchdog: a thread that notices when another one is stuck."""

import threading
import time
from collections.abc import Callable

LOOK_S = 1.0  # between two looks
PAUSED_S = 0.5  # by which a look may come late; by more, and this process was not running


class Watchdog:
    """Calls `alarm` once, on a thread of its own, if a `beat` is followed by neither another nor `rest` in time.

    Time in which nothing of this process ran does not count: it was stopped or frozen, and hangs no more than before.
    """

    def __init__(self, alarm: Callable[[], None]) -> None:
        self._alarm = alarm
        self._due: float | None = None
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def start(self) -> None:
        """Begin to watch; until the first `beat` there is nothing to see."""
        self._thread.start()

    def beat(self, seconds: float) -> None:
        """The watched thread goes on, and will do so again within `seconds`."""
        self._expect(time.monotonic() + seconds)

    def rest(self) -> None:
        """The watched thread has nothing to do."""
        self._expect(None)

    def close(self) -> None:
        """Watch no longer."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def _expect(self, due: float | None) -> None:
        with self._changed:
            idle, self._due = self._due is None, due
            if idle:  # else the thread wakes at the old time, and sees the new one
                self._changed.notify()

    def _run(self) -> None:
        with self._changed:
            while not self._closed:
                now = time.monotonic()
                look = None if self._due is None else min(self._due - now, LOOK_S)
                if look is not None and look <= 0:
                    break
                self._changed.wait(look)
                if look and self._due and (late := time.monotonic() - now - look) > PAUSED_S:
                    self._due += late
            else:
                return
        self._alarm()
