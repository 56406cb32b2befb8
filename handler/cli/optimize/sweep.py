"""A sweep: every candidate measured in a process of its own, then the choice. A failure of one is its outcome."""

import json
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from handler.catalog.precisions import PRECISIONS, refusal
from handler.catalog.prices import per_image, price_of
from handler.catalog.spec import ModelSpec
from handler.cli.optimize.attempt import attempt, likeness
from handler.cli.optimize.journal import Journal
from handler.cli.optimize.pareto import Selection, select
from handler.cli.optimize.trial import Task
from handler.core.errors import KindlingError
from handler.core.settings import Settings
from handler.core.version import __version__
from handler.model.hardware import Hardware
from handler.volume.receipts import Candidate, Figures, Outcome, folder

Progress = Callable[[str], None]
Attempt = Callable[[list[str], float], dict[str, Any]]
DECIDING = ("attention", "offload", "device", "metadata")  # settings that a candidate runs with as they are


@dataclass(frozen=True, slots=True)
class Wishes:
    """What was asked of a sweep; no `candidates` means all, `limit_s` is for each."""

    priority: str = "latency"
    limits: Mapping[str, float] = field(default_factory=dict)
    rounds: int = 3
    limit_s: float = 900.0
    candidates: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Sweep:
    """What came of it."""

    outcomes: tuple[Outcome, ...]
    choice: Selection

    @property
    def measured(self) -> dict[Candidate, Figures]:
        return {one.candidate: one.figures for one in self.outcomes if one.figures}

    @property
    def noise_db(self) -> float | None:
        """How like the eager baseline's the compiled baseline's pictures are: no precision need do better."""
        figures = self.measured.get(replace(self.outcomes[0].candidate, compiled=True))
        return figures.psnr_db if figures else None


def every_candidate() -> list[Candidate]:
    """All there could be, whatever this machine can do."""
    return [Candidate(precision, compiled) for precision in PRECISIONS for compiled in (False, True)]


def planned(hardware: Hardware, names: tuple[str, ...]) -> list[Outcome]:
    """Every candidate, the baseline (16 bit on a GPU, eager) first; "skipped" says why not here."""
    baseline = Candidate(hardware.precision, False)
    wanted = [one for one in every_candidate() if one == baseline or not names or one.name in names]

    def fate(one: Candidate) -> Outcome:
        row = PRECISIONS[one.precision]
        emulated = "a CPU only emulates it" if row.emulated and hardware.device == "cpu" else ""
        why = emulated or refusal(row, hardware.device, hardware.name, hardware.capability)
        return Outcome(one, "skipped" if why else "measured", reason=why)

    return [fate(one) for one in sorted(wanted, key=lambda one: one != baseline)]


def sweep(
    settings: Settings,
    spec: ModelSpec,
    hardware: Hardware,
    wished: Wishes,
    progress: Progress,
    attempted: Attempt = attempt,
) -> Sweep:
    """Measure each candidate in its own process and choose; a failure of one is its outcome.

    What is measured is kept at `place` until that is closed: after an interruption it is not measured again.
    """
    plan = planned(hardware, wished.candidates)
    count, number, outcomes = sum(one.status == "measured" for one in plan), 0, []
    journal = Journal(place(settings, spec, hardware), _facts(settings, spec, hardware, wished))
    for outcome in plan:
        if outcome.status == "measured":
            one, number, begun = outcome.candidate, number + 1, time.monotonic()
            progress(f"kindling: {number} of {count}: {one.name} ...")
            if known := journal.known(one):
                outcome, took = known, "before"
            else:
                command = _command(one, settings, spec, wished, journal.begin(one))
                outcome = _outcome(one, command, wished.limit_s, attempted)
                journal.keep(outcome)
                took = f"{time.monotonic() - begun:.0f} s"
            baseline = journal.pictures(plan[0].candidate)
            outcome = _judged(outcome, journal.pictures(one), baseline, settings, hardware)
            progress(f"  {took}: {_told(outcome)}")
        outcomes.append(outcome)
    found = Sweep(tuple(outcomes), Selection(None, "", frozenset(), {}))
    return replace(found, choice=select(found.measured, wished.priority, wished.limits))


def place(settings: Settings, spec: ModelSpec, hardware: Hardware) -> Path:
    """Where the journal of a sweep is."""
    return settings.volume / "sweeps" / spec.id / folder(settings.volume, spec.id, hardware.identity).name


def _facts(settings: Settings, spec: ModelSpec, hardware: Hardware, wished: Wishes) -> dict[str, Any]:
    """All that a measurement depends on but its candidate."""
    values = settings.model_dump(mode="json")
    return {
        "revision": spec.revision,
        "hardware": [hardware.name, hardware.precision],
        "rounds": wished.rounds,
        "limit_s": wished.limit_s,
        "settings": {name: values[name] for name in DECIDING},
        "versions": {"kindling": __version__, **{name: version(name) for name in ("torch", "diffusers")}},
    }


def _command(one: Candidate, settings: Settings, spec: ModelSpec, wished: Wishes, pictures: Path) -> list[str]:
    volume, device = str(settings.volume), settings.device
    task = Task(one.precision, one.compiled, wished.rounds, wished.limit_s, volume, device, str(pictures))
    return [sys.executable, "-m", "handler", "optimize", spec.id, "--candidate", json.dumps(asdict(task))]


def _outcome(one: Candidate, command: list[str], limit_s: float, attempted: Attempt) -> Outcome:
    try:
        return Outcome(one, "measured", Figures(**attempted(command, limit_s)))
    except (KindlingError, ValueError, TypeError, IndexError) as error:
        return Outcome(one, "failed", reason=str(error))


def _judged(outcome: Outcome, pictures: Path, baseline: Path, settings: Settings, hardware: Hardware) -> Outcome:
    """With likeness to the baseline, if that drew, and with its price, if there is one."""
    figures = outcome.figures
    if figures is None:
        return outcome
    psnr_db, ssim = likeness(pictures, baseline)
    dollars = per_image(1 / figures.images_per_s, price_of(hardware.name, settings.platform, settings.gpu_price))
    return replace(outcome, figures=replace(figures, psnr_db=psnr_db, ssim=ssim, dollars=dollars))


def _told(outcome: Outcome) -> str:
    figures = outcome.figures
    return f"p50 {figures.p50_s:.3f} s" if figures else f"{outcome.status}: {outcome.reason}"
