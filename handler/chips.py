"""Chips: what a worker runs, in a few words, each with what was measured of it; and the verb that shows receipts."""

import argparse
import json
import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from handler.catalog import find
from handler.errors import InvalidValue, KindlingError
from handler.hardware import expected
from handler.kernels import KERNELS, NATIVE
from handler.receipts import Figures, Receipt, current, current_number, folder, listed, places, read, rollback, use
from handler.settings import Settings
from handler.spec import ModelSpec

UNMEASURED = "not measured; measure it with: python -m handler optimize {model}"
SCHEDULERS = {"flow-match-euler": "FlowMatch", "dpm++": "DPM++", "euler": "Euler", "euler-a": "Euler a"}
PRECISIONS = {
    "fp8": "FP8 dynamic",
    "fp8-tensor": "FP8 dynamic, one scale",
    "int8": "INT8 weights",
    "int8-dynamic": "INT8 dynamic",
    "mxfp8": "MXFP8 dynamic",
    "nvfp4": "NVFP4 dynamic",
}
log = logging.getLogger(__name__)
ACTIONS = ("list", "show", "use", "rollback")
HEAD = f"  {'':<2}{'WHEN':<22}{'DEVICE':<24}{'WINNER':<20}{'PRIORITY':<12}{'P50 S':>8}{'PEAK GB':>9}{'PSNR DB':>9}"


def chips(spec: ModelSpec, receipt: Receipt | None, facts: Mapping[str, str]) -> list[dict[str, str]]:
    """What a worker with these `facts` (`Worker.facts`; empty while it starts) runs, and what `receipt` has on it."""
    precision = facts.get("precision") or (receipt.winner.precision if receipt else "auto")
    compiled = facts["plan"] == "COMPILED" if facts else bool(receipt and receipt.winner.compiled)
    pictures, likeness, speed = _measured(receipt, precision, compiled) or [UNMEASURED.format(model=spec.id)] * 3
    kernel = facts.get("attention", NATIVE)
    rows = (
        ("steps", f"{spec.steps} step{'s' * (spec.steps > 1)}", pictures),
        ("guidance", f"gs {spec.guidance:g}", pictures),
        ("scheduler", SCHEDULERS.get(spec.schedulers[0], spec.schedulers[0]), pictures),
        ("precision", PRECISIONS.get(precision, precision.upper()), likeness),
        ("compile", "compiled" if compiled else "eager", speed),
        *([("attention", KERNELS[kernel].name, speed)] if kernel != NATIVE else []),
    )
    return [dict(zip(("label", "value", "measured"), row, strict=True)) for row in rows]


def _measured(receipt: Receipt | None, precision: str, compiled: bool) -> list[str] | None:
    """How pictures were measured, what the precision costs in likeness, what compiling gains; None if nobody did."""
    figures = receipt.of(precision, compiled) if receipt else None
    if receipt is None or figures is None:
        return None
    baseline, other = receipt.outcomes[0].candidate.name, receipt.of(precision, not compiled)
    alike = "" if figures.psnr_db is None else f"; {figures.psnr_db:.1f} dB and SSIM {figures.ssim:.3f} to {baseline}"
    against = f", {other.p50_s:.3f} s {'eager' if compiled else 'compiled'}" if other else ""
    return [
        f"{figures.pictures} pictures, {receipt.picture}: p50 {figures.p50_s:.3f} s, p95 {figures.p95_s:.3f} s",
        f"{figures.peak_gb:.2f} GB at most{alike}",
        f"p50 {figures.p50_s:.3f} s{against}",
    ]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `receipts`."""
    parser.add_argument("action", choices=ACTIONS, help="list all; or, for this machine: show, use, go back one")
    parser.add_argument("number", nargs="?", type=int, help="which receipt to show or use (show: the current one)")
    parser.add_argument("--model", help="model id, alias or mode (default: $KINDLING_MODEL or spark)")


def run(options: argparse.Namespace) -> int:
    """Show receipts, or choose the one that workers follow; the exit code."""
    settings = Settings.from_env(model=options.model)
    spec, volume = find(settings.model), settings.volume
    if options.action == "list":
        return _list(volume, spec.id, options.json)
    place = folder(volume, spec.id, expected(settings).identity or None)
    chosen = _chosen(options.action, place, options.number)
    print(json.dumps({"receipt": asdict(chosen)}) if options.json else "\n".join(lines(spec, chosen, options.action)))
    return 0


def _chosen(action: str, place: Path, number: int | None) -> Receipt:
    if action == "rollback":
        return rollback(place)
    if action == "use" and number is None:
        raise InvalidValue("Say which receipt to use, by its number; 'receipts list' shows them.", "number")
    wanted = current_number(place) if number is None else number
    return (read if action == "show" else use)(place, wanted or 0)


def _list(volume: Path, model: str, as_json: bool) -> int:
    home = volume / "receipts" / model
    rows = [(receipt, current_number(place) == receipt.number) for place in places(home) for receipt in listed(place)]
    if as_json:
        print(json.dumps({"model": model, "receipts": [asdict(r) | {"current": now} for r, now in rows]}))
        return 0
    print(f"{model}: {len(rows)} receipts in {home}")
    if rows:
        print("\n".join([HEAD, *(_row(receipt, now) for receipt, now in rows)]))
    return 0


def _row(receipt: Receipt, now: bool) -> str:
    figures = receipt.figures
    alike = "-" if figures.psnr_db is None else f"{figures.psnr_db:.1f}"
    return (
        f"{'>' if now else ' '} {receipt.number:<2}{receipt.when[:19]:<22}{receipt.device:<24}{receipt.winner.name:<20}"
        f"{receipt.priority:<12}{figures.p50_s:>8.3f}{figures.peak_gb:>9.2f}{alike:>9}"
    )


def lines(spec: ModelSpec, receipt: Receipt, action: str) -> list[str]:
    """One receipt for people."""
    winner = receipt.winner
    facts = {"precision": winner.precision, "plan": "COMPILED" if winner.compiled else "EAGER"}
    found = chips(spec, receipt, facts)
    dollars = receipt.figures.dollars
    price = receipt.price if dollars is None else f"{dollars:.6f} dollars, {receipt.price}"
    return [
        f"{receipt.model} on {receipt.device}, {receipt.told}{'' if action == 'show' else '; workers now follow it'}",
        " / ".join(chip["value"] for chip in found),
        *(f"  {chip['label']:<10} {chip['measured']}" for chip in found[2:]),
        f"  {'at once':<10} {_at_once(receipt.figures)}",
        f"  {'why':<10} {receipt.reason}",
        f"  {'a picture':<10} {price}",
        *(f"  {o.status:<10} {o.candidate.name}: {o.reason}" for o in receipt.outcomes if o.reason),
        f"  {'command':<10} {receipt.command}",
    ]


def _at_once(figures: Figures) -> str:
    """What drawing several pictures at once gains, by size."""
    told = (
        f"{size} {', '.join(f'{count}: {times:.2f}' for count, times in rows.items())}"
        for size, rows in figures.batches.items()
    )
    return f"times the pictures a second: {'; '.join(told)}" if figures.batches else "not measured"


def answer(
    spec: ModelSpec, receipt: Receipt | None, facts: Mapping[str, str], reason: str = "", failure: str = ""
) -> dict[str, Any]:
    """The body of GET /v1/receipt: what a worker with these `facts` runs, and the receipt it found when it started.

    `reason` says why in this precision, `failure` why it could not be compiled, if so.
    """
    kept = asdict(receipt) if receipt else None
    body: dict[str, Any] = {"chips": chips(spec, receipt, facts), "reason": reason, "receipt": kept}
    body |= {"compile_failure": failure} if failure else {}
    how = f"python -m handler optimize {spec.id}" if facts else "This worker is still starting."
    return body if receipt else body | {"how": how}


def dollars_of(volume: Path, model: str, device: str) -> float | None:
    """What a picture costs by the current receipt; None without one that can be read."""
    try:
        receipt = current(volume, model, device)
    except KindlingError as error:
        log.warning("what a picture costs is not known: %s", error.message)
        return None
    return receipt.figures.dollars if receipt else None
