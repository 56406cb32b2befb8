"""What this worker has cost this month, what all workers of its volume have, and the cap on that.

Seconds count from the worker's birth, for that is what platforms bill, cold start and idling included. A thread of its
own writes and reads the files in spend/ (`bills.py`), so a request costs no I/O and a volume that hangs harms nobody; a
worker that is killed takes at most its last minute along. `state` says whose dollars are counted: on a volume that is
full or gone, not everybody's. A cap stops the drawing, not the billing of idle workers: those end when the platform
scales them to zero.
"""

import logging
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from handler.catalog.prices import Price, price_of
from handler.core.birth import Birth
from handler.core.errors import SpendCapReached
from handler.core.settings import Settings
from handler.engine.bills import Bills
from handler.worker.sharing import processes

INTERVAL_S = 60.0
UNKNOWN_S = 1.0  # between two looks while the GPU is not known yet: a worker over the cap should not draw for a minute
PATIENCE_S = 2.0
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether the cap lets this worker draw, and why."""

    outcome: Literal["OK", "UNPRICED", "ALERT", "REFUSE"]
    reason: str


@dataclass(frozen=True, slots=True)
class Others:
    """Dollars of the other workers in a month; `counted` says whose files that is."""

    month: str
    dollars: float
    counted: str


def judge(dollars: float | None, cap: float | None, action: str) -> Verdict:
    """Hold a month's `dollars` (None: no price is known) against `cap`; `action` is KINDLING_CAP_ACTION."""
    if cap is None:
        return Verdict("OK", "no KINDLING_MONTHLY_CAP is set")
    if dollars is None:
        return Verdict("UNPRICED", f"the cap of {cap:g} dollars cannot be held: the price of this worker is not known")
    if dollars < cap:
        return Verdict("OK", f"{dollars:.2f} of {cap:g} dollars are spent this month")
    spent = f"{dollars:.2f} dollars are spent this month, the cap is {cap:g}"
    if action == "refuse":
        return Verdict("REFUSE", f"{spent}; nothing is drawn until next month, or until KINDLING_MONTHLY_CAP is raised")
    return Verdict("ALERT", f"{spent}; KINDLING_CAP_ACTION=alert goes on drawing")


def seconds_this_month(age_s: float, now: datetime) -> float:
    """The part of a worker's age that falls into the month of `now`."""
    begun = now.replace(day=1, hour=0, minute=0, second=0, microsecond=0)
    return min(age_s, (now - begun).total_seconds())


class Meter:
    """Counts the dollars of the worker of this `birth`. `gpu` names its device as torch does, "" while nobody knows."""

    def __init__(
        self,
        settings: Settings,
        gpu: Callable[[], str],
        birth: Birth,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._settings, self._gpu, self.birth, self._now = settings, gpu, birth, now
        self._others = Others("", 0.0, "this process alone: the volume has not been read yet")
        self._bills = Bills(Path())
        self._told = "OK"
        self._quit = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to write and read, in a thread of its own."""
        self._quit = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(self._quit,), name="spend", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Write a last time, if the volume answers within `PATIENCE_S`. Before a snapshot too, and then `renew`."""
        self._quit.set()
        if self._thread:
            self._thread.join(PATIENCE_S)

    def renew(self) -> None:
        """This process was restored from a snapshot: from now on count another worker, as each of its clones does."""
        self.birth = Birth.anew()
        self.start()

    @property
    def price(self) -> Price:
        gpu, override = self._gpu(), self._settings.gpu_price
        if not gpu and override is None:
            return Price(None, "the GPU is not known yet")
        return price_of(gpu, self._settings.platform, override).times(processes(self._settings))

    @property
    def verdict(self) -> Verdict:
        return judge(self._dollars()[1], self._settings.monthly_cap, self._settings.cap_action)

    def require_budget(self) -> None:
        """Raise SpendCapReached where the cap is reached and refuses; no I/O."""
        if self.verdict.outcome == "REFUSE":
            raise SpendCapReached(
                "The operator's spend cap for this month is reached: nothing is drawn until it is raised or the month "
                "ends."
            )

    def state(self) -> dict[str, Any]:
        """All of it as health shows it; dollars are None where no price is known."""
        own, month = self._dollars()
        return {
            "month": self._month(),
            "dollars_this_process": own,
            "dollars_this_month": month,
            "counted": self._others.counted,
            "price": asdict(self.price),
            "cap": self._settings.monthly_cap,
            "verdict": asdict(self.verdict),
        }

    def tick(self) -> None:
        """Write this worker's file, read the others', say once when the cap is crossed; never raises OSError."""
        if not self._gpu():
            return
        own, _ = self._dollars()
        if own is not None:
            self._others = self._exchange(own)
        verdict = self.verdict
        if verdict.outcome not in ("OK", self._told):
            log.warning("spend: %s", verdict.reason)
        self._told = verdict.outcome

    def _run(self, quit_: threading.Event) -> None:
        self.tick()
        while not quit_.wait(INTERVAL_S if self._gpu() else UNKNOWN_S):
            self.tick()
        self.tick()

    def _month(self) -> str:
        return f"{self._now():%Y-%m}"

    def _dollars(self) -> tuple[float | None, float | None]:
        """This process's this month, and those of all that is counted."""
        if (rate := self.price.dollars_per_s) is None:
            return None, None
        own, others = rate * seconds_this_month(self.birth.age, self._now()), self._others
        return own, own + others.dollars * (others.month == self._month())

    def _exchange(self, own: float) -> Others:
        month, price = self._month(), self.price
        if (folder := self._settings.volume / "spend" / month) != self._bills.folder:
            self._bills = Bills(folder)
        facts = {"dollars": own, "gpu": self._gpu(), "dollars_per_s": price.dollars_per_s, "reason": price.reason}
        unwritten = ""
        try:
            self._bills.write(self.birth.identity, facts)
        except OSError as error:
            unwritten = f"the volume cannot be written ({error.strerror or error})"
        try:
            dollars = self._bills.dollars(without=self.birth.identity)
        except OSError as error:
            reason, before = unwritten or f"the volume cannot be read ({error.strerror or error})", self._others
            if before.month == month and before.dollars:
                return Others(month, before.dollars, f"this process and what others had cost before: {reason}")
            return Others(month, 0.0, f"this process alone: {reason}")
        unseen = f", but they cannot see what this one costs: {unwritten}" if unwritten else ""
        return Others(month, dollars, f"all workers here{self._missed()}{unseen}")

    def _missed(self) -> str:
        """Whose dollars are those of before, or none."""
        if not (unread := self._bills.unread):
            return ""
        name, why = next(iter(unread.items()))
        return f" but what {len(unread)} of them cost by now: {name} cannot be read ({why})"
