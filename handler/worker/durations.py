"""How long the phases of past cold starts took, for whoever plans one: what the records that `boots.py` keeps tell."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Self

from handler.core.errors import VolumeFailed
from handler.worker.boots import KEPT, records
from handler.worker.clock import OVER, Ledger

LOOKED = 10  # starts that had a phase tell how long it takes
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Took:
    """One phase of one start, in seconds; if not `ended`, the start spent its budget in it, so it takes more."""

    model: str
    device: str
    precision: str
    phase: str
    seconds: float
    ended: bool = True


@dataclass(frozen=True, slots=True)
class Durations:
    """What is remembered, the newest first."""

    took: tuple[Took, ...] = ()

    @classmethod
    def on(cls, volume: Path) -> Self:
        """Of the starts recorded there; nothing, which is told, if it cannot be read: no start fails for that."""
        try:
            return cls(tuple(one for record in islice(records(volume), KEPT) for one in took(record.ledger)))
        except VolumeFailed as error:
            log.warning("nothing is known of past starts: %s", error.message)
            return cls()

    def longest(self, phase: str, model: str, device: str, precision: str, assumed: float) -> float | None:
        """The longest that `phase` took in the last `LOOKED` starts that had it, in seconds; None if that is not known.

        Only those of this model on this device in this precision count. Where it never ended, it is known to take
        longer than `assumed`, or nothing is.
        """
        wanted = (model, device, precision, phase)
        alike = [one for one in self.took if (one.model, one.device, one.precision, one.phase) == wanted][:LOOKED]
        longest = max((one.seconds for one in alike), default=0.0)
        return longest if any(one.ended for one in alike) or longest > assumed else None


def took(ledger: Ledger) -> Iterator[Took]:
    """What one start tells: nothing if its compiling failed, for that may have ended early."""
    if ledger.compile_failure:
        return
    start = ledger.model, ledger.device, ledger.precision
    for phase in ledger.phases:
        yield Took(*start, phase.name, phase.seconds)
    if ledger.outcome == "failed" and OVER in ledger.reason:
        begun = max((phase.start_s + phase.seconds for phase in ledger.phases), default=0.0)
        yield Took(*start, ledger.phase, max(0.0, ledger.total_s - begun), ended=False)
