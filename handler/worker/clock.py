"""The cold-start clock: from the birth of the worker, against one budget, phase by phase.

`Clock.arm` starts two watchdogs. A thread ends the process at the deadline with the phase named and every
stack dumped. If native code holds the GIL so that no thread can run, `faulthandler` and `ending.py`, which need no GIL,
do the same two seconds later; the phase is then the last one announced, and the exit code 1 where only the former can.
Knows nothing about models.
"""

import faulthandler
import json
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Annotated, Self

from pydantic import Field

from handler.core.birth import Birth
from handler.core.errors import BudgetExceeded, KindlingError, StartError
from handler.core.outlet import ERR, stacks, unblocked
from handler.worker.ending import EXIT_CODE, Ending

GRACE_S = 2.0
OVER = "exceeded its budget"
STDERR = 2  # the file descriptor


Seconds = Annotated[float, Field(ge=0, le=86_400)]  # a record that says more is damaged


@dataclass(frozen=True, slots=True)
class Phase:
    """One timed part of the cold start, in seconds; `start_s` counts from the worker's birth."""

    name: str
    start_s: Seconds
    seconds: Seconds


@dataclass(slots=True)
class Ledger:
    """Where the seconds of one cold start went. `outcome` is starting, ready, failed or stopped.

    `preloaded` are phases that were over before, in the process that this worker is a copy of; that one's own `outcome`
    is then preloaded. They count from their own start.
    """

    model: str = ""
    device: str = ""
    precision: str = ""
    budget_s: Seconds = 0.0
    outcome: str = "starting"
    reason: str = ""
    plan: str = ""
    plan_reason: str = ""
    compile_failure: str = ""
    memory: str = ""
    attention: str = ""
    imports: str = ""
    weights: str = ""
    phase: str = "start"
    total_s: Seconds = 0.0
    phases: list[Phase] = field(default_factory=list)
    preloaded: list[Phase] = field(default_factory=list)

    @property
    def decision(self) -> str:
        """The plan with its reason, as answers carry it."""
        return f"{self.plan}: {self.plan_reason}"

    @property
    def over(self) -> str:
        """Why it failed, if its budget is spent by now."""
        return f"cold start {OVER} of {self.budget_s:g} s in phase '{self.phase}'"

    @property
    def held(self) -> Self:
        """What is true of it if it gets no further: nobody will be there to say so."""
        reason = f"{self.over}, in native code that lets nothing else of the process run"
        return replace(self, outcome="failed", reason=reason, total_s=round(self.budget_s + GRACE_S, 3))

    def line(self) -> str:
        """The ledger as one JSON line."""
        return json.dumps({"cold_start": asdict(self)})


def print_ledger(ledger: Ledger) -> None:
    """Print the ledger as one JSON line on stderr; of a start that failed it is there before anybody acts on it."""
    ERR.write(ledger.line() + "\n")
    if ledger.outcome != "ready":
        ERR.drain()


class Clock:
    """Times the phases of one cold start and ends the process when the budget is spent.

    `announce(phase)` is called as each phase begins, `publish(ledger)` once at the end, by default as one JSON
    line on stderr, and `record(ledger)` at both; `spent(reason)` before the process ends at its deadline, so that who
    waits can be told within `GRACE_S`; `abort` replaces the hard exit in tests. `birth` is the process's unless told.
    """

    def __init__(
        self,
        budget_s: float,
        birth: Birth | None = None,
        announce: Callable[[str], None] = lambda phase: None,
        publish: Callable[[Ledger], None] = print_ledger,
        spent: Callable[[str], None] = lambda reason: None,
        abort: Callable[[int], None] = os._exit,
    ) -> None:
        self.ledger = Ledger(budget_s=budget_s)
        self.birth = birth or Birth.of_process()
        self._announce, self._publish, self._spent, self._abort = announce, publish, spent, abort
        self.record: Callable[[Ledger], None] = lambda ledger: None
        self.ending = Ending()
        self._done, self._told, self._stderr = threading.Event(), threading.Event(), STDERR
        self._lock = threading.Lock()

    @classmethod
    def anew(cls, budget_s: float) -> Self:
        """Of a cold start that begins now, in a process that is older: an app, a notebook, a restored snapshot."""
        return cls(budget_s, Birth.anew())

    @property
    def elapsed(self) -> float:
        """Seconds since the worker was born."""
        return self.birth.age

    @property
    def remaining(self) -> float:
        return self.ledger.budget_s - self.elapsed

    def arm(self) -> None:
        """Start both watchdogs, but of a start that was stopped; raises BudgetExceeded if the budget is spent."""
        self.require_time()
        with self._lock:
            if self._done.is_set():
                return
            self._stderr = unblocked(STDERR)
            self._end_later(self.remaining + GRACE_S)
            self._say_at_the_end()
        threading.Thread(target=self._watch, name="cold-start-watchdog", daemon=True).start()

    @contextmanager
    def start(self, name: str) -> Iterator[None]:
        """Around the cold start of `name`: whatever it raises disarms, and is a StartError if it is any error."""
        try:
            yield
        except KindlingError as error:
            self.finish("failed", error.message)
            raise error if isinstance(error, StartError) else StartError(error.message, error.param) from None
        except Exception as error:
            self.finish("failed", f"{type(error).__name__}: {error}")
            raise StartError(f"{name} could not be loaded: {type(error).__name__}: {error}") from error
        except BaseException as error:  # Ctrl-C: the program goes on, in a notebook, and must not be ended later
            self.finish("stopped", f"{type(error).__name__} in phase '{self.ledger.phase}'")
            raise

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time the enclosed block as phase `name`, then check the budget."""
        self.ledger.phase, start = name, self.elapsed
        self._announce(name)
        self._say_at_the_end()
        self.record(self.ledger)
        yield
        self.ledger.phases.append(Phase(name, round(start, 3), round(self.elapsed - start, 3)))
        self.require_time()

    def require_time(self) -> None:
        """Raise BudgetExceeded once the budget is spent."""
        if self.remaining <= 0:
            raise BudgetExceeded(self.ledger.over)

    def finish(self, outcome: str, reason: str = "") -> bool:
        """Disarm and close the ledger; False if the watchdog closed it first, which then has `GRACE_S` to tell it."""
        if closed := self._close(outcome, reason, self._disarm):
            if self._stderr != STDERR:
                os.close(self._stderr)
            self._tell()
        self._told.wait(GRACE_S)
        return closed

    def follow(self, told: Ledger) -> None:
        """Take over what another process tells of its start, which is this clock's; nothing is watched over here."""
        if self._done.is_set():  # it was stopped here
            return
        phase = self.ledger.phase
        for one in fields(told):
            setattr(self.ledger, one.name, getattr(told, one.name))
        if told.outcome != "starting" and self._close(told.outcome, told.reason):
            self.ledger.total_s = told.total_s
            self._tell()
        elif told.phase != phase:
            self._announce(told.phase)

    def _close(self, outcome: str, reason: str, first: Callable[[], None] = lambda: None) -> bool:
        """Close the ledger; False if it was. What interrupts what is done `first` may close it again."""
        with self._lock:
            if self._done.is_set():
                return False
            first()
            self._done.set()
        self.ledger.outcome, self.ledger.reason = outcome, reason
        self.ledger.total_s = round(self.elapsed, 3)
        return True

    def _tell(self) -> None:
        try:
            self._publish(self.ledger)
            self.record(self.ledger)
        finally:
            self._told.set()

    def _watch(self) -> None:
        if self._done.wait(max(0.0, self.remaining)):
            return
        reason = self.ledger.over
        if self._close("failed", reason):
            try:
                self._end_later(3 * GRACE_S)  # whatever hinders this thread now; all of its patience together is less
                ERR.write(f"kindling: {reason}\n{stacks()}")
                self._tell()
                self._spent(reason)
                ERR.drain()
            finally:
                self._abort(EXIT_CODE)

    def _disarm(self) -> None:
        self.ending.cancel()
        faulthandler.cancel_dump_traceback_later()

    def _end_later(self, seconds: float) -> None:
        if self._abort is os._exit:
            ends = self.ending.set(seconds)
            faulthandler.dump_traceback_later(seconds, exit=not ends, file=self._stderr)

    def _say_at_the_end(self) -> None:
        held = self.ledger.held
        self.ending.say(f"kindling: {held.reason}\n{held.line()}\n", f">&{STDERR}")
