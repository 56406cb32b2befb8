"""How long pictures take, by what the last ones took: `fixed_s` each, and `work_s` for each unit of their work.

Work is in pictures of the model's own size and steps. A line is put through the last runs by Theil and Sen: the median
of all slopes, so that a cold run, or a busy neighbour's, does not move it. Of several pictures that were drawn at once
each took its share, so a worker that batches counts with what batching gains.

While all runs were about one size, nothing tells the two costs apart: another size takes at least as long as if all
were fixed, and at most as long as if all grew with its work, or the other way round. The estimate is then the geometric
mean of both: whichever is true, it is wrong by the least factor, and one picture of the other size ends the guess.
"""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import combinations
from statistics import median_low as median  # what falls out of the row is slow, so of an even count the quicker
from typing import Self

KEPT = 16  # runs
APART = 1.5  # times the work: runs that differ by less tell more of noise than of what work costs
GUESSED = (
    0.5  # the power of the work by which seconds grow, where only one size is known: 0 not at all, 1 in proportion
)


@dataclass(frozen=True, slots=True)
class Run:
    """What a picture took, one of those drawn at once: its `work`, and its share of the `seconds`."""

    work: float
    seconds: float

    @property
    def kind(self) -> int:
        """Equal in runs of about one size."""
        return round(math.log(self.work, APART))


@dataclass(frozen=True, slots=True)
class Pace:
    """Seconds of a picture: `fixed_s`, and `work_s` times its work to the power of `growth`. The newest run is last."""

    runs: tuple[Run, ...] = ()
    fixed_s: float = 0.0
    work_s: float = 0.0
    growth: float = 1.0

    @classmethod
    def of(cls, runs: tuple[Run, ...]) -> Self:
        """Fitted to `runs`, the newest last; at least one."""
        return cls(runs, *_fitted(runs))

    def after(self, works: Iterable[float], seconds: float) -> Self:
        """Fitted to one more run, of pictures of so much work each, which took so long together.

        Of too many the oldest of the commonest size goes: what a rare size takes is not forgotten over many others.
        """
        each = [*works]
        runs = (*self.runs, Run(sum(each) / len(each), seconds / len(each)))
        if len(runs) > KEPT:
            often = Counter(run.kind for run in runs)
            oldest = max(runs, key=lambda run: often[run.kind])  # the first of those that are as common
            runs = tuple(run for run in runs if run is not oldest)
        return self.of(runs)

    def seconds(self, works: Iterable[float]) -> float | None:
        """How long pictures of so much work each take, one after another; None before the first run."""
        if not self.runs:
            return None
        return sum([self.fixed_s + self.work_s * math.pow(work, self.growth) for work in works])

    def among(self, workers: int) -> Self:
        """Of what waits for so many workers that are alike: each takes its share."""
        return replace(self, fixed_s=self.fixed_s / workers, work_s=self.work_s / workers)


def _fitted(runs: tuple[Run, ...]) -> tuple[float, float, float]:
    """What is fixed, what a unit of work costs, and how that grows; none is negative."""
    pairs = (sorted(pair, key=lambda run: run.work) for pair in combinations(runs, 2))
    slopes = [(b.seconds - a.seconds) / (b.work - a.work) for a, b in pairs if b.work >= APART * a.work]
    if not slopes:
        return 0.0, median(run.seconds / run.work**GUESSED for run in runs), GUESSED
    work_s = max(0.0, median(slopes))
    fixed_s = median(run.seconds - work_s * run.work for run in runs)
    if fixed_s < 0:  # more than in proportion, which no line from nothing on follows
        return 0.0, median(run.seconds / run.work for run in runs), 1.0
    return fixed_s, work_s, 1.0
