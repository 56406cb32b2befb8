"""A fleet of workers in simulated time: requests come, wait, are drawn or go; workers start, draw, idle and end.

Discrete events in one heap, and no chance at all: what comes by chance is in the requests. A platform gives a request
to the ready worker that holds the fewest, of equal ones to that which worked last, so that the others may end; requests
for which no worker has room wait at the platform, oldest first. No platform says how it chooses.
"""

import heapq
import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Literal

from traffic import Request

Event = tuple[float, int, Callable[..., None], tuple[object, ...]]  # when, a number of its own, what, of whom


@dataclass(frozen=True, slots=True)
class Service:
    """Seconds that a worker draws: `fixed_s` each time, `work_s` for each picture of usual size; up to `batch` at once.

    `between_s` pass before it takes the next.
    """

    work_s: float
    fixed_s: float = 0.0
    batch: int = 1
    between_s: float = 0.0

    def seconds(self, works: Iterable[float]) -> float:
        return self.fixed_s + self.work_s * sum(works)


@dataclass(frozen=True, slots=True)
class Rule:
    """When another worker starts. The autoscaler looks every `every_s`, or at once where that is 0.

    "count": as many workers as there are requests, waiting or drawn, by `value`, and `buffer` more.
    "delay": one for each request that has waited at the platform for `value` seconds; without any worker at once.
    """

    by: Literal["count", "delay"]
    value: float
    buffer: int = 0
    every_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Fleet:
    """Workers that a platform runs: `least` always, `most` at once, each ended when idle for `idle_s`.

    A worker holds `inside` requests, drawn and waiting. Where `queue` requests wait anywhere, more are refused; who has
    waited `patience_s` goes.
    """

    service: Service
    rule: Rule
    cold_s: float
    idle_s: float
    most: int
    least: int = 0
    inside: int = 1
    queue: float = math.inf
    patience_s: float = math.inf


@dataclass(frozen=True, slots=True)
class Outcome:
    """Seconds that each served request waited and took, in the order in which they were begun; and what it cost.

    `cold` of them waited for a worker to start. `gpu_s` counts from the beginning of each worker's start to its end;
    `starting_s` and `busy_s` are parts of it.
    """

    waits: tuple[float, ...]
    latencies: tuple[float, ...]
    refused: int
    gave_up: int
    cold: int
    starts: int
    peak: int
    gpu_s: float
    starting_s: float
    busy_s: float

    @property
    def lost(self) -> float:
        """The share of all requests that got no picture."""
        return (self.refused + self.gave_up) / max(1, self.refused + self.gave_up + len(self.waits))

    @property
    def cold_share(self) -> float:
        return self.cold / max(1, len(self.waits))

    def per_thousand(self, dollars_per_s: float) -> float:
        """Dollars for 1,000 pictures."""
        return 1000 * self.gpu_s * dollars_per_s / max(1, len(self.waits))


def quantile(values: Sequence[float], share: float) -> float:
    """The least value that so large a share does not exceed; 0 of nothing."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)] if values else 0.0


@dataclass(slots=True, eq=False)
class _Worker:
    begun: float
    ready: float = math.inf  # when it was
    free: float = math.inf  # since when it has had nothing to do
    drawing: int = 0
    held: deque[Request] = field(default_factory=deque)

    @property
    def inside(self) -> int:
        return self.drawing + len(self.held)


class _Run:
    def __init__(self, requests: Sequence[Request], fleet: Fleet) -> None:
        self.fleet, self.now = fleet, 0.0
        self.workers = [_Worker(0.0, ready=0.0, free=0.0) for _ in range(fleet.least)]
        self.waiting: deque[Request] = deque()
        self.waits: list[float] = []
        self.latencies: list[float] = []
        self.refused = self.gave_up = self.cold = self.starts = 0
        self.peak, self.gpu_s, self.busy_s = fleet.least, 0.0, 0.0
        self._order = count()
        self._events: list[Event] = [(one.at, next(self._order), self._arrive, (one,)) for one in requests]

    def outcome(self, until: float) -> Outcome:
        """The requests are in order, so their events are a heap."""
        while self._events:
            self.now, _, what, told = heapq.heappop(self._events)
            what(*told)
            if what in (self._arrive, self._become_ready, self._finish):
                until = max(until, self.now)
        gpu_s = self.gpu_s + sum(until - worker.begun for worker in self.workers)
        counted = self.refused, self.gave_up, self.cold, self.starts, self.peak
        seconds = gpu_s, self.starts * self.fleet.cold_s, self.busy_s
        return Outcome(tuple(self.waits), tuple(self.latencies), *counted, *seconds)

    def _at(self, when: float, what: Callable[..., None], *told: object) -> None:
        heapq.heappush(self._events, (when, next(self._order), what, told))

    def _arrive(self, request: Request) -> None:
        for line in (self.waiting, *(worker.held for worker in self.workers)):
            self._let_go(line)
        at_once = any(worker.ready <= self.now and not worker.inside for worker in self.workers)
        if not at_once and len(self.waiting) + sum(len(one.held) for one in self.workers) >= self.fleet.queue:
            self.refused += 1
            return
        self.waiting.append(request)
        self._place()
        rule = self.fleet.rule
        due = self.now + rule.value if rule.by == "delay" and self.workers else self.now
        self._at(math.ceil(due / rule.every_s) * rule.every_s if rule.every_s else due, self._look)

    def _let_go(self, line: deque[Request]) -> None:
        """Who was out of patience by now has gone: these are the oldest."""
        while line and self.now - line[0].at >= self.fleet.patience_s:
            line.popleft()
            self.gave_up += 1

    def _look(self) -> None:
        self._let_go(self.waiting)
        rule = self.fleet.rule
        if rule.by == "count":
            present = len(self.waiting) + sum(worker.inside for worker in self.workers)
            wanted = math.ceil(present / rule.value) + rule.buffer - len(self.workers)
        else:
            starting = sum(worker.ready > self.now for worker in self.workers)
            overdue = sum(one.at + rule.value <= self.now for one in self.waiting)
            wanted = max(overdue, bool(self.waiting and not self.workers)) - starting
        for _ in range(min(wanted, self.fleet.most - len(self.workers))):
            self.workers.append(worker := _Worker(self.now))
            self.starts += 1
            self._at(self.now + self.fleet.cold_s, self._become_ready, worker)
        self.peak = max(self.peak, len(self.workers))

    def _become_ready(self, worker: _Worker) -> None:
        worker.ready = self.now
        self._place()
        if not worker.drawing:
            self._begin(worker)

    def _place(self) -> None:
        """Give workers what waits, as long as they have room, and let those begin that have been idle."""
        self._let_go(self.waiting)
        given = []
        while self.waiting and (room := [one for one in self.workers if self._has_room(one)]):
            given.append(worker := min(room, key=lambda one: (one.inside, -one.free if one.free < math.inf else 0.0)))
            worker.held.append(self.waiting.popleft())
        for worker in given:
            if not worker.drawing:
                self._begin(worker)

    def _has_room(self, worker: _Worker) -> bool:
        return worker.ready <= self.now and worker.inside < self.fleet.inside

    def _begin(self, worker: _Worker) -> None:
        """Draw the oldest that it holds; with none it is idle from now on."""
        self._let_go(worker.held)
        taken = [worker.held.popleft() for _ in range(min(self.fleet.service.batch, len(worker.held)))]
        worker.drawing = len(taken)
        if not taken:
            worker.free = self.now
            self._at(self.now + self.fleet.idle_s, self._retire, worker, self.now)
            return
        seconds = self.fleet.service.seconds(one.work for one in taken)
        worker.free = math.inf
        self.waits += [self.now - one.at for one in taken]
        self.latencies += [self.now - one.at + seconds for one in taken]
        self.cold += sum(worker.ready > one.at for one in taken)
        seconds += self.fleet.service.between_s
        self.busy_s += seconds
        self._at(self.now + seconds, self._finish, worker)

    def _finish(self, worker: _Worker) -> None:
        worker.drawing = 0
        self._place()
        if not worker.drawing:
            self._begin(worker)

    def _retire(self, worker: _Worker, free: float) -> None:
        if worker.free == free and len(self.workers) > self.fleet.least:
            self.workers.remove(worker)
            self.gpu_s += self.now - worker.begun


def simulate(requests: Sequence[Request], fleet: Fleet, until: float = 0.0) -> Outcome:
    """What becomes of `requests`, which are in order of time, and of the workers, until the last has ended.

    Those that always run are paid for until all is drawn and started, and at least for the first `until` seconds.
    """
    return _Run(requests, fleet).outcome(until)
