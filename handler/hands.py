"""A few threads that nobody waits for at the interpreter's end, as it does for those of a `ThreadPoolExecutor`."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, TypeVar

T = TypeVar("T")


class Hands:
    """Runs functions in at most `most` threads, which are started as they are needed and stay."""

    def __init__(self, most: int, name: str) -> None:
        self._most, self._name = most, name
        self._tasks: SimpleQueue[tuple[Future[Any], Callable[[], Any]]] = SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._free = threading.Semaphore(0)

    def run(self, act: Callable[[], T]) -> "Future[T]":
        """What `act` will give; what is cancelled before its turn is not run."""
        future: Future[T] = Future()
        self._tasks.put((future, act))
        if not self._free.acquire(blocking=False) and len(self._threads) < self._most:
            self._threads.append(threading.Thread(target=self._work, name=self._name, daemon=True))
            self._threads[-1].start()
        return future

    def _work(self) -> None:
        while True:
            future, act = self._tasks.get()
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(act())
                except BaseException as error:
                    future.set_exception(error)
            del future, act  # a picture is in there
            self._free.release()
