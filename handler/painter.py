"""What the lane's thread does with jobs: draw them, watched over by another thread, and judge what goes wrong."""

import faulthandler
import logging
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial

from handler.clock import STDERR, Ledger
from handler.drawing import Outcome
from handler.errors import DeviceLost, Internal, KindlingError, OutOfMemory
from handler.faults import Triage, let_go
from handler.line import Job
from handler.preview import OnStep, Preview
from handler.request import MIN_SIDE, ImageRequest, Recipe
from handler.settings import Settings
from handler.spec import ModelSpec
from handler.watch import Watch

PACE = 16  # how many of the last pictures tell how long the next will take
HUNG = 10  # times what a whole picture takes, and no step has ended: it never will
FAILED = "The worker failed on this request; see its log."
DrawSome = Callable[[Sequence[Recipe], Sequence[OnStep]], Sequence[Outcome | None]]
log = logging.getLogger(__name__)


class Painter:
    """Draws jobs, some at once. Calls `fail`, from any thread, with the error after which it can draw no more.

    `put_back` gets, in its thread, the jobs that did not fit into a run and wait for another. `jobs` are those being
    drawn. `together` says whether it may still draw several at once: not after many at once found no room in memory.
    """

    def __init__(
        self,
        settings: Settings,
        spec: ModelSpec,
        ledger: Ledger,
        fail: Callable[[KindlingError], None],
        put_back: Callable[[Sequence[Job]], None],
    ) -> None:
        self.jobs: Sequence[Job] = ()
        self.together = True
        self.watch = Watch(self._hung)
        self._triage = Triage()
        self.took: tuple[float, ...] = ()  # seconds of the last pictures, as if of the model's own size and steps
        self._settings, self._spec, self._ledger = settings, spec, ledger
        self._fail, self._put_back = fail, put_back

    def work(self, recipe: Recipe) -> float:
        """What drawing `recipe` takes, in pictures of the model's own size and steps."""
        (width, height), (own_width, own_height) = recipe.size, self._spec.size
        return recipe.taken * width * height / (self._spec.steps * own_width * own_height)

    @property
    def pace(self) -> float | None:
        """How many seconds a unit of work takes; None before the first picture."""
        return statistics.median(self.took) if self.took else None

    def draw(self, draw_some: DrawSome, jobs: Sequence[Job]) -> None:
        """Draw, in one run of a worker's, those of `jobs` that have not ended and fit together, and end them."""
        self.jobs, left = jobs, list[Job]()
        self.watch.beat(self._patience(jobs))
        try:
            if begun := [job for job in jobs if _begin(job)]:
                left = self._draw(draw_some, begun)
        finally:
            self.watch.rest()
            for job in jobs:  # none is left without an answer, whatever went wrong here
                if job not in left:
                    job.end(Internal(FAILED))
            self._put_back(left)
            self.jobs = ()

    def _draw(self, draw_some: DrawSome, jobs: Sequence[Job]) -> list[Job]:
        """Draw and end the jobs of one run; the others: what their prompts keep out, or all if there was no memory."""
        start, patience = time.perf_counter(), self._patience(jobs)
        outcomes: Sequence[Outcome | None]
        try:
            outcomes = draw_some([job.recipe for job in jobs], [self._step(job, patience) for job in jobs])
        except BaseException as error:  # also a library that wants to end this process: it would end this thread alone
            outcomes = [error] * len(jobs)
        run = [(job, outcome) for job, outcome in zip(jobs, outcomes, strict=True) if outcome is not None]
        left = [job for job, outcome in zip(jobs, outcomes, strict=True) if outcome is None]
        self._end_drawn(run, start)
        failed = [(job, outcome) for job, outcome in run if isinstance(outcome, BaseException)]
        if len(failed) == len(run) > 1 and (full := [job for job, error in failed if isinstance(error, OutOfMemory)]):
            log.warning("%s pictures at once do not fit in memory; from now on they are drawn one by one", len(run))
            self.together = False
            left = [job for job in jobs if job in full or job in left]
            failed = [(job, error) for job, error in failed if job not in full]
        self._end_failed(failed, draw_some, patience)
        return left

    def _end_drawn(self, run: Sequence[tuple[Job, Outcome]], start: float) -> None:
        drawn = [(job, outcome) for job, outcome in run if not isinstance(outcome, BaseException)]
        if drawn:
            seconds = time.perf_counter() - start
            self.took = (*self.took, seconds / sum(job.work for job, _ in run))[-PACE:]
            self._triage.drawn()
        for job, (pixels, stages) in drawn:
            job.end((pixels, {"queue": start - job.entered, **stages}))

    def _end_failed(self, failed: Sequence[tuple[Job, BaseException]], draw_some: DrawSome, patience: float) -> None:
        for error in {id(error): error for _, error in failed}.values():
            theirs = [job for job, outcome in failed if outcome is error]
            found = self._judged(error, theirs, draw_some, patience)
            let_go(error)
            for job in theirs:
                job.end(found)
                if job.line:
                    job.line.give_up(job.request)

    def _judged(self, error: BaseException, jobs: Sequence[Job], draw_some: DrawSome, patience: float) -> KindlingError:
        """What callers get for `error`. It may quote any of their prompts."""
        words = [word for job in jobs for word in (job.recipe.prompt, job.recipe.negative_prompt)]
        canary = partial(self._canary, draw_some, patience)
        found = self._triage.judge(error, canary, {job.request for job in jobs}, *words)
        if found.fatal:
            self._fail(found)
        return found

    def _step(self, job: Job, patience: float) -> OnStep:
        def step(done: int, preview: Preview) -> None:
            self.watch.beat(patience)
            job.check()
            job.on_step(done, preview)

        return step

    def _patience(self, jobs: Sequence[Job]) -> float:
        """Seconds without the end of a step after which `jobs` hang."""
        warm_s = sum(phase.seconds for phase in self._ledger.phases if phase.name == "warm")
        work = sum(job.work for job in jobs)
        return max(self._settings.hang_s, HUNG * (self.pace or warm_s) * max(1.0, work))

    def _canary(self, draw_some: DrawSome, patience: float) -> None:
        """Draw a small picture, or raise why that cannot be done."""
        size, steps = MIN_SIDE, self._spec.min_steps
        small = ImageRequest(prompt="warm-up", width=size, height=size, num_inference_steps=steps, seed=0)
        [outcome] = draw_some([self._spec.recipe(small)], [lambda *_: self.watch.beat(patience)])
        if isinstance(outcome, BaseException):
            raise outcome

    def _hung(self) -> None:
        """A step has not ended. This is not the thread that could stop it, but the one that can say so."""
        log.error("a step hangs; the stacks of all threads follow")
        faulthandler.dump_traceback(file=STDERR)
        error, jobs = DeviceLost("The GPU does not answer; this worker is being replaced. Try again."), self.jobs
        self._fail(error)
        for job in jobs:
            job.end(error)


def _begin(job: Job) -> bool:
    """Whether `job` is still to be drawn."""
    try:
        job.check()
    except KindlingError as error:
        let_go(error)
        job.end(error)
        return False
    job.begun = True
    return True
