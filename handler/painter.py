"""What the lane's thread does with jobs: draw them, watched over by another thread, and judge what goes wrong."""

import faulthandler
import logging
import statistics
import time
from collections.abc import Callable, Sequence

from handler.clock import STDERR, Ledger
from handler.errors import DeviceLost, Internal, KindlingError, OutOfMemory
from handler.faults import Triage, let_go
from handler.line import Job
from handler.preview import OnStep, Preview
from handler.request import MIN_SIDE, Drawn, ImageRequest, Recipe
from handler.settings import Settings
from handler.spec import ModelSpec
from handler.watch import Watch

PACE = 16  # how many of the last pictures tell how long the next will take
HUNG = 10  # times what a whole picture takes, and no step has ended: it never will
FAILED = "The worker failed on this request; see its log."
Draw = Callable[[Sequence[Recipe], Sequence[OnStep]], Sequence[Drawn | Exception]]
log = logging.getLogger(__name__)


class Painter:
    """Draws jobs, some at once. Calls `fail`, from any thread, with the error after which it can draw no more.

    `jobs` are those being drawn. `together` says whether it may still draw several at once: not after such a picture
    of many found no room in memory.
    """

    def __init__(
        self, settings: Settings, spec: ModelSpec, ledger: Ledger, fail: Callable[[KindlingError], None]
    ) -> None:
        self.jobs: Sequence[Job] = ()
        self.together = True
        self.watch = Watch(self._hung)
        self._triage = Triage()
        self.took: tuple[float, ...] = ()  # seconds of the last pictures, as if of the model's own size and steps
        self._settings, self._spec, self._ledger, self._fail = settings, spec, ledger, fail

    def work(self, recipe: Recipe) -> float:
        """What drawing `recipe` takes, in pictures of the model's own size and steps."""
        (width, height), (own_width, own_height) = recipe.size, self._spec.size
        return recipe.taken * width * height / (self._spec.steps * own_width * own_height)

    @property
    def pace(self) -> float | None:
        """How many seconds a unit of work takes; None before the first picture."""
        return statistics.median(self.took) if self.took else None

    def draw(self, draw: Draw, jobs: Sequence[Job]) -> None:
        """Draw `jobs` at once with a worker's `draw`, but for those that have ended, and end them."""
        self.jobs = jobs
        self.watch.beat(self._patience(jobs))
        try:
            if begun := [job for job in jobs if _begin(job)]:
                self._draw(draw, begun)
        finally:
            self.watch.rest()
            self.jobs = ()
            for job in jobs:  # none is left without an answer, whatever went wrong here
                job.end(Internal(FAILED))

    def _draw(self, draw: Draw, jobs: Sequence[Job]) -> None:
        start, patience = time.perf_counter(), self._patience(jobs)
        outcomes: Sequence[Drawn | Exception]
        try:
            outcomes = draw([job.recipe for job in jobs], [self._step(job, patience) for job in jobs])
        except Exception as error:
            if isinstance(error, OutOfMemory) and len(jobs) > 1:
                return self._one_by_one(draw, jobs)
            outcomes = [error] * len(jobs)
        failed = {outcome for outcome in outcomes if isinstance(outcome, Exception)}
        if len(failed) < len(jobs):
            seconds = time.perf_counter() - start
            self.took = (*self.took, seconds / sum(job.work for job in jobs))[-PACE:]
            self._triage.drawn()
        verdicts = {error: self._judged(draw, error, jobs) for error in failed}
        for fault in failed:
            let_go(fault)
        for job, outcome in zip(jobs, outcomes, strict=True):
            if isinstance(outcome, Exception):
                job.end(verdicts[outcome])
            else:
                pixels, stages = outcome
                job.end((pixels, {"queue": start - job.entered, **stages}))

    def _one_by_one(self, draw: Draw, jobs: Sequence[Job]) -> None:
        log.warning("%s pictures at once do not fit in memory; from now on they are drawn one by one", len(jobs))
        self.together = False
        for job in jobs:
            self._draw(draw, [job])

    def _judged(self, draw: Draw, error: Exception, jobs: Sequence[Job]) -> KindlingError:
        """What callers get for `error`. It may quote any of the prompts."""
        words = [word for job in jobs for word in (job.recipe.prompt, job.recipe.negative_prompt or "")]
        found = self._triage.judge(error, lambda: self._canary(draw), *words)
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

    def _canary(self, draw: Draw) -> None:
        """Draw a small picture, or raise why that cannot be done."""
        size, steps = MIN_SIDE, self._spec.min_steps
        small = ImageRequest(prompt="warm-up", width=size, height=size, num_inference_steps=steps, seed=0)
        [outcome] = draw([self._spec.recipe(small)], [lambda *_: None])
        if isinstance(outcome, Exception):
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
