"""What a worker makes of its receipt, which decides where KINDLING_PRECISION and KINDLING_COMPILE are both auto.

One that cannot be read, or that measured another revision, is told and ignored: no start fails for it. Without one,
`automatic` decides the precision.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from handler.catalog.precisions import PRECISIONS
from handler.catalog.spec import ModelSpec
from handler.core.errors import KindlingError
from handler.core.settings import Settings
from handler.model.hardware import Hardware
from handler.volume.receipts import Receipt, current
from handler.worker.memory import memory_plan
from handler.worker.sharing import host_share, shared_by


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


def automatic(
    spec: ModelSpec,
    hardware: Hardware,
    host_gb: float,
    offload: str = "auto",
) -> tuple[str, str]:
    """What `auto` means for `spec` without a receipt, and why.

    `hardware` has what it means for any model; `host_gb` and `offload` are those of `memory.memory_plan`.
    """
    has, fp8 = hardware.capability, PRECISIONS["fp8"]
    if has is None or spec.embedded:
        return hardware.precision, hardware.reason
    fast = has >= fp8.capability and spec.fp8_source
    plan = memory_plan(spec, hardware, host_gb=host_gb, offload=offload)
    if not fast and plan.fits and plan.mode != "blocks":
        return hardware.precision, hardware.reason
    better = replace(hardware, precision="fp8" if fast else "int8")
    if plan.fits and not (rounded := memory_plan(spec, better, host_gb=host_gb, offload=offload)).fits:
        return hardware.precision, f"{hardware.reason}; {better.precision} does not fit: {rounded.reason}"
    if fast:
        return "fp8", f"{hardware.name} computes in FP8, and {spec.id} is published in it ({spec.fp8_source})"
    return "int8", f"{hardware.precision} would have to stream the denoiser: {plan.reason}"


def decide(settings: Settings, spec: ModelSpec, hardware: Hardware, host_gb: float | None = None) -> Decision:
    """What the receipt, or `automatic`, makes of `settings` and `hardware`, which then tells why.

    `host_gb` is the memory of another machine's host, for which no receipt here holds; None on this machine.
    """
    here, hardware = host_gb is None, replace(hardware, shared=shared_by(settings))
    receipt, told = applicable(settings.volume, spec, hardware.identity or None) if here else (None, "")
    if receipt and settings.tp_size > 1 and PRECISIONS[receipt.winner.precision].quantised:
        told = f"receipt {receipt.number} ignored: several GPUs share text encoders, which its precision rounds"
        receipt = None
    followed = follow(settings, receipt)
    if followed is not settings:
        hardware = replace(hardware, precision=followed.precision, reason=told)
    elif settings.precision == "auto" and settings.tp_size == 1:  # what is rounded cannot be split so
        precision, reason = automatic(spec, hardware, host_share(settings, host_gb), settings.offload)
        hardware = replace(hardware, precision=precision, reason=reason)
    if receipt is None and told:
        hardware = replace(hardware, reason=f"{hardware.reason}; {told}")
    return Decision(followed, hardware, receipt)
