"""Show the receipts of optimize, or choose the one that workers follow."""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from handler.catalog.models import find
from handler.catalog.spec import ModelSpec
from handler.core.errors import InvalidValue
from handler.core.settings import Settings
from handler.model.hardware import expected
from handler.volume.receipts import Figures, Receipt, current_number, folder, listed, places, read, rollback, use
from handler.volume.room import require_folder
from handler.worker.chips import chips

ACTIONS = ("list", "show", "use", "rollback")
HEAD = f"  {'':<2}{'WHEN':<22}{'DEVICE':<24}{'WINNER':<20}{'PRIORITY':<12}{'P50 S':>8}{'PEAK GB':>9}{'PSNR DB':>9}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `receipts`."""
    parser.add_argument("action", choices=ACTIONS, help="list all; or, for this machine: show, use, go back one")
    parser.add_argument("number", nargs="?", type=int, help="which receipt to show or use (show: the current one)")
    parser.add_argument("--model", help="model id, alias or mode (default: $KINDLING_MODEL or spark)")


def run(options: argparse.Namespace) -> int:
    """Show receipts, or choose the one that workers follow; the exit code."""
    settings = Settings.from_env(model=options.model)
    spec, volume = find(settings.model), settings.volume
    require_folder(volume)
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
