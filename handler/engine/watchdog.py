"""A watchdog: a thread that notices when another one is stuck."""

import threading
import time
from collections.abc import Callable


class Watchdog:
    """Calls `alarm` once, on a thread of its own, if a `beat` is followed by neither another nor `rest` in time."""

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
                left = None if self._due is None else self._due - time.monotonic()
                if left is not None and left <= 0:
                    break
                self._changed.wait(left)
            else:
                return
        self._alarm()
