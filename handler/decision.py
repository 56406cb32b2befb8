"""What a worker makes of its receipt, which decides where KINDLING_PRECISION and KINDLING_COMPILE are both auto.

One that cannot be read, or that measured another revision, is told and ignored: no start fails for it.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from handler.errors import KindlingError
from handler.hardware import Hardware, expected_name, expected_precision
from handler.receipts import Receipt, current
from handler.settings import Settings
from handler.spec import ModelSpec


def applicable(volume: Path, spec: ModelSpec, device: str | None) -> tuple[Receipt | None, str]:
    """The receipt that holds for a worker, and what to tell about it: nothing where there is none."""
    try:
        receipt = current(volume, spec.id, device)
    except KindlingError as error:
        return None, f"receipt ignored: {error.message}"
    if receipt and receipt.revision != spec.revision:
        return None, f"receipt {receipt.number} ignored: it measured revision {receipt.revision}, not {spec.revision}"
    return receipt, receipt.told if receipt else ""


@dataclass(frozen=True, slots=True)
class Decision:
    """What a worker runs on and with, and the receipt for it, followed or not."""

    settings: Settings
    hardware: Hardware
    receipt: Receipt | None


def follow(settings: Settings, receipt: Receipt | None) -> Settings:
    """`settings` as `receipt` decides them; the same where they decide for themselves, or there is none."""
    if receipt is None or (settings.precision, settings.compile) != ("auto", "auto"):
        return settings
    decided: dict[str, Any] = {
        "precision": receipt.winner.precision,
        "compile": "on" if receipt.winner.compiled else "off",
    }
    return settings.model_copy(update=decided)


def expect(settings: Settings, spec: ModelSpec) -> str:
    """The precision that `decide` will most likely give, told without torch: weights are read meanwhile."""
    receipt, _ = applicable(settings.volume, spec, expected_name(settings))
    return expected_precision(follow(settings, receipt))


def decide(settings: Settings, spec: ModelSpec, hardware: Hardware) -> Decision:
    """What the receipt makes of `settings` and the detected `hardware`, which then tells why."""
    receipt, told = applicable(settings.volume, spec, hardware.name)
    followed = follow(settings, receipt)
    if followed is not settings:
        hardware = replace(hardware, precision=followed.precision, reason=told)
    elif receipt is None and told:
        hardware = replace(hardware, reason=f"{hardware.reason}; {told}")
    return Decision(followed, hardware, receipt)
