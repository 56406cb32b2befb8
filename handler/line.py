"""The line before the lane: pictures that wait for their turn, oldest first, and who may still join them.

A job ends exactly once, whoever ends it: the lane that drew it, its deadline, whoever asked and went away, or a worker
that gives up. What has ended waits no longer, and is not drawn any further than its next step.
"""

import contextlib
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Literal

from handler.batching import alike
from handler.errors import RETRY_S, Cancelled, DeadlineExceeded, KindlingError, QueueFull
from handler.preview import OnStep
from handler.request import Drawn, Recipe

Where = Literal["queue", "denoise"]
LATE = "The picture was not ready in the time that this request may take. Ask for less, or allow more."


@dataclass(slots=True, eq=False)
class Job:
    """One picture that somebody waits for. `work` is in pictures of the model's own size and steps.

    `deadline` is in `time.perf_counter`'s seconds.
    """

    recipe: Recipe
    on_step: OnStep
    work: float
    deadline: float
    begun: bool = False
    entered: float = field(default_factory=time.perf_counter)
    done: "Future[Drawn]" = field(default_factory=Future)

    def end(self, outcome: Drawn | Exception) -> None:
        """Answer, unless the job has ended before."""
        with contextlib.suppress(InvalidStateError):
            if isinstance(outcome, Exception):
                self.done.set_exception(outcome)
            else:
                self.done.set_result(outcome)

    def check(self) -> None:
        """Raise what stops this job, if it should not go on."""
        if self.done.done():
            raise Cancelled("The request was cancelled.")
        if time.perf_counter() >= self.deadline:
            raise DeadlineExceeded(LATE)


def refusal(waiting: int, wait_s: float, left_s: float, most: int, most_s: float) -> str:
    """Why a job may not join `waiting` others that will take `wait_s`; empty if it may. It has `left_s` itself."""
    if waiting >= most:
        return f"{waiting} requests are waiting already; try again later."
    if wait_s > most_s:
        return f"What waits already takes about {wait_s:.0f} s, more than the {most_s:g} s allowed; try again later."
    if wait_s > left_s:
        return f"What waits already takes about {wait_s:.0f} s, more than this request may take; try again later."
    return ""


class Line:
    """Jobs that wait: at most `most` of them, and at most `most_s` seconds of work. Safe from any thread.

    `ended` counts the jobs that have: by outcome ("drawn", "cancelled" or the error's code), and where they were then,
    "queue" or "denoise".
    """

    def __init__(self, most: int, most_s: float) -> None:
        self._most, self._most_s = most, most_s
        self._jobs: deque[Job] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self.ended: Counter[tuple[str, Where]] = Counter()

    def __len__(self) -> int:
        return len(self._jobs)

    @property
    def work(self) -> float:
        """Of all that wait, in pictures of the model's own size and steps."""
        with self._changed:
            return sum(job.work for job in self._jobs)

    def join(self, jobs: Sequence[Job], pace: float | None, admitted: bool) -> bool:
        """Let one request's jobs wait; False if this line is closed. Raises QueueFull, but if it is `admitted` already.

        `pace` is how many seconds a unit of work takes, if that is known.
        """
        with self._changed:
            wait_s, left_s = self.work * (pace or 0), jobs[0].deadline - time.perf_counter()
            if self._closed:
                return False
            if not admitted and (why := refusal(len(self), wait_s, left_s, self._most, self._most_s)):
                raise QueueFull(why, retry_s=wait_s if pace else RETRY_S)
            self._jobs += jobs
            self._changed.notify()
        for job in jobs:
            job.done.add_done_callback(partial(self._leave, job))
        return True

    def take(self, room: Callable[[Recipe], int]) -> list[Job]:
        """The job whose turn it is, once there is one, and those to draw with it; none when this line is closed.

        `room` says how many such may be drawn at once.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._jobs or self._closed)
            if not self._jobs:
                return []
            first = self._jobs[0].recipe
            others = (job for job in list(self._jobs)[1:] if alike(first, job.recipe))
            taken = [self._jobs[0], *islice(others, room(first) - 1)]
            self._jobs = deque(job for job in self._jobs if job not in taken)
            return taken

    def close(self) -> list[Job]:
        """Let nobody join any more; who waited, for somebody to answer them."""
        with self._changed:
            self._closed = True
            left, self._jobs = list(self._jobs), deque()
            self._changed.notify_all()
        return left

    def _leave(self, job: Job, done: "Future[Drawn]") -> None:
        with self._changed:
            self.ended[_outcome(done), "denoise" if job.begun else "queue"] += 1
            with contextlib.suppress(ValueError):
                self._jobs.remove(job)


def _outcome(done: "Future[Drawn]") -> str:
    if done.cancelled():
        return Cancelled.code
    error = done.exception()
    return error.code if isinstance(error, KindlingError) else "drawn"
