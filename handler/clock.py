"""The cold-start clock: from the birth of the process, against one budget, phase by phase.

`Clock.arm` starts two watchdogs. A thread ends the process at the deadline with the phase named and every
stack dumped. If native code holds the GIL so that no thread can run, `faulthandler`, which needs no GIL, does
the same two seconds later; the phase is then the last one announced. Knows nothing about models.
"""

import faulthandler
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field

from handler.errors import BudgetExceeded

GRACE_S = 2.0
EXIT_CODE = 1
STDERR = 2  # the file descriptor: sys.stderr may be replaced, or busy in the thread that hangs


def process_age() -> float:
    """Seconds since the kernel started this process; from Python's start where /proc does not exist."""
    try:
        with open("/proc/self/stat") as stat, open("/proc/uptime") as uptime:
            born = int(stat.read().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
            return max(0.0, float(uptime.read().split()[0]) - born)
    except OSError:
        return time.process_time()


@dataclass(frozen=True, slots=True)
class Phase:
    """One timed part of the cold start, in seconds; `start_s` counts from the process's birth."""

    name: str
    start_s: float
    seconds: float


@dataclass(slots=True)
class Ledger:
    """Where the seconds of one cold start went. `outcome` is starting, ready or failed."""

    model: str = ""
    budget_s: float = 0.0
    outcome: str = "starting"
    reason: str = ""
    total_s: float = 0.0
    phases: list[Phase] = field(default_factory=list)

    def line(self) -> str:
        """The ledger as one JSON line."""
        return json.dumps({"cold_start": asdict(self)})


def print_ledger(ledger: Ledger) -> None:
    """Print the ledger as one JSON line on stderr."""
    print(ledger.line(), file=sys.__stderr__, flush=True)


class Clock:
    """Times the phases of one cold start and ends the process when the budget is spent.

    `announce(phase)` is called as each phase begins, `publish(ledger)` once at the end, by default as one JSON
    line on stderr; `abort` replaces the hard exit in tests.
    """

    def __init__(
        self,
        budget_s: float,
        age: Callable[[], float] = process_age,
        announce: Callable[[str], None] = lambda phase: None,
        publish: Callable[[Ledger], None] = print_ledger,
        abort: Callable[[int], None] = os._exit,
    ) -> None:
        self.ledger = Ledger(budget_s=budget_s)
        self._zero = time.monotonic() - age()
        self._announce, self._publish, self._abort = announce, publish, abort
        self._phase = "start"
        self._done = threading.Event()
        self._lock = threading.Lock()

    @property
    def elapsed(self) -> float:
        """Seconds since the process was born."""
        return time.monotonic() - self._zero

    @property
    def remaining(self) -> float:
        return self.ledger.budget_s - self.elapsed

    def arm(self) -> None:
        """Start both watchdogs; raises BudgetExceeded if the budget is already spent."""
        self.check()
        if self._abort is os._exit:
            faulthandler.dump_traceback_later(self.remaining + GRACE_S, exit=True, file=STDERR)
        threading.Thread(target=self._watch, name="cold-start-watchdog", daemon=True).start()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time the enclosed block as phase `name`, then check the budget."""
        self._phase, start = name, self.elapsed
        self._announce(name)
        yield
        self.ledger.phases.append(Phase(name, round(start, 3), round(self.elapsed - start, 3)))
        self.check()

    def check(self) -> None:
        """Raise BudgetExceeded once the budget is spent."""
        if self.remaining <= 0:
            raise BudgetExceeded(self._verdict())

    def finish(self, outcome: str, reason: str = "") -> bool:
        """Disarm and close the ledger; False if the watchdog closed it first."""
        with self._lock:
            if self._done.is_set():
                return False
            self._done.set()
        faulthandler.cancel_dump_traceback_later()
        self.ledger.outcome, self.ledger.reason = outcome, reason
        self.ledger.total_s = round(self.elapsed, 3)
        self._publish(self.ledger)
        return True

    def _verdict(self) -> str:
        return f"cold start exceeded its budget of {self.ledger.budget_s:g} s in phase '{self._phase}'"

    def _watch(self) -> None:
        if self._done.wait(max(0.0, self.remaining)):
            return
        reason = self._verdict()
        if self.finish("failed", reason):
            print(f"kindling: {reason}", file=sys.__stderr__, flush=True)
            faulthandler.dump_traceback(file=STDERR)
            self._abort(EXIT_CODE)
