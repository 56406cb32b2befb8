"""Threads as tests see them: which there are, what one of them is doing, and seconds that are moved by hand."""

import gc
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType, FunctionType

LIMIT_S = 60.0


@dataclass
class Seconds:
    """In place of a clock; only a test moves it."""

    now: float = 1000.0

    def __call__(self) -> float:
        return self.now

    def pass_s(self, seconds: float) -> None:
        self.now += seconds


def until(true: Callable[[], object]) -> None:
    """Look again and again until it is so."""
    end = time.monotonic() + LIMIT_S
    while not true():
        assert time.monotonic() < end, "it never came to that"
        threading.Event().wait(0.001)


def frames() -> dict[int, FrameType]:
    """What each thread runs, by its id.

    Python holds a lock of its own meanwhile. Were garbage collected then, whose end lets other threads run, one that
    begins or ends would wait for that lock with the GIL, for ever (python/cpython#106883).
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        return sys._current_frames()
    finally:
        if collects:
            gc.enable()


def inside(thread: threading.Thread, function: Callable[..., object]) -> None:
    """Wait until `thread` runs this function of Python; fails if the thread ends without."""
    assert isinstance(function, FunctionType)

    def runs() -> bool:
        assert thread.is_alive(), f"{thread.name} has ended, and did not wait in {function.__qualname__}"
        frame = frames().get(thread.ident or 0)
        while frame and frame.f_code is not function.__code__:
            frame = frame.f_back
        return frame is not None

    until(runs)


@contextmanager
def begun() -> Iterator[dict[str, threading.Thread]]:
    """The threads that begin in here, by name; afterwards they are in the dictionary. An outlet's is the process's."""
    before, found = set(threading.enumerate()), dict[str, threading.Thread]()
    yield found
    new = [thread for thread in threading.enumerate() if thread not in before and thread.name != "outlet"]
    found.update({thread.name: thread for thread in new})


def have_ended(*threads: threading.Thread) -> bool:
    """Whether they do, given a moment."""
    for thread in threads:
        thread.join(LIMIT_S)
    return not any(thread.is_alive() for thread in threads)
