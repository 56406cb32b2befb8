"""What the engine's thread does with jobs: draw them, watched over by another thread, and judge what goes wrong."""

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

from handler.catalog.spec import ModelSpec
from handler.core.errors import DeviceLost, Internal, KindlingError, OutOfMemory
from handler.core.outlet import stacks
from handler.core.recipe import OnStep, Preview, Recipe
from handler.core.request import MIN_SIDE, ImageRequest
from handler.core.settings import Settings
from handler.core.tracebacks import let_go, outline
from handler.engine.batching import at_once, batchable
from handler.engine.gains import Learned
from handler.engine.pace import Pace
from handler.engine.queue import Job
from handler.engine.triage import Triage
from handler.engine.watchdog import Watchdog
from handler.model.runner import DrawOutcome, sound
from handler.volume.receipts import Gains
from handler.worker.clock import Ledger

HUNG = 10  # times what a whole picture takes, and no step has ended: it never will
FAILED = "The worker failed on this request; see its log."
DrawSome = Callable[[Sequence[Recipe], Sequence[OnStep]], Sequence[DrawOutcome | None]]
log = logging.getLogger(__name__)


class Executor:
    """Draws jobs, some at once. Calls `fail`, from any thread, with the error after which it can draw no more, and the
    jobs that end by it.

    `put_back` gets, in its thread, the jobs that did not fit into a run and wait for another. `jobs` are those being
    drawn, `pace` is how long others will take. `together` says whether it may still draw several at once: not after
    many at once found no room in memory.
    """

    def __init__(
        self,
        settings: Settings,
        spec: ModelSpec,
        ledger: Ledger,
        fail: Callable[[KindlingError, Sequence[Job]], None],
        put_back: Callable[[Sequence[Job]], None],
    ) -> None:
        self.jobs: Sequence[Job] = ()
        self._losing = threading.Lock()
        self.together = True
        self.watch = Watchdog(self._hung)
        self._triage = Triage()
        self.pace, self._learned = Pace(), Learned()
        self._settings, self._spec, self._ledger = settings, spec, ledger
        self._fail, self._put_back = fail, put_back

    def work(self, recipe: Recipe) -> float:
        """What drawing `recipe` takes, in pictures of the model's own size and steps."""
        (width, height), (own_width, own_height) = recipe.size, self._spec.size
        return recipe.taken * width * height / (self._spec.steps * own_width * own_height)

    def at_once(self, recipe: Recipe, asked: Literal["auto"] | int, gains: Gains) -> int:
        """How many such pictures are drawn at once: as `asked`, or as pay by what was measured, or was seen here."""
        if not (self.together and batchable(recipe)):
            return 1
        if asked == "auto" and not gains:
            return self._learned.at_once(recipe)
        return at_once(asked, gains, recipe.size)

    def draw(self, draw_some: DrawSome, jobs: Sequence[Job]) -> None:
        """Draw, in one run of a worker's, those of `jobs` that have not ended and fit together, and end them."""
        self.jobs, left = jobs, list[Job]()
        self.watch.beat(self._patience(jobs))
        try:
            if begun := [job for job in jobs if _begin(job)]:
                left = self._draw(draw_some, begun)
        finally:
            self.watch.rest()
            with self._losing:  # what is put back may be somebody else's at once
                for job in self.jobs:  # none is left without an answer, whatever went wrong here
                    if job not in left:
                        job.end(Internal(FAILED))
                self._put_back([job for job in left if job in self.jobs])
                self.jobs = ()

    def _draw(self, draw_some: DrawSome, jobs: Sequence[Job]) -> list[Job]:
        """Draw and end the jobs of one run; those that wait for another."""
        start, patience, stepped = time.perf_counter(), self._patience(jobs), set[Job]()
        outcomes: Sequence[DrawOutcome | None]
        try:
            outcomes = draw_some([job.recipe for job in jobs], [self._step(job, patience, stepped) for job in jobs])
        except BaseException as error:  # also a library that wants to end this process: it would end this thread alone
            outcomes = [error] * len(jobs)
        run = [(job, outcome) for job, outcome in zip(jobs, outcomes, strict=True) if outcome is not None]
        self._end_drawn(run, start, stepped)
        failed = [(job, outcome) for job, outcome in run if isinstance(outcome, BaseException)]
        again = self._alone(failed) if len(failed) == len(run) > 1 else []
        self._end_failed([each for each in failed if each[0] not in again], draw_some, patience)
        return [job for job, outcome in zip(jobs, outcomes, strict=True) if outcome is None or job in again]

    def _alone(self, failed: Sequence[tuple[Job, BaseException]]) -> list[Job]:
        """Of a run that gave no picture, those that may come out well alone: there was no memory, or one did harm."""
        times = Counter(id(error) for _, error in failed)
        again = [
            (job, error)
            for job, error in failed
            if isinstance(error, OutOfMemory) or (times[id(error)] > 1 and not isinstance(error, KindlingError))
        ]
        for job, _ in again:
            job.alone = True
        for error in {id(error): error for _, error in again}.values():
            log.warning("%s pictures at once failed, and are drawn one by one\n%s", len(failed), outline(error))
            self.together = self.together and not isinstance(error, OutOfMemory)
            let_go(error)
        return [job for job, _ in again]

    def _end_drawn(self, run: Sequence[tuple[Job, DrawOutcome]], start: float, stepped: set[Job]) -> None:
        """End the jobs that were drawn. What never took a step took no time of those that did."""
        drawn = [(job, outcome) for job, outcome in run if not isinstance(outcome, BaseException)]
        if drawn:
            works = [job.work for job, outcome in run if job in stepped or not isinstance(outcome, BaseException)]
            seconds = time.perf_counter() - start
            self.pace = self.pace.after(works, seconds)
            self._learned.after(drawn[0][0].recipe, len(works), seconds)
            self._triage.drawn()
        for job, (pixels, stages) in drawn:
            job.end((pixels, {"queue": start - job.entered, **stages}))

    def _end_failed(self, failed: Sequence[tuple[Job, BaseException]], draw_some: DrawSome, patience: float) -> None:
        for error in {id(error): error for _, error in failed}.values():
            jobs = [job for job, outcome in failed if outcome is error and job in self.jobs]
            if not jobs:  # these are somebody else's by now
                let_go(error)
                continue
            canary = partial(self._canary, draw_some, patience)
            found = self._triage.judge(error, canary, {job.request for job in jobs})
            let_go(error)
            if found.fatal:
                self._lose(found, jobs)
                continue
            for job in jobs:
                job.end(found)
                if job.queue:
                    job.queue.give_up(job.request)

    def _step(self, job: Job, patience: float, stepped: set[Job]) -> OnStep:
        def step(done: int, preview: Preview) -> None:
            self.watch.beat(patience)
            stepped.add(job)
            job.raise_if_over()
            job.on_step(done, preview)

        return step

    def _patience(self, jobs: Sequence[Job]) -> float:
        """Seconds without the end of a step after which `jobs` hang."""
        works = [job.work for job in jobs]
        if known := self.pace.seconds(works):
            return max(self._settings.hang_s, HUNG * max(known, self.pace.seconds([1.0]) or 0.0))
        warm_s = sum(phase.seconds for phase in self._ledger.phases if phase.name == "warm")
        return max(self._settings.hang_s, HUNG * warm_s * max(1.0, sum(works)))

    def _canary(self, draw_some: DrawSome, patience: float) -> None:
        """Draw a small picture, or raise why that cannot be done."""
        size, steps = MIN_SIDE, self._spec.min_steps
        small = ImageRequest(prompt="warm-up", width=size, height=size, num_inference_steps=steps, seed=0)
        [outcome] = draw_some([self._spec.recipe(small)], [lambda *_: self.watch.beat(patience)])
        assert outcome
        sound(outcome)

    def lost(self, over: threading.Event, error: DeviceLost) -> None:
        """The worker is no more, which another thread has noticed; once drawing is `over` that is as it should be."""
        if not over.is_set():
            self._lose(error, self.jobs)

    def _hung(self) -> None:
        """A step has not ended. This is not the thread that could stop it, but the one that can say so."""
        try:
            log.error("a step hangs; the stacks of all threads follow\n%s", stacks())
        finally:
            self._lose(DeviceLost("The GPU does not answer; this worker is being replaced. Try again."), self.jobs)

    def _lose(self, error: KindlingError, jobs: Sequence[Job]) -> None:
        """Draw no more: what becomes of `jobs`, which are not these threads' any longer, is not decided here."""
        with self._losing:
            lost = [job for job in jobs if job in self.jobs]
            self.jobs = [job for job in self.jobs if job not in lost]
        self._fail(error, lost)


def _begin(job: Job) -> bool:
    """Whether `job` is still to be drawn."""
    try:
        job.raise_if_over()
        job.begun = True
        job.on_begin()
    except Exception as error:
        if not isinstance(error, KindlingError):
            log.error("a request failed as it began\n%s", outline(error))
        let_go(error)
        job.end(error if isinstance(error, KindlingError) else Internal(FAILED))
        return False
    return True
