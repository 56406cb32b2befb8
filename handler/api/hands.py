"""A few threads that nobody waits for at the interpreter's end, as it does for those of a `ThreadPoolExecutor`."""

import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from contextvars import copy_context
from functools import partial
from typing import Any, TypeVar

T = TypeVar("T")
Task = tuple[Future[Any], Callable[[], Any]]


class Hands:
    """Runs functions in at most `most` threads, each of which ends when nothing waits for its turn.

    A function that was forsaken cannot be ended from outside. Until it ends it leaves its place to another, but no
    more than `spare` at once do. `nice` is how much all others go before them where there are few cores, on Linux: as
    nice(1) has it, but of these threads alone.
    """

    def __init__(self, most: int, spare: int, name: str, nice: int = 0) -> None:
        self._most, self._spare, self._name, self._nice = most, spare, name, nice
        self._lock = threading.Lock()  # of what follows
        self._waiting: dict[Future[Any], Callable[[], Any]] = {}
        self._running: set[Future[Any]] = set()
        self._forsaken: set[Future[Any]] = set()  # of those that run

    def run(self, act: Callable[[], T]) -> "Future[T]":
        """What `act` will give, in the context of who calls; what is cancelled before its turn is not run."""
        future: Future[T] = Future()
        with self._lock:
            self._waiting[future] = partial(copy_context().run, act)
            self._start()
        return future

    def forsake(self, future: Future[Any]) -> None:
        """Nobody waits for `future` any more."""
        future.cancel()
        with self._lock:
            self._waiting.pop(future, None)  # a picture is in there
            if future in self._running:
                self._forsaken.add(future)
            self._start()

    def _start(self) -> None:
        if task := self._taken():
            try:
                threading.Thread(target=self._work, args=(task,), name=self._name, daemon=True).start()
            except RuntimeError:  # there are no more threads, but a place
                self._running.remove(task[0])
                raise

    def _taken(self) -> Task | None:
        """Who has waited longest, if there is a place; it runs from now on."""
        if not self._waiting or len(self._running) >= self._most + min(len(self._forsaken), self._spare):
            return None
        future = next(iter(self._waiting))
        self._running.add(future)
        return future, self._waiting.pop(future)

    def _work(self, task: Task | None) -> None:
        _give_way(self._nice)
        while task:
            _done(*task)
            with self._lock:
                self._running.remove(task[0])
                self._forsaken.discard(task[0])
                task = self._taken()


def _give_way(more: int) -> None:
    """Let all others go before this thread."""
    if more and sys.platform == "linux":  # elsewhere it would be the whole process
        this = threading.get_native_id()
        with suppress(OSError):  # a sandbox may know of no such thing
            os.setpriority(os.PRIO_PROCESS, this, os.getpriority(os.PRIO_PROCESS, this) + more)


def _done(future: Future[Any], act: Callable[[], Any]) -> None:
    if future.set_running_or_notify_cancel():
        try:
            future.set_result(act())
        except BaseException as error:
            future.set_exception(error)
