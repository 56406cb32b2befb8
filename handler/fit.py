"""Whether a model fits the memory of a device: an estimate with its arithmetic, made before anything is loaded."""

import math
from dataclasses import dataclass

from handler.catalog import MODELS
from handler.errors import DoesNotFit
from handler.hardware import Hardware
from handler.spec import ModelSpec

NONE = "No model of the catalogue fits."
WIDTH = {"fp32": 4, "bf16": 2, "fp16": 2}  # bytes a parameter takes


@dataclass(frozen=True, slots=True)
class Fit:
    """The verdict on one model: GB it needs, and how that was reckoned."""

    fits: bool
    needs_gb: float
    reason: str


def fit(spec: ModelSpec, hardware: Hardware, stored_gb: float = math.inf) -> Fit:
    """Whether `spec` fits; `stored_gb` is how much its weight files have, if they are there."""
    width, count = WIDTH[hardware.precision], (spec.parameters + spec.other_parameters) / 1e9
    weights = min(count * width, stored_gb * width / 2)
    needs = weights + spec.work_gb
    told = f"{count:.3g}B parameters x {width} bytes" if weights == count * width else f"{weights:.3g} GB of weights"
    reason = (
        f"{told} + {spec.work_gb:g} GB to work = {needs:.1f} GB, of {hardware.memory_gb:.1f} GB on the {hardware.name}"
    )
    return Fit(needs <= hardware.memory_gb, needs, reason)


def require(spec: ModelSpec, hardware: Hardware, stored_gb: float) -> None:
    """DoesNotFit, with the arithmetic and the largest model that does fit, rather than running out of memory."""
    found = fit(spec, hardware, stored_gb)
    if not found.fits:
        raise DoesNotFit(f"{spec.id} does not fit at {hardware.precision}: {found.reason}. {nearest(hardware)}")


def largest_below(free_gb: float) -> str:
    """The largest model whose files, at two bytes a parameter, take less than `free_gb` of disk; as a sentence."""
    sizes = {spec.id: (spec.parameters + spec.other_parameters) * 2 / 1e9 for spec in MODELS.values()}
    best = max((model for model in sizes if sizes[model] < free_gb), key=lambda model: sizes[model], default="")
    return f"The largest that fits there is {best} ({sizes[best]:.3g} GB)." if best else NONE


def nearest(hardware: Hardware) -> str:
    """The largest model that fits, as a sentence."""
    fitting = [spec for spec in MODELS.values() if fit(spec, hardware).fits]
    if not fitting:
        return NONE
    best = max(fitting, key=lambda spec: fit(spec, hardware).needs_gb)
    return f"The largest that fits is {best.id}."
