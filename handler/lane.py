"""The lane: the one thread that owns the model. It boots the worker, then draws one picture after another.

Requests wait in a bounded queue. A request that is cancelled while waiting is dropped, one that is being drawn
stops at the next step. Callers on an event loop use `submit`; cancelling the awaiting task cancels the job.
"""

import asyncio
import contextlib
import logging
import queue
import statistics
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

from handler.catalog import find
from handler.clock import Clock, Ledger
from handler.errors import (
    RETRY_S,
    Cancelled,
    Internal,
    KindlingError,
    ModelNotFound,
    NotReady,
    QueueFull,
    SettingsError,
    StartError,
)
from handler.preview import Preview
from handler.request import Pixels, Recipe
from handler.settings import Settings
from handler.spend import Meter
from handler.worker import OnStep, Worker

State = Literal["starting", "ready", "failed", "stopped"]
PACE = 16  # how many of the last pictures tell how long the next will take
PUBLISH_S = 20.0  # a platform kills what has not left about 30 s after it was told to
Drawn = tuple[Pixels, dict[str, float]]
log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Job:
    recipe: Recipe
    on_step: OnStep
    done: "Future[Drawn]" = field(default_factory=Future)
    cancelled: threading.Event = field(default_factory=threading.Event)
    entered: float = field(default_factory=time.perf_counter)

    def check(self) -> None:
        """Raise Cancelled once nobody waits for this job."""
        if self.cancelled.is_set():
            raise Cancelled("The request was cancelled.")


class Lane:
    """Owns the worker's thread and queue. `start`, then `submit` from any event loop, then `stop`."""

    def __init__(
        self, settings: Settings, clock: Clock | None = None, boot: Callable[..., Worker] = Worker.boot
    ) -> None:
        self.settings = settings
        try:
            self.spec = find(settings.model)
        except ModelNotFound as error:
            raise SettingsError(error.message, "KINDLING_MODEL") from None
        self.clock = clock or Clock(settings.cold_start_budget_s)
        self.meter = Meter(settings, lambda: self.ledger.device)
        self.state: State = "starting"
        self.error: StartError | None = None
        self.worker: Worker | None = None
        self.drawing = False
        self._boot = boot
        self._took: tuple[float, ...] = ()  # seconds of the last pictures
        self._jobs: queue.Queue[_Job | None] = queue.Queue(settings.queue)
        self._booted = threading.Event()
        self._publisher: threading.Thread | None = None
        self._thread = threading.Thread(target=self._run, name="lane", daemon=True)

    @property
    def ledger(self) -> Ledger:
        """Where the cold start's seconds went, so far or finally."""
        return self.clock.ledger

    def start(self) -> None:
        """Begin booting; returns at once."""
        self._thread.start()
        self.meter.start()

    @property
    def booted(self) -> bool:
        """Whether booting has ended, well or badly."""
        return self._booted.is_set()

    def wait_booted(self) -> None:
        """Block until booting has ended; raises its StartError if it failed."""
        self._booted.wait()
        if self.error:
            raise self.error

    def stop(self) -> None:
        """Refuse new jobs, let the thread end after the picture it is drawing, answer the rest, and end publishing."""
        if self.state == "starting":
            self.clock.finish("stopped", f"told to stop in phase '{self.ledger.phase}'")
        if self.state in ("starting", "ready"):
            self.state = "stopped"
        self._drop_waiting()
        self._jobs.put(None)
        if self.booted:
            self._thread.join()
        if self._publisher:
            self._publisher.join(PUBLISH_S)
        self.meter.stop()

    async def submit(self, recipe: Recipe, on_step: OnStep = lambda *_: None) -> Drawn:
        """Draw one picture. Stage "queue" is the wait. Raises QueueFull, NotReady or what the worker raised."""
        if self.state in ("failed", "stopped"):
            raise self._closed()
        job = _Job(recipe, on_step)
        try:
            self._jobs.put_nowait(job)
        except queue.Full:
            full = f"{self.settings.queue} requests are waiting already; try again later."
            raise QueueFull(full, retry_s=self.wait_s) from None
        if self.state in ("failed", "stopped"):  # since we looked: nobody else would answer this job
            self._drop_waiting()
        try:
            return await asyncio.wrap_future(job.done)
        except asyncio.CancelledError:
            job.cancelled.set()
            raise

    @property
    def waiting(self) -> int:
        """Jobs in the queue, the one being drawn not counted."""
        return self._jobs.qsize()

    @property
    def wait_s(self) -> float:
        """Seconds until what waits now is drawn, at the pace of the last pictures."""
        return statistics.median(self._took) * self.waiting if self._took else RETRY_S

    def _closed(self) -> KindlingError:
        """Why this worker takes no jobs; another one takes about as long to start as this one did."""
        stopping = NotReady("This worker is stopping; try again.", retry_s=self.ledger.total_s or RETRY_S)
        return self.error or stopping

    def _run(self) -> None:
        try:
            self.worker = self._boot(self.settings, self.clock)
        except StartError as error:
            self.error, self.state = error, "failed"
            self._booted.set()
            self._drop_waiting()
            return
        if self.state == "starting":
            self.state = "ready"
        self._booted.set()
        if self.settings.publish and self.worker.unpublished:
            self._publisher = threading.Thread(target=self._publish, args=(self.worker,), name="publish", daemon=True)
            self._publisher.start()
        while job := self._jobs.get():
            self._draw(self.worker, job)

    def _publish(self, worker: Worker) -> None:
        """Leave what was compiled for later workers, off the request path; they can do without."""
        try:
            log.info("published compile artifacts in %s", worker.publish(self.settings.volume))
        except StartError as error:
            log.warning("compile artifacts are not published: %s", error.message)

    def _draw(self, worker: Worker, job: _Job) -> None:
        def step(done: int, preview: Preview) -> None:
            job.check()
            job.on_step(done, preview)

        begun, self.drawing = time.perf_counter(), True
        try:
            job.check()
            pixels, stages = worker.generate(job.recipe, step)
            self._took = (*self._took, time.perf_counter() - begun)[-PACE:]
            _settle(job, partial(job.done.set_result, (pixels, {"queue": begun - job.entered, **stages})))
        except KindlingError as error:
            if error.fatal:
                self.error, self.state = StartError(error.message), "failed"
            _settle(job, partial(job.done.set_exception, error))
            if error.fatal:
                self._drop_waiting()
        except Exception:
            log.exception("the worker failed on a request")
            _settle(job, partial(job.done.set_exception, Internal("The worker failed on this request; see its log.")))
        finally:
            self.drawing = False

    def _drop_waiting(self) -> None:
        told_to_end = False
        with contextlib.suppress(queue.Empty):
            while True:
                if job := self._jobs.get_nowait():
                    _settle(job, partial(job.done.set_exception, self._closed()))
                else:
                    told_to_end = True
        if told_to_end:  # the lane's thread waits for this word
            self._jobs.put(None)


def _settle(job: _Job, act: Callable[[], None]) -> None:
    """Answer a job unless its caller has gone."""
    try:
        if not job.done.cancelled():
            act()
    except InvalidStateError:
        pass
