"""Chips: what a worker runs, in a few words, each with what was measured of it."""

import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from handler.catalog.attention import KERNELS, NATIVE
from handler.catalog.precisions import PRECISIONS
from handler.catalog.spec import ModelSpec
from handler.core.errors import KindlingError
from handler.volume.receipts import Receipt, current

UNMEASURED = "not measured; measure it with: python -m handler optimize {model}"
SCHEDULERS = {"flow-match-euler": "FlowMatch", "dpm++": "DPM++", "euler": "Euler", "euler-a": "Euler a"}
log = logging.getLogger(__name__)


def chips(spec: ModelSpec, receipt: Receipt | None, facts: Mapping[str, str]) -> list[dict[str, str]]:
    """What a worker with these `facts` (`Worker.facts`; empty while it starts) runs, and what `receipt` has on it."""
    precision = facts.get("precision") or (receipt.winner.precision if receipt else "auto")
    compiled = facts["plan"] == "COMPILED" if facts else bool(receipt and receipt.winner.compiled)
    pictures, likeness, speed = _measured(receipt, precision, compiled) or [UNMEASURED.format(model=spec.id)] * 3
    kernel = facts.get("attention", NATIVE)
    label = PRECISIONS[precision].label if precision in PRECISIONS else precision.upper()
    rows = (
        ("steps", f"{spec.steps} step{'s' * (spec.steps > 1)}", pictures),
        ("guidance", f"gs {spec.guidance:g}", pictures),
        ("scheduler", SCHEDULERS.get(spec.schedulers[0], spec.schedulers[0]), pictures),
        ("precision", label, likeness),
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
