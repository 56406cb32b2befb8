"""The queue as a machine: whatever callers, steps and faults come in whatever order, each picture ends once, in turn.

The engine, its executor and its queue are the real ones; only the model is a fake, which takes a step when told to.
"""

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import replace
from queue import SimpleQueue
from typing import Any, TypeVar

from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from examples import FIXED
from fakes import RECIPE, FakeFamily
from handler import Engine, Settings
from handler.core.errors import Cancelled, DeadlineExceeded, KindlingError, NumericalError, OutOfMemory, QueueFull
from handler.core.recipe import Drawn
from handler.engine.queue import Job

T = TypeVar("T")
SHAPES = [replace(RECIPE, size=(64, 64), steps=2), replace(RECIPE, size=(64, 128), steps=2)]
FAULTS: dict[str, Callable[[], Exception] | None] = {
    "goes on": None,
    "has a bug": lambda: RuntimeError("a bug"),
    "draws nonsense": lambda: NumericalError("NaN"),
    "has no memory": lambda: OutOfMemory("too large", "size"),
}
STEPS = st.lists(st.sampled_from([*FAULTS, *["goes on"] * 4]), max_size=4)  # after each thing that callers do
QUEUE, MOST = 4, 3  # requests that may wait; pictures of one
PATIENCE_S = 30.0


class StepByStep(dict[int, Callable[[], None]]):
    """What a fake family does at each step: it says that it is there, and waits for what is to happen."""

    def __init__(self, arrived: Callable[[], None]) -> None:
        self._arrived, self.next = arrived, SimpleQueue[Callable[[], Exception] | None]()
        self.free = threading.Event()

    def get(self, step: int, default: Any = None) -> Callable[[], None]:
        return self._wait

    def _wait(self) -> None:
        self._arrived()
        fault = None if self.free.is_set() else self.next.get(timeout=PATIENCE_S)
        if fault:
            raise fault()


class Queue(RuleBasedStateMachine):
    """Callers of an engine, and a family that takes a step when it is told to."""

    @initialize(batch=st.integers(1, 2), n=st.integers(1, MOST), steps=STEPS)
    def begin(self, batch: int, n: int, steps: list[str]) -> None:
        self.loop, self.family = asyncio.new_event_loop(), FakeFamily()
        self.held = threading.Event()  # the engine waits at a step
        self.steps = StepByStep(self.held.set)
        self.family.at_step = self.steps
        self.engine = Engine(Settings(queue=QUEUE, batch=batch), boot=self.family.boot)
        self.engine.start()
        self.engine.wait_booted()
        self.asked: list[tuple[list[int], asyncio.Task[list[Drawn]]]] = []
        self.open, self.admitted, self.seed = True, 0, 0
        self.shapes: dict[int, int] = {}  # by seed
        self.failed_together: set[int] = set()
        self.spoiled: set[int] = set()  # seeds of pictures that need not be drawn
        self.ask(n, 0, steps)

    @property
    def pending(self) -> list[tuple[list[int], "asyncio.Task[list[Drawn]]"]]:
        return [each for each in self.asked if not each[1].done()]

    def run(self, work: Awaitable[T]) -> T:
        """Wait for something with a limit, and then until all that it caused on the loop is done."""

        async def both() -> T:
            found = await asyncio.wait_for(work, PATIENCE_S)
            for _ in range(20):
                await asyncio.sleep(0)
            return found

        return self.loop.run_until_complete(both())

    async def settled(self) -> None:
        """Until the engine waits at a step, or for somebody who asks; a picture that nobody wants may still fail it."""
        while not self.held.is_set() and (self.pending or self.engine.busy or self.engine._executor.jobs):
            await asyncio.sleep(0.001)

    def submit(self, n: int, shape: int, deadline: float) -> "asyncio.Task[list[Drawn]]":
        recipes = [replace(SHAPES[shape], seed=self.seed + 1 + i) for i in range(n)]
        self.seed += n
        self.shapes |= {recipe.seed: shape for recipe in recipes}
        wanted = [(recipe, lambda *_: None) for recipe in recipes]
        task = self.loop.create_task(self.engine.submit_all(wanted, deadline, admitted=False))
        self.asked.append(([recipe.seed for recipe in recipes], task))
        return task

    @rule(n=st.integers(1, MOST), shape=st.integers(0, 1), steps=STEPS)
    def ask(self, n: int, shape: int, steps: list[str]) -> None:
        full = self.engine.waiting >= QUEUE
        task = self.submit(n, shape, float("inf"))
        self.run(asyncio.sleep(0))
        assert task.done() == (full or not self.open)
        if task.done():
            error = task.exception()
            assert isinstance(error, QueueFull if self.open else KindlingError)
            assert error.retryable
            self.spoiled |= set(self.asked[-1][0])
        else:
            self.admitted += n
        self.go_on(steps)

    @precondition(lambda self: self.open and self.held.is_set() and self.engine.waiting < QUEUE)
    @rule(n=st.integers(1, MOST))
    def ask_in_a_hurry(self, n: int) -> None:
        before = sum(self.engine.queue.ended.values())
        task = self.submit(n, 0, time.perf_counter() + 0.001)
        self.run(asyncio.wait([task]))
        assert isinstance(task.exception(), DeadlineExceeded | QueueFull)
        self.admitted += sum(self.engine.queue.ended.values()) - before  # none, if it was refused
        self.spoiled |= set(self.asked[-1][0])

    def go_on(self, steps: list[str]) -> None:
        self.run(self.settled())
        for how in steps:
            if self.held.is_set():
                self.step(how)

    def step(self, how: str) -> None:
        jobs = self.engine._executor.jobs
        if how in ("has a bug", "has no memory") and len(jobs) > 1 and not any(job.over for job in jobs):
            self.failed_together |= {id(job) for job in jobs}
        elif how != "goes on":
            self.spoiled |= {job.recipe.seed for job in jobs}
        self.held.clear()
        self.steps.next.put(FAULTS[how])
        self.run(self.settled())
        self.open = self.open and self.engine.state == "ready"

    @precondition(lambda self: self.pending)
    @rule(which=st.integers(0, 9), steps=STEPS)
    def leave(self, which: int, steps: list[str]) -> None:
        seeds, task = self.pending[which % len(self.pending)]
        before = self.engine.queue.ended.copy()
        places = {"denoise": self.engine._executor.jobs, "queue": self.engine.queue._jobs}
        ended = [("cancelled", place) for place, jobs in places.items() for job in jobs if self.waits(job, seeds)]
        task.cancel()
        self.run(asyncio.wait([task]))
        assert task.cancelled()
        assert self.engine.queue.ended - before == Counter(ended)
        self.go_on(steps)

    @precondition(lambda self: self.pending)
    @rule(which=st.integers(0, 9), steps=STEPS)
    def run_out_of_time(self, which: int, steps: list[str]) -> None:
        seeds, _ = self.pending[which % len(self.pending)]
        self.spoiled |= set(seeds)
        for job in (*self.engine._executor.jobs, *self.engine.queue._jobs):
            if self.waits(job, seeds):
                job.deadline = time.perf_counter()
        self.go_on(steps)

    @rule(abort=st.sampled_from([False, False, True]))
    @precondition(lambda self: self.seed > 8)
    def stop(self, abort: bool) -> None:
        if abort:
            self.engine.abort()
            self.run(asyncio.wait([task for _, task in self.asked]))
        else:
            self.engine.drain()
        self.open = False

    @staticmethod
    def waits(job: Job, seeds: list[int]) -> bool:
        return job.recipe.seed in seeds and not job.over

    @invariant()
    def what_waits_is_bounded(self) -> None:
        if hasattr(self, "engine"):
            assert self.engine.waiting <= QUEUE + self.engine.batch  # which may have been put back
            assert self.engine.drawing <= self.engine.batch

    @invariant()
    def what_failed_together_is_drawn_alone(self) -> None:
        if hasattr(self, "engine") and self.engine.drawing > 1:
            assert not self.failed_together & {id(job) for job in self.engine._executor.jobs}

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        self.steps.free.set()
        self.steps.next.put(None)
        if tasks := [task for _, task in self.asked]:
            self.run(asyncio.wait(tasks))
        sound = self.engine.state in ("ready", "draining")
        self.engine.stop()
        self.run(asyncio.sleep(0))
        self.loop.close()
        assert not self.engine.alive
        assert (self.engine.waiting, self.engine.drawing, self.engine.busy, len(self.engine.queue)) == (0, 0, False, 0)
        assert sum(self.engine.queue.ended.values()) == self.admitted  # each once
        self.each_is_answered_with_its_own(sound)

    def each_is_answered_with_its_own(self, sound: bool) -> None:
        good = []
        for seeds, task in self.asked:
            if not task.cancelled() and not (error := task.exception()):
                assert [pixels.recipe.seed for pixels, _ in task.result()] == seeds
                good += seeds
            elif not task.cancelled():
                assert not isinstance(error, Cancelled)  # whose own picture failed hears of that
                assert self.spoiled & set(seeds) or not sound
        drawn = [seed for seed in self.family.drawn if seed]  # 0: a canary's
        assert set(good) <= set(drawn)
        for shape in range(len(SHAPES)):
            in_turn = [seed for seed in drawn if self.shapes[seed] == shape]
            assert in_turn == sorted(set(in_turn))


def test_each_picture_ends_once_and_in_turn_whatever_comes() -> None:
    # Without making smaller what fails: it is short already, and where the engine hangs that would take many minutes.
    patient = settings(FIXED, max_examples=200, stateful_step_count=10, phases=[Phase.generate])
    run_state_machine_as_test(Queue, settings=patient)
