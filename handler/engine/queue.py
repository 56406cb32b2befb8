"""The queue before the engine: pictures that wait for their turn, oldest first, and who may still join them.

A job ends exactly once, whoever ends it: the engine that drew it, its deadline, whoever asked and went away, or a
worker that gives up. What has ended waits no longer, and is not drawn any further than its next step.
"""

import asyncio
import contextlib
import math
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from handler.core.deadline import LATE
from handler.core.errors import RETRY_S, Cancelled, DeadlineExceeded, KindlingError, QueueFull
from handler.core.recipe import Drawn, OnStep, Recipe
from handler.engine.batching import alike
from handler.engine.pace import Pace
from handler.engine.places import Places

JobOutcome = Drawn | KindlingError
Where = Literal["queue", "denoise"]
OnBegin = Callable[[], object]


def nobody() -> None:
    """Who has nothing to be told."""


@dataclass(slots=True, eq=False)
class Job:
    """One picture, and whom to `answer`. `work` is in pictures of the model's own size and steps.

    `deadline` is in `time.perf_counter`'s seconds, `request` the same object in all pictures of one. The outcome is not
    kept: the memory of objects that know each other is freed late, and a picture is much of it. `alone`: it failed
    among others, maybe by their fault; `lost`: its worker was lost while it drew this. `on_begin` is called, on the
    engine's thread, when that begins.
    """

    recipe: Recipe
    on_step: OnStep
    work: float
    deadline: float
    answer: Callable[[JobOutcome], object]
    request: object = field(default_factory=object)
    on_begin: OnBegin = nobody
    queue: "Queue | None" = None
    begun: bool = False
    alone: bool = False
    lost: bool = False
    entered: float = field(default_factory=time.perf_counter)
    _ended: threading.Lock = field(default_factory=threading.Lock)  # taken once

    def end(self, outcome: JobOutcome) -> None:
        """Answer, unless the job has ended before."""
        if self._ended.acquire(blocking=False):
            if self.queue is not None:
                self.queue.leave(self, outcome)
            self.answer(outcome)

    @property
    def over(self) -> bool:
        """Whether it has ended."""
        return self._ended.locked()

    def raise_if_over(self) -> None:
        """Raise what stops this job, if it should not go on."""
        if self.over:
            raise Cancelled("The request was cancelled.")
        if time.perf_counter() >= self.deadline:
            raise DeadlineExceeded(LATE)


def crowded(waiting: int) -> str:
    """That so many requests wait that no other may."""
    return f"{waiting} request{' is' if waiting == 1 else 's are'} waiting already; try again later."


def why_full(waiting: int, wait_s: float, left_s: float, most: int, most_s: float) -> str:
    """Why a request may not join `waiting` others that will take `wait_s`; empty if it may. It has `left_s` itself."""
    if waiting >= most:
        return crowded(waiting)
    if wait_s > most_s:
        return f"What waits already takes about {wait_s:.0f} s, more than the {most_s:g} s allowed; try again later."
    if wait_s > left_s:
        return f"What waits already takes about {wait_s:.0f} s, more than this request may take; try again later."
    return ""


class Queue:
    """Jobs that wait: of at most `most` requests, and at most `most_s` seconds of work. Safe from any thread.

    `ended` counts the jobs that have: by outcome ("drawn", "cancelled" or the error's code), and where they were then,
    "queue" or "denoise".
    """

    def __init__(self, most: int, most_s: float) -> None:
        self._most, self._most_s, self.places = most, most_s, Places(most)
        self._jobs: deque[Job] = deque()
        self._changed = threading.Condition()
        self._closed, self._takers = False, 0  # how many wait to take
        self.ended: Counter[tuple[str, Where]] = Counter()

    def __len__(self) -> int:
        return len(self._jobs)

    @property
    def requests(self) -> int:
        """How many have pictures that wait; one whose pictures wait in turn, and not all at once, is one still."""
        with self._changed:
            return len({job.request for job in self._jobs})

    def wait_s(self, pace: Pace) -> float | None:
        """How many seconds all that wait will take; None if that is not known."""
        with self._changed:
            return pace.seconds([job.work for job in self._jobs])

    def require_room(self, pace: Pace, left_s: float = math.inf) -> None:
        """Raise QueueFull if nobody who has `left_s` seconds may join now, DeadlineExceeded if those are over."""
        if left_s <= 0:
            raise DeadlineExceeded(LATE)
        wait_s = self.wait_s(pace)
        if why := why_full(self.requests + self.places.others, wait_s or 0.0, left_s, self._most, self._most_s):
            raise QueueFull(why, retry_s=RETRY_S if wait_s is None else wait_s)

    def join(self, jobs: Sequence[Job], pace: Pace, admitted: bool) -> bool:
        """Let one request's jobs wait; False if this queue is closed.

        Raises as `require_room`, unless the request is `admitted`.
        """
        with self._changed:
            if self._closed:
                return False
            if not admitted:
                self.require_room(pace, jobs[0].deadline - time.perf_counter())
            for job in jobs:
                job.queue = self
                self._jobs.append(job)
            self.places.leave()
            self._changed.notify_all()
        return True

    def take(self, room: Callable[[Recipe], int], over: Callable[[], bool] = lambda: False) -> list[Job]:
        """The job whose turn it is, once there is one, and those to draw with it; none when this queue is closed.

        `room` says how many such may be drawn at once; others who wait to take get as many each. Who asks wants none if
        it is `over`, as `wake` lets it see.
        """
        with self._changed:
            self._takers += 1
            self._changed.wait_for(lambda: self._jobs or self._closed or over())
            takers, self._takers = self._takers, self._takers - 1
            if not self._jobs or over():
                return []
            first, *others = self._jobs
            fitting = [job for job in others if not job.alone and alike(first.recipe, job.recipe)]
            most = 1 if first.alone else min(room(first.recipe), math.ceil((1 + len(fitting)) / takers))
            taken = [first, *fitting[: most - 1]]
            self._jobs = deque(job for job in self._jobs if job not in taken)
            return taken

    def wake(self) -> None:
        """Let all who wait to `take` see whether they are over."""
        with self._changed:
            self._changed.notify_all()

    def put_back(self, jobs: Sequence[Job]) -> list[Job]:
        """Let jobs that were taken wait again, before all others; those that this queue is closed to."""
        with self._changed:
            if self._closed:
                return list(jobs)
            for job in reversed(jobs):
                job.begun = False
                if not job.over and job not in self._jobs:
                    self._jobs.appendleft(job)
            self._changed.notify_all()
        return []

    def close(self) -> list[Job]:
        """Let nobody join any more; who waited, for somebody to answer them."""
        with self._changed:
            self._closed = True
            left, self._jobs = list(self._jobs), deque()
            self._changed.notify_all()
        return left

    def leave(self, job: Job, outcome: JobOutcome) -> None:
        """Count `job`, which has ended, and let it wait no longer."""
        with self._changed:
            name = outcome.code if isinstance(outcome, KindlingError) else "drawn"
            self.ended[name, "denoise" if job.begun else "queue"] += 1
            with contextlib.suppress(ValueError):
                self._jobs.remove(job)

    def give_up(self, request: object) -> None:
        """End those of `request` that wait: another picture of it failed, so nobody will get them."""
        with self._changed:
            vain = [job for job in self._jobs if job.request is request]
        for job in vain:
            job.end(Cancelled("Another picture of this request failed."))


def hand(answer: asyncio.Future[Drawn], outcome: JobOutcome) -> None:
    """Give a job's outcome, on whatever thread it ended, to the loop on which somebody waits for it."""
    with contextlib.suppress(RuntimeError):  # that loop is closed
        answer.get_loop().call_soon_threadsafe(_settle, answer, outcome)


def _settle(answer: asyncio.Future[Drawn], outcome: JobOutcome) -> None:
    if answer.done():
        return
    if isinstance(outcome, KindlingError):
        answer.set_exception(outcome.anew())  # several may be told the same
    else:
        answer.set_result(outcome)
