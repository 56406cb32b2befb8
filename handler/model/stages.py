"""Where the time of a picture goes, by the clock of what computes it.

A GPU is told what to do long before it does it, so it leaves marks itself: CUDA events. A CPU does it at once.
"""

import itertools
import time
from collections.abc import Callable
from typing import Any, Protocol


class Mark(Protocol):
    """That a device has done all it was told before."""

    def synchronize(self) -> None:
        """Wait until it has."""

    def elapsed_time(self, later: Any) -> float:
        """Milliseconds of the device from this mark to a later one; both must have come to pass."""


class Now:
    """A mark of a device that does at once what it is told."""

    def __init__(self) -> None:
        self._at = time.perf_counter()

    def synchronize(self) -> None:
        """It has come to pass."""

    def elapsed_time(self, later: "Now") -> float:
        """Milliseconds."""
        return 1000 * (later._at - self._at)


def event() -> Any:
    """A mark of a GPU. While its thread waits for it, that sleeps, and lets go of the GIL."""
    import torch

    made = torch.cuda.Event(enable_timing=True, blocking=True)
    made.record()
    return made


MARKS: dict[str, Callable[[], Mark]] = {"cpu": Now, "cuda": event}


class Stages:
    """The stages of a drawing, which begins with `first`: encode, denoise, decode. `mark` makes a mark."""

    def __init__(self, mark: Callable[[], Mark], first: str = "encode") -> None:
        self._mark, self._marks = mark, {first: mark()}

    def begin(self, name: str) -> None:
        """Stage `name` begins with what the device is told from now on; the one before ends."""
        self._marks[name] = self._mark()

    def step(self) -> None:
        """A step was told to the device; returns when it has done the one before, so the host is at most one ahead."""
        before = self._marks.get("decode")
        self.begin("decode")  # so it does, unless another step follows
        if before:
            before.synchronize()

    def finish(self) -> None:
        """Return when the device has done all it was told."""
        self.begin("end")
        self._marks["end"].synchronize()

    @property
    def seconds(self) -> dict[str, float]:
        """How long each stage took."""
        marks = itertools.pairwise(self._marks.items())
        return {name: start.elapsed_time(later) / 1000 for (name, start), (_, later) in marks}
