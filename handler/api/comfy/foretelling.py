"""How much memory and time pictures will take, each with what that rests on: a receipt, past starts, or arithmetic."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import islice

from handler.api.comfy.report import Memory, Time
from handler.catalog.gpus import Gpu, gpu_named
from handler.catalog.spec import ModelSpec
from handler.core.errors import KindlingError, VolumeFailed
from handler.core.request import ImageRequest
from handler.core.settings import Settings
from handler.model.hardware import Hardware
from handler.volume.receipts import Figures, Receipt, current_number, places, read
from handler.worker.boots import KEPT, records
from handler.worker.outlook import Outlook, outlook
from handler.worker.renting import SLOW

# Samplers that ask the model twice in a step (k-diffusion's second-order ones).
TWICE = ("heun", "dpm_2", "dpm_2_ancestral", "dpmpp_sde", "dpmpp_sde_gpu", "dpmpp_2s_ancestral")


@dataclass(frozen=True, slots=True)
class Machine:
    """Where pictures would be drawn: this machine, or a GPU of the table on a host with as much memory as it needs.

    `running` is the receipt that a worker found which serves here already.
    """

    where: Hardware | Gpu
    running: Receipt | None = None

    def outlook(self, settings: Settings, spec: ModelSpec) -> Outlook:
        """What a worker of `spec` will do there."""
        if isinstance(self.where, Gpu):
            host_gb = max((rental.host_gb for rental in self.where.rentals.values()), default=float("inf"))
            return outlook(settings, spec, self.where, host_gb)
        return outlook(settings, spec, self.where)


def receipt_of(machine: Machine, seen: Outlook) -> Receipt | None:
    """What was measured there of this model: for a GPU of the table, by any worker of this volume."""
    if machine.running and machine.running.model == seen.spec.id:
        return machine.running
    if not isinstance(machine.where, Gpu):
        return seen.receipt
    try:
        for place in places(seen.settings.volume / "receipts" / seen.spec.id):
            if (number := current_number(place)) and gpu_named((found := read(place, number)).device) is machine.where:
                return found
    except KindlingError:
        return None
    return None


def memory(machine: Machine, seen: Outlook) -> Memory:
    """By the plan that a worker makes; WeightsCorrupt or VolumeFailed if files do not say their size."""
    plan = (replace(seen, source=None) if seen.fault else seen).memory
    by = "the sizes of the model's files" if seen.source and not seen.fault else "the catalogue's count of parameters"
    measured = (receipt := receipt_of(machine, seen)) and receipt.of(seen.hardware.precision, _compiled(seen, receipt))
    if receipt and measured:
        by += f"; receipt {receipt.number} measured {measured.peak_gb:.1f} GB at most"
    slow = SLOW.get(plan.mode, "")
    return Memory(seen.hardware.name, plan.fits, plan.needs_gb, plan.host_gb, plan.reason, by, slow)


def time(machine: Machine, seen: Outlook, requests: Iterable[ImageRequest]) -> Time:
    """In proportion to what a receipt measured; without one nothing is made up."""
    spec, receipt = seen.spec, receipt_of(machine, seen)
    figures = receipt.of(seen.hardware.precision, _compiled(seen, receipt)) if receipt else None
    if receipt is None or figures is None:
        how = f"measure it with: python -m handler optimize {spec.id}"
        told = f"Nobody has measured {spec.id} in {seen.hardware.precision} on this {seen.hardware.name}; {how}."
        return Time(None, _started(machine, seen), None, told)
    times = sum(_work(request, spec) for request in requests) / _usual(spec)
    return Time(
        times * figures.p50_s,
        figures.cold_start_s,
        None if figures.dollars is None else times * figures.dollars,
        _told(receipt, figures, seen, times),
    )


def _told(receipt: Receipt, figures: Figures, seen: Outlook, times: float) -> str:
    how = f"{figures.p50_s:.2f} s for {receipt.picture} in {seen.hardware.precision} on {receipt.device}"
    measured = f"Receipt {receipt.number} of {receipt.when[:10]} measured {how}"
    if abs(times - 1) < 0.005:
        return f"{measured}."
    return f"{measured}; this is {times:.3g} times the work, by steps, guidance and pixels."


def _compiled(seen: Outlook, receipt: Receipt) -> bool:
    """Whether what a worker runs is compiled, if it follows its receipt."""
    if seen.settings.compile in ("on", "off"):
        return seen.settings.compile == "on"
    return receipt.winner.compiled


def _work(request: ImageRequest, spec: ModelSpec) -> float:
    """Pixels that the model is asked for, over all steps."""
    sampling = request.sampling
    assert sampling, "a graph's request has one"
    asked = (2 if sampling.cfg > 1 else 1) * (2 if sampling.sampler in TWICE else 1)
    width, height = spec.canvas((request.width or spec.size[0], request.height or spec.size[1]))
    return float(request.n * sampling.taken * asked * width * height)


def _usual(spec: ModelSpec) -> float:
    """The same of the picture that receipts measure."""
    asked = 2 if spec.takes_negative_prompt and spec.guidance > 1 else 1
    return float(spec.steps * asked * spec.size[0] * spec.size[1])


def _started(machine: Machine, seen: Outlook) -> float | None:
    """How long the last start took of this model there, of those that the volume has records of."""
    if isinstance(machine.where, Gpu):
        return None
    try:
        starts = [record.ledger for record in islice(records(seen.settings.volume), KEPT)]
    except VolumeFailed:
        return None
    alike = (one.total_s for one in starts if one.outcome == "ready" and _same(one.model, one.device, seen))
    return next(alike, None)


def _same(model: str, device: str, seen: Outlook) -> bool:
    return (model, device) == (seen.spec.id, seen.hardware.name)
