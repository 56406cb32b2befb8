"""What callers have of an engine: whether it takes their pictures, these pictures, and what they are told meanwhile."""

import asyncio
import math
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import partial
from typing import Literal, get_args

from handler.core.deadline import LATE
from handler.core.errors import RETRY_S, Cancelled, DeadlineExceeded, KindlingError, NotReady, StartError
from handler.core.recipe import Drawn, OnStep, Recipe
from handler.core.settings import Settings
from handler.engine.pace import Pace
from handler.engine.queue import Job, OnBegin, Queue, hand, nobody
from handler.worker.clock import Ledger

EngineState = Literal["starting", "ready", "draining", "stopped", "failed"]  # an engine only ever goes to a later one
OPEN: tuple[EngineState, ...] = ("starting", "ready")
STOPPING = "This worker is stopping; try again."


class Intake(ABC):
    """Takes pictures into the queue, from any event loop."""

    def __init__(self, settings: Settings) -> None:
        self.state: EngineState = "starting"
        self.error: StartError | None = None
        self._lock, self.queue = threading.Lock(), Queue(settings.queue, settings.queue_s)

    @property
    @abstractmethod
    def ledger(self) -> Ledger:
        """Where the cold start's seconds went, so far or finally."""

    @property
    @abstractmethod
    def pace(self) -> Pace:
        """How long what waits will take."""

    @property
    @abstractmethod
    def _jobs(self) -> Sequence[Job]:
        """Those that are being drawn."""

    @abstractmethod
    def _work_of(self, recipe: Recipe) -> float:
        """What drawing `recipe` takes, in pictures of the model's own size and steps."""

    def require_open(self, left_s: float = math.inf) -> None:
        """Raise what a request that came now would be refused with, whatever it asked for; it has `left_s` seconds."""
        if self.state not in OPEN:
            raise self._closed()
        self.queue.require_room(self.pace, left_s)

    async def submit(
        self, recipe: Recipe, on_step: OnStep = lambda *_: None, deadline: float = math.inf, admitted: bool = False
    ) -> Drawn:
        """Draw one picture, as `submit_all` does."""
        return (await self.submit_all([(recipe, on_step)], deadline, admitted))[0]

    async def submit_all(
        self, wanted: Sequence[tuple[Recipe, OnStep]], deadline: float, admitted: bool, on_begin: OnBegin = nobody
    ) -> list[Drawn]:
        """Draw pictures that wait together, by `deadline`, in `time.perf_counter`'s seconds. Stage "queue" is the wait.

        Pictures of an `admitted` request, which has some already, are neither too many nor too late for a drain.
        Raises QueueFull, NotReady, DeadlineExceeded or what the worker raised; then the others are given up.
        """
        loop, work, request = asyncio.get_running_loop(), self._work_of, object()
        answers: list[asyncio.Future[Drawn]] = [loop.create_future() for _ in wanted]
        jobs = [
            Job(recipe, on_step, work(recipe), deadline, partial(hand, answer), request, on_begin)
            for (recipe, on_step), answer in zip(wanted, answers, strict=True)
        ]
        open_to = (*OPEN, "draining") if admitted else OPEN
        if self.state not in open_to or not self.queue.join(jobs, self.pace, admitted):
            raise self._closed()
        left_s = None if deadline == math.inf else deadline - time.perf_counter()
        try:
            done, late = await asyncio.wait(answers, timeout=left_s, return_when=asyncio.FIRST_EXCEPTION)
            if late and not any(answer.exception() for answer in done):
                for job in jobs:
                    job.end(self.late())
            return await asyncio.gather(*sorted(answers, key=_given_up))
        finally:
            for job, answer in zip(jobs, answers, strict=True):
                answer.cancel()
                job.end(Cancelled("The request was cancelled."))

    @property
    def busy(self) -> bool:
        """Whether anything is being drawn or waits for it."""
        return self.drawing + self.waiting > 0

    @property
    def drawing(self) -> int:
        """How many requests are being drawn for somebody: none that has its answer, though its last step may go on."""
        return len({job.request for job in self._jobs if not job.over})

    @property
    def waiting(self) -> int:
        """How many requests have pictures in the queue."""
        return self.queue.requests

    def _closed(self) -> KindlingError:
        """Why this worker takes no jobs; another one takes about as long to start as this one did."""
        retry_s = self.ledger.total_s or RETRY_S
        return self.error.anew() if self.error else NotReady(STOPPING, retry_s=retry_s)

    def late(self) -> KindlingError:
        """What is told to whom whose time is up before there is a picture."""
        starting = self.state == "starting"
        return NotReady("This worker is still starting; try again.") if starting else DeadlineExceeded(LATE)

    def _become(self, state: EngineState) -> None:
        with self._lock:
            self.state = max(self.state, state, key=get_args(EngineState).index)

    def _refuse_all(self) -> None:
        for job in self.queue.close():
            job.end(self._closed())


def _given_up(answer: asyncio.Future[Drawn]) -> bool:
    """Whether it ended because another picture of its request failed, which is what its caller should hear of."""
    return answer.done() and isinstance(answer.exception(), Cancelled)
