"""The engine: the one thread that owns the model. It boots the worker, then draws what waits, alike pictures at once.

Callers on an event loop use `submit`; cancelling the awaiting task ends the job, and what is being drawn stops then at
its next step, as it does when its deadline passes. An engine has failed if its GPU is lost, if it runs out of memory
too often or if a step hangs: whoever waits is told to try again, elsewhere.
"""

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from handler.catalog.models import find
from handler.catalog.prices import require_held
from handler.core.deadline import EXIT_S, Deadline
from handler.core.errors import RETRY_S, Internal, KindlingError, ModelNotFound, SettingsError, StartError
from handler.core.recipe import Recipe
from handler.core.settings import Settings
from handler.core.tracebacks import outline
from handler.engine.executor import Executor
from handler.engine.intake import OPEN, Intake
from handler.engine.pace import Pace
from handler.engine.publisher import Publisher
from handler.engine.queue import Job
from handler.engine.spend import Meter
from handler.worker.clock import Clock, Ledger
from handler.worker.sharing import require_workers
from handler.worker.worker import Worker

if TYPE_CHECKING:  # few have several
    from handler.engine.remote import Remote

TIDY_S = 1.0
LAST_S = 3.0  # of an exit: for the thread to tidy up, and for the last word on spend
log = logging.getLogger(__name__)


class Engine(Intake):
    """Owns the worker's thread and queue. `start`, then `submit` from any event loop, then `stop`.

    `over` is set once no more will be drawn, for whatever reason. `exit` ends `EXIT_S` after the first word to leave.
    """

    def __init__(
        self, settings: Settings, clock: Clock | None = None, boot: "Callable[..., Worker | Remote]" = Worker.boot
    ) -> None:
        super().__init__(settings)
        self._require_workers(settings)
        self.settings = settings
        try:
            self.spec = find(settings.model)
        except ModelNotFound as error:
            raise SettingsError(f"{error.message} KINDLING_MODEL should name one.", "KINDLING_MODEL") from None
        self.clock = clock or Clock(settings.cold_start_budget_s)
        self.meter = Meter(settings, lambda: self.ledger.device, self.clock.birth)
        self.worker: Worker | Remote | None = None
        self._boot, self.batch, self.begun = boot, settings.batch, False  # the last: whether `start` was called
        self._executor = Executor(settings, self.spec, self.ledger, self.fail, self._put_back)
        self.exit = Deadline()
        self._booted, self.over, self._publisher = threading.Event(), threading.Event(), Publisher()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    @property
    def ledger(self) -> Ledger:
        """Where the cold start's seconds went, so far or finally."""
        return self.clock.ledger

    def start(self) -> None:
        """Begin booting; returns at once."""
        self.begun = True
        self._thread.start()
        self._executor.watch.start()
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

    def drain(self) -> None:
        """Refuse new requests, and go on with those that were accepted; nobody waits for a boot any longer."""
        self.exit.begin(EXIT_S)
        self._become("draining")
        if not self.booted:
            self._refuse_all()

    def stop(self) -> None:
        """Refuse new jobs, let the thread end after the picture it is drawing, answer the rest, and end publishing.

        What is not over in time is given up.
        """
        self.exit.begin(EXIT_S)
        if not self.booted:
            self.clock.finish("stopped", f"told to stop in phase '{self.ledger.phase}'")
        self._become("stopped")
        self._refuse_all()
        if self.booted:
            if not self.over.wait(self.exit.left_s - LAST_S):
                self.abort()
            self._thread.join(TIDY_S)
        self._publisher.join(self.exit.left_s - (LAST_S - TIDY_S))
        self._executor.watch.close()
        self.meter.stop()

    def abort(self) -> None:
        """Refuse new jobs and answer all others at once; what is being drawn stops at its next step."""
        self.exit.begin(EXIT_S)
        self._become("stopped")
        self._refuse_all()
        for job in self._jobs:
            job.end(self._closed())
        self.over.set()

    @property
    def alive(self) -> bool:
        """Whether its thread has not ended, be it over or not: what hangs in native code never does."""
        return self._thread.is_alive()

    @property
    def pace(self) -> Pace:
        return self._executor.pace

    @property
    def workers(self) -> "Mapping[str, Engine]":
        """Who draws, by the name that tells it from others; of one alone that is empty."""
        return {"": self}

    @property
    def restarts(self) -> int | None:
        """How often this worker was begun again; None of one alone, which is not."""
        return None

    @property
    def _jobs(self) -> Sequence[Job]:
        return self._executor.jobs

    def _work_of(self, recipe: Recipe) -> float:
        return self._executor.work(recipe)

    def at_once(self, recipe: Recipe) -> int:
        """How many pictures of this shape are drawn at once, if there are as many: as KINDLING_BATCH says."""
        return self._executor.at_once(recipe, self.batch, self.worker.gains) if self.worker else 1

    def fail(self, error: KindlingError, jobs: Sequence[Job] = ()) -> None:
        """Take no more; `jobs` are told `error` itself, and before all others that this worker is no more."""
        if not self.error:
            retry_s = self.ledger.total_s or RETRY_S
            self.error = error if isinstance(error, StartError) else StartError(error.message, retry_s=retry_s)
        self._become("failed")
        for job in jobs:
            job.end(error)
        self._refuse_all()
        self.over.set()

    def _run(self) -> None:
        """The thread. Nobody may wait for one that has ended, whatever ended it: a library may even want to exit."""
        try:
            worker = self._boot(self.settings, self.clock)
            try:
                require_held(self.settings, self.ledger.device)
            except StartError:  # whose frames know the worker for as long as it is kept
                worker.close()
                raise
            self.worker = worker
            self._become("ready")
            worker.watch(partial(self._executor.lost, self.over))
        except StartError as error:
            self.fail(error)
        except BaseException as error:
            log.error("the start failed", exc_info=error)  # in full: nobody's prompt is in work yet
            self.fail(StartError(f"{self.settings.model} could not be loaded: {type(error).__name__}: {error}"))
        self._booted.set()
        if self.worker:
            try:
                self._work(self.worker)
            except BaseException as error:  # a bug of ours
                log.error("the engine failed\n%s", outline(error))
                self.fail(Internal("This worker failed; see its log."))
        self.over.set()

    def _require_workers(self, settings: Settings) -> None:
        """SettingsError where several are asked for: only `serve` begins those."""
        if (count := require_workers(settings)) > 1:
            told = f"{count} workers are what `serve` begins; what runs here has one. Use KINDLING_WORKERS=1."
            raise SettingsError(f"KINDLING_WORKERS: {told}", "KINDLING_WORKERS")

    def _work(self, worker: Any) -> None:
        if self.state in OPEN and self.settings.publish and worker.unpublished:
            self._publisher.begin(partial(worker.publish, self.settings.volume))
        while jobs := self.queue.take(self.at_once, self.over.is_set):
            self._executor.draw(worker.draw_some, jobs)

    def _put_back(self, jobs: Sequence[Job]) -> None:
        for job in self.queue.put_back(jobs):
            job.end(self._closed())
