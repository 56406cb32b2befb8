"""Which candidate wins: limits first, then what no other beats in everything, then the priority. Pure functions."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from handler.volume.receipts import Candidate, Figures

NOISE = 1.02  # candidates this close in what is asked for are equal; the one more like the baseline wins
SAME_DB = 99.0  # pictures without any difference; real ones stay below
PRIORITIES: Mapping[str, Callable[[Figures], float]] = {
    "latency": lambda f: f.p50_s,
    "throughput": lambda f: 1 / f.images_per_s,
    "cost": lambda f: 1 / f.images_per_s,  # one device costs the same each second
    "memory": lambda f: f.peak_gb,
    "balanced": lambda f: f.p50_s * f.peak_gb,
}


@dataclass(frozen=True, slots=True)
class Limit:
    """What one limit holds against its bound: at most, or at least."""

    field: str
    told: str
    least: bool = False

    def broken(self, figures: Figures, bound: float) -> tuple[float, str]:
        """How far `figures` miss it, relatively, and in words; 0 if they do not."""
        value = getattr(figures, self.field)
        side = "least" if self.least else "most"
        if value is None:
            return float("inf"), f"{self.told.split(' {')[0]} was not measured"
        miss = bound - value if self.least else value - bound
        if miss <= 0:
            return 0.0, ""
        return miss / bound, f"{self.told.format(f'{value:.4g}')} misses at {side} {bound:g} by {miss:.3g}"


LIMITS: Mapping[str, Limit] = {
    "max_latency": Limit("p95_s", "p95 {} s"),
    "max_memory": Limit("peak_gb", "memory {} GB"),
    "min_quality": Limit("psnr_db", "likeness {} dB", least=True),
    "max_cost_per_image": Limit("dollars", "a picture's price {} dollars"),
}


@dataclass(frozen=True, slots=True)
class Selection:
    """The winner, or None, and why; `front` cannot be beaten in everything, `refused` break a limit."""

    winner: Candidate | None
    reason: str
    front: frozenset[Candidate]
    refused: Mapping[Candidate, str]


def pareto(measured: Mapping[Candidate, Figures]) -> frozenset[Candidate]:
    """Those that no other beats: as fast, as small and as like the baseline, and better in one of these."""
    points = {one: (f.p50_s, f.peak_gb, -(f.psnr_db or 0.0)) for one, f in measured.items()}
    return frozenset(
        one
        for one, mine in points.items()
        if not any(all(b <= m for b, m in zip(beats, mine, strict=True)) and beats != mine for beats in points.values())
    )


def select(measured: Mapping[Candidate, Figures], priority: str, limits: Mapping[str, float]) -> Selection:
    """The best by `priority` of those that keep all `limits`, a bound for each name."""
    misses = {one: [LIMITS[name].broken(figures, bound) for name, bound in limits.items()] for one, figures in
              measured.items()}  # fmt: skip
    refused = {
        one: "; ".join(why for _, why in found if why) for one, found in misses.items() if any(m for m, _ in found)
    }
    admitted = {one: figures for one, figures in measured.items() if one not in refused}
    if not measured:
        return Selection(None, "nothing could be measured", frozenset(), {})
    if not admitted:
        nearest = min(refused, key=lambda one: sum(miss for miss, _ in misses[one]))
        why = f"nothing keeps the limits; {nearest.name} is nearest: {refused[nearest]}"
        return Selection(None, why, pareto(measured), refused)
    score = PRIORITIES[priority]
    front = pareto(admitted)
    best = min(score(measured[one]) for one in front)
    close = [one for one in front if score(measured[one]) <= best * NOISE]
    winner = max(close, key=lambda one: (measured[one].psnr_db or 0.0, -score(measured[one]), one.name))
    return Selection(winner, _praise(winner, measured, priority, len(close)), pareto(measured), refused)


def _praise(winner: Candidate, measured: Mapping[Candidate, Figures], priority: str, close: int) -> str:
    baseline, figures = next(iter(measured)), measured[winner]
    told = f"best by {priority}: p50 {figures.p50_s:.3f} s, {figures.peak_gb:.2f} GB"
    if winner != baseline:
        first = measured[baseline]
        told += f", against {first.p50_s:.3f} s, {first.peak_gb:.2f} GB of {baseline.name}"
    tie = f"; {close} are within {NOISE - 1:.0%} of the best, and of these it is most like the baseline"
    return told + tie * (close > 1)
