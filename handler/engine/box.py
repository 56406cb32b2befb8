"""Several workers behind one queue: each in a process of its own, on GPUs of its own; who is free draws what is next.

The server's process has all but the models. One worker that is lost costs nobody a picture: another draws it, once, for
one during which two workers are lost may be the reason. The lost one is begun again, later each time that it fails; but
what never was ready is not, until another one is.
"""

import logging
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from handler.core.birth import Birth
from handler.core.deadline import EXIT_S
from handler.core.errors import DeviceLost, Internal, KindlingError, SettingsError
from handler.core.recipe import Recipe
from handler.core.settings import Settings
from handler.core.tracebacks import outline
from handler.engine.engine import LAST_S, TIDY_S, Engine
from handler.engine.intake import OPEN, EngineState
from handler.engine.pace import Pace
from handler.engine.queue import Job
from handler.engine.remote import Remote
from handler.worker.clock import Clock
from handler.worker.spawn import END_S

FIRST_S, MOST_S = 1.0, 60.0  # until a lost worker is begun again: twice as long each time
STEADY_S = 60.0  # that a worker has served, and what was before is forgotten
IN_A_ROW = 5  # losses of each worker, none of which served meanwhile: the machine is the reason
log = logging.getLogger(__name__)


class Lane(Engine):
    """One of a box's workers, from its start until it is lost; `restarts` others were before it."""

    def __init__(self, box: "Box", number: int, clock: Clock, restarts: int = 0, losses: int = 0) -> None:
        super().__init__(box.settings, clock, partial(Remote.boot, number, self._begun))
        self.queue, self._box, self.number, self._restarts, self._losses = box.queue, box, number, restarts, losses
        self._served_from = self.lost_at = 0.0
        self.ended = False  # its thread has nothing more to do
        self._starts: Remote | None = None
        self._unwanted = False

    def start(self) -> None:
        """Begin booting; what it costs the box counts."""
        self.begun = True
        self._thread.start()
        self._executor.watch.start()

    def leave(self) -> None:
        """Start no further."""
        self._unwanted = True
        if not self.booted:
            self.clock.finish("stopped", f"told to stop in phase '{self.ledger.phase}'")
            if self._starts:
                self._starts.hang_up()

    def _begun(self, starts: Remote) -> None:
        self._starts = starts
        if self._unwanted:
            starts.hang_up()

    def again(self, clock: Clock) -> "Lane":
        """The next one in its place."""
        return Lane(self._box, self.number, clock, self.restarts + 1, self.losses)

    @property
    def restarts(self) -> int:
        """How many were in its place before."""
        return self._restarts

    @property
    def losses(self) -> int:
        """How many times in a row this worker was lost before it had served for long."""
        steady = self._served_from and self.lost_at - self._served_from >= STEADY_S
        return 1 if steady else self._losses + 1

    @property
    def due_s(self) -> float | None:
        """Seconds until it should be begun again, if it should: what is set wrong stays wrong."""
        if self.state != "failed" or not self.ended or isinstance(self.error, SettingsError):
            return None
        wait_s = min(MOST_S, math.ldexp(FIRST_S, self.losses - 1))
        return max(0.0, self.lost_at + wait_s - time.monotonic())

    def fail(self, error: KindlingError, jobs: Sequence[Job] = ()) -> None:
        """Draw no more. Of `jobs`, those that another worker may draw wait again, before all others."""
        again = [job for job in jobs if isinstance(error, DeviceLost) and not job.lost]
        told = [job for job in jobs if job not in again]
        for job in again:
            job.lost = True
        if not (self.over.is_set() or self._unwanted):
            log.error("worker %s is lost: %s", self.number, error.message)
        self.lost_at = time.monotonic()
        self.over.set()  # before: its thread is to take none of them
        self._put_back(again)
        super().fail(error, told)
        for job in told:
            self.queue.give_up(job.request)
        if isinstance(self.worker, Remote):
            self.worker.kill()

    def _require_workers(self, settings: Settings) -> None:
        """The box has."""

    def _become(self, state: EngineState) -> None:
        if state == "ready":
            self._served_from = time.monotonic()
        super()._become(state)
        self._box.look()

    def _refuse_all(self) -> None:
        """Who waits may wait for another worker."""
        self.queue.wake()

    def _run(self) -> None:
        super()._run()
        self._executor.watch.close()
        if isinstance(self.worker, Remote):
            left_s = min(EXIT_S, self._box.exit.left_s) - LAST_S - TIDY_S  # for what it publishes
            self.worker.close(END_S if self.state == "failed" else max(END_S, left_s))
        self.ended = True
        self._box.look()


class Box(Engine):
    """So many workers as an engine: ready when the first of them is, over when none will be any more.

    `clocks` makes the clock of each start by the worker's number. What `worker` and `clock` say is the first one's that
    is ready.
    """

    def __init__(self, settings: Settings, count: int, clocks: Callable[[int], Clock]) -> None:
        super().__init__(settings.model_copy(update={"workers": count}), clocks(0))
        self._clocks, self._news = clocks, threading.Condition()
        self._lanes = [Lane(self, number, clocks(number) if number else self.clock) for number in range(count)]

    @property
    def workers(self) -> Mapping[str, Engine]:
        """By their numbers."""
        return {str(lane.number): lane for lane in self._lanes}

    @property
    def pace(self) -> Pace:
        """The best known of a worker's, shared by those that draw."""
        longest = max((lane.pace for lane in self._lanes), key=lambda pace: len(pace.runs))
        return longest.among(max(1, len(self._ready)))

    def at_once(self, recipe: Recipe) -> int:
        """How many pictures of this shape all workers together draw at once."""
        return max(1, sum(lane.at_once(recipe) for lane in self._ready))

    def look(self) -> None:
        """Something has become of a worker."""
        with self._news:
            self._news.notify()

    def stop(self) -> None:
        """As one worker does; those that start are told too, and have a moment to leave word of that."""
        self._become("stopped")
        with self._news:  # no other is begun again
            lanes = [*self._lanes]
        for lane in lanes:
            lane.leave()
        super().stop()
        self.over.wait(min(2 * END_S, self.exit.left_s))  # for what ends by force, too

    def _become(self, state: EngineState) -> None:
        super()._become(state)
        self.look()

    @property
    def _ready(self) -> list[Lane]:
        return [lane for lane in self._lanes if lane.state == "ready"]

    @property
    def _jobs(self) -> Sequence[Job]:
        return [job for lane in self._lanes for job in lane._jobs]

    def _require_workers(self, settings: Settings) -> None:
        """Whoever makes a box has."""

    def _run(self) -> None:
        """The thread: begin the workers, and again what is lost, until no more will be drawn."""
        try:
            for lane in self._lanes:
                lane.start()
            with self._news:
                while not self._settled():
                    self._news.wait(self._begun_again())
        except BaseException as error:  # a bug of ours, or no room for a thread: nobody would begin a worker any more
            log.error("the workers are not looked after\n%s", outline(error))
            self.fail(Internal("This server failed; see its log."))
        if self.error:
            self._booted.set()
        self.over.set()

    def _settled(self) -> bool:
        """Let this be what its workers are; whether all is over."""
        ready = self._ready
        if ready:
            lead = next((lane for lane in ready if lane.worker is self.worker), ready[0])
            self.worker, self.clock = lead.worker, lead.clock
        with self._lock:  # not by `_become`: with no worker left it starts once more
            if self.state in OPEN:
                self.state = "ready" if ready else "starting"
        if ready:
            self._booted.set()
        elif self.state != "stopped" and all(lane.state == "failed" for lane in self._lanes) and self._hopeless:
            self.fail(self._lanes[0].error or DeviceLost("All workers are lost."))
        return self.state not in OPEN and all(lane.ended for lane in self._lanes)

    @property
    def _hopeless(self) -> bool:
        """Whether workers that have all failed are not worth another start."""
        wrong = all(lane.losses >= IN_A_ROW or isinstance(lane.error, SettingsError) for lane in self._lanes)
        return wrong or not self.booted or self.state not in OPEN

    def _begun_again(self) -> float | None:
        """Begin the workers whose time has come; in how many seconds the next one's has."""
        if not (self.booted and self.state in OPEN):
            return None
        for at, lane in enumerate(self._lanes):
            if lane.due_s == 0.0:
                clock = self._clocks(lane.number)
                clock.birth = Birth(time.monotonic())
                self._lanes[at] = lane.again(clock)
                self._lanes[at].start()
                log.warning("worker %s is begun again", lane.number)
        return min((due for lane in self._lanes if (due := lane.due_s) is not None), default=None)
