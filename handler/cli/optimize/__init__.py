"""Measure every way this machine can run a model; the best by a priority becomes the receipt that workers follow.

Swept: precision, and compiling. Never swept: steps, guidance and scheduler, which are yours. Each candidate runs in a
process of its own, the plainest first; what cannot run here, crashes or takes too long is told with its reason.
"""

import argparse
import json
import logging
import signal
import sys
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version

from handler.catalog.models import find
from handler.catalog.prices import price_of
from handler.catalog.spec import ModelSpec
from handler.cli.optimize import journal, plot
from handler.cli.optimize.pareto import LIMITS, PRIORITIES
from handler.cli.optimize.sweep import Progress, Sweep, Wishes, every_candidate, place, planned, sweep
from handler.cli.optimize.trial import Task, trial
from handler.core.errors import InvalidValue, SettingsError, VolumeFailed
from handler.core.settings import Settings
from handler.core.version import __version__
from handler.model.hardware import Hardware, detect
from handler.volume.receipts import Outcome, Receipt, folder, keep
from handler.volume.revisions import settled
from handler.volume.room import require_folder, writing
from handler.volume.sources import model_source

ROW = "{:<3}{:<22}{:>8}{:>8}{:>10}{:>9}{:>9}{:>11}{:>9}{:>8}{:>11}"
COLUMNS = ("p50_s", "p95_s", "images_per_s", "peak_gb", "cold_start_s", "compile_s", "psnr_db", "ssim", "dollars")
log = logging.getLogger(__name__)
HEADS = ("P50 S", "P95 S", "IMAGES/S", "PEAK GB", "START S", "COMPILE S", "PSNR DB", "SSIM", "$/IMAGE")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `optimize`."""
    parser.add_argument("model", nargs="?", help="model id, alias or mode (default: $KINDLING_MODEL or spark)")
    parser.add_argument("--priority", choices=PRIORITIES, default="latency", help="default: %(default)s")
    parser.add_argument("--max-latency", type=float, metavar="S", help="seconds a picture (p95) may take")
    parser.add_argument("--max-memory", type=float, metavar="GB", help="memory it may take")
    parser.add_argument("--min-quality", type=float, metavar="DB", help="likeness (PSNR) to the baseline it must have")
    parser.add_argument("--max-cost-per-image", type=float, metavar="USD", help="dollars a picture may cost")
    parser.add_argument(
        "--rounds",
        type=int,
        default=3,
        metavar="N",
        help="of 8 pictures, fewer if they are slow (default: 3)",
    )
    parser.add_argument("--limit", type=float, default=900, metavar="SECONDS", help="for each candidate (default: 900)")
    parser.add_argument("--candidates", default="", metavar="LIST", help="such as int8,fp8+compile (default: all)")
    parser.add_argument("--dry-run", action="store_true", help="say what would be measured, and what not")
    parser.add_argument("--candidate", help=argparse.SUPPRESS)


def run(options: argparse.Namespace) -> int:
    """Sweep and report; 1 if nothing keeps the limits."""
    settings = Settings.from_env(model=options.model)
    if options.candidate:
        print(json.dumps(asdict(trial(Task(**json.loads(options.candidate)), settings))))
        return 0
    limits = {name: bound for name in LIMITS if (bound := getattr(options, name)) is not None}
    wished = Wishes(options.priority, limits, options.rounds, options.limit, _names(options.candidates))
    spec, hardware = _checked(settings, wished)
    if options.dry_run:
        return _promise(planned(hardware, wished.candidates), options.json)
    progress: Progress = (
        (lambda line: None) if options.json else (lambda line: print(line, file=sys.stderr, flush=True))
    )
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # whoever stops the sweep stops its candidate
    try:
        found = sweep(settings, spec, hardware, wished, progress)
    except KeyboardInterrupt:
        progress("kindling: what was measured is kept; the same command goes on from there")
        raise
    if not options.json:
        print("\n".join(table(found)))
    receipt = _kept(found, settings, spec, hardware, wished) if found.choice.winner else None
    journal.close(place(settings, spec, hardware))
    _report(found, receipt, settings, options.json)
    return 0 if receipt else 1


def _names(text: str) -> tuple[str, ...]:
    known = [one.name for one in every_candidate()]
    names = tuple(name for name in text.replace(" ", "").split(",") if name)
    if unknown := [name for name in names if name not in known]:
        raise InvalidValue(f"There is no candidate '{unknown[0]}'; there are {', '.join(known)}.", "candidates")
    return names


def _checked(settings: Settings, wished: Wishes) -> tuple[ModelSpec, Hardware]:
    """Refuse, before an hour of measuring, what cannot end well."""
    if wished.rounds < 1 or wished.limit_s <= 0:
        raise InvalidValue("--rounds and --limit should be more than 0.", "rounds")
    if bad := [name for name, bound in wished.limits.items() if not 0 < bound < float("inf")]:
        raise InvalidValue(f"--{bad[0].replace('_', '-')} should be more than 0.", bad[0])
    require_folder(settings.volume)
    spec = settled(find(settings.model), settings.volume)
    model_source(spec, settings.volume)
    hardware = detect(settings.model_copy(update={"precision": "auto"}))
    price = price_of(hardware.name, settings.platform, settings.gpu_price)
    if "max_cost_per_image" in wished.limits and price.dollars_per_s is None:
        raise SettingsError(f"--max-cost-per-image: {price.reason}.", "KINDLING_GPU_PRICE")
    return spec, hardware


def _kept(found: Sweep, settings: Settings, spec: ModelSpec, hardware: Hardware, wished: Wishes) -> Receipt:
    """Leave the receipt, current from now on, with its plot."""
    import torch

    assert found.choice.winner
    versions = {"kindling": __version__, **{name: version(name) for name in ("torch", "diffusers")}}
    receipt = Receipt(
        model=spec.id,
        revision=spec.revision,
        device=hardware.identity,
        winner=found.choice.winner,
        outcomes=found.outcomes,
        reason=found.choice.reason,
        priority=wished.priority,
        limits=wished.limits,
        picture=f"{spec.size[0]}x{spec.size[1]} in {spec.steps} steps",
        price=price_of(hardware.name, settings.platform, settings.gpu_price).reason,
        versions=versions | {"cuda": torch.version.cuda or "none"},
        command=" ".join(["python -m handler", *sys.argv[1:]]),
        when=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    kept = keep(receipt, settings.volume)
    chart = folder(settings.volume, spec.id, hardware.identity) / f"{kept.number}.png"
    title = f"{spec.id} on {hardware.name}: {receipt.picture}"
    try:
        with writing(chart):
            plot.scatter(found.measured, found.choice.front, receipt.winner, chart, title)
    except VolumeFailed as error:  # the receipt counts
        log.warning("the receipt has no plot: %s", error.message)
    return kept


def _promise(plan: list[Outcome], as_json: bool) -> int:
    if as_json:
        print(json.dumps({"candidates": [asdict(one) | {"name": one.candidate.name} for one in plan]}))
        return 0
    for one in plan:
        print(f"{'skip' if one.reason else 'measure':<9}{one.candidate.name:<22}{one.reason}")
    return 0


def table(found: Sweep) -> list[str]:
    """The sweep for people: * the winner, + what nothing beats in everything."""
    rows = [ROW.format("", "CANDIDATE", *HEADS)]
    for one in found.outcomes:
        mark = "*" if one.candidate == found.choice.winner else "+" if one.candidate in found.choice.front else ""
        if one.figures:
            values = asdict(one.figures)
            rows.append(ROW.format(mark, one.candidate.name, *(_cell(name, values[name]) for name in COLUMNS)))
        else:
            rows.append(f"{mark:<3}{one.candidate.name:<22}{one.status}: {one.reason}")
    if found.noise_db is not None:
        baseline = found.outcomes[0].candidate.name
        rows.append(f"   noise: {baseline} compiled is {found.noise_db:.1f} dB like {baseline} eager")
    rows += [f"   {one.name}: refused, {why}" for one, why in found.choice.refused.items()]
    return [*rows, "* the winner   + none is faster, smaller and more like the baseline at once"]


def _cell(name: str, value: float | None) -> str:
    return "-" if value is None else f"{value:.6f}" if name == "dollars" else f"{value:.{1 if 'start' in name else 3}f}"


def _report(found: Sweep, receipt: Receipt | None, settings: Settings, as_json: bool) -> None:
    choice = found.choice
    if as_json:
        body = {
            "winner": choice.winner.name if choice.winner else None,
            "reason": choice.reason,
            "pareto": sorted(one.name for one in choice.front),
            "refused": {one.name: why for one, why in choice.refused.items()},
            "outcomes": [asdict(one) for one in found.outcomes],
            "receipt": asdict(receipt) if receipt else None,
        }
        print(json.dumps(body))
    elif receipt and choice.winner:
        kept = folder(settings.volume, receipt.model, receipt.device) / f"{receipt.number}.json"
        print(f"{choice.winner.name}: {choice.reason}\nreceipt {receipt.number}, now current: {kept}")
    if receipt is None:
        print(f"kindling: no receipt: {choice.reason}", file=sys.stderr)
