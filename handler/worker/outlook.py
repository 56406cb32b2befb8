"""Outlook: what a worker will do, and why, as far as that can be known before a model is loaded.

`Worker.boot` carries it out, `doctor` and `models` print it, and `platform/` rents GPUs by it, through `renting.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from handler.catalog import ring
from handler.catalog.attention import KERNELS, NATIVE, KernelChoice, choose, refusal
from handler.catalog.gpus import Gpu
from handler.catalog.models import find
from handler.catalog.spec import ModelSpec
from handler.core.errors import DoesNotFit, KindlingError, SettingsError, WeightsMissing
from handler.core.settings import Settings
from handler.model.compiling.artifacts import Found
from handler.model.hardware import Hardware, rented
from handler.volume.given import given
from handler.volume.hashes import contents
from handler.volume.manifest import Source
from handler.volume.overlay import NOTHING, Overlay, overlay
from handler.volume.receipts import Receipt
from handler.volume.revisions import settled
from handler.volume.room import require_folder
from handler.volume.sources import NONE, baked_source, model_source, served_source
from handler.worker.compilation import COMPILE_S, OFF, STREAMING, Plan, plan
from handler.worker.decision import decide
from handler.worker.durations import Durations
from handler.worker.footprint import weigh
from handler.worker.memory import MemoryPlan, memory_plan, nearest
from handler.worker.sharing import host_share, processes, uncompiled

SHARED = "several GPUs draw each picture"  # why attention is torch's own


@dataclass(frozen=True)
class Outlook:
    """What a worker of `spec`, at a commit if its files are here, will do on `hardware`, in which precision, and why.

    `settings` are `asked` as the receipt decides them, if one is followed. `source` is where the weights come from:
    None if they are not there, as `fault` says, and on another machine, of whose volume nothing is known; it is none of
    those in `without`, which were found damaged. `over` it is what KINDLING_WEIGHTS names. `host_gb` is the memory of
    the host, of several processes each one's share. What is reckoned from these is reckoned when it is first asked for.
    """

    asked: Settings
    settings: Settings
    spec: ModelSpec
    hardware: Hardware
    receipt: Receipt | None
    host_gb: float
    here: bool
    source: Source | None = None
    over: Overlay = NOTHING
    fault: KindlingError | None = None
    without: Mapping[Path, str] = field(default_factory=dict)

    @cached_property
    def memory(self) -> MemoryPlan:
        """Where the weights will be; WeightsCorrupt or VolumeFailed names a file that does not say its size."""
        where, shared = (self.hardware, self.source, self.host_gb), self.asked.ranks > 1
        return memory_plan(self.spec, *where, self.settings.offload, self.over, shared, self.asked.tp_size)

    @property
    def baked(self) -> int:
        """Bytes of weights that `bake` would write, by the catalogue: none where the model's files are served as is."""
        found = weigh(self.spec, self.hardware)
        return found.held if found.changed else 0

    @property
    def loading(self) -> int:
        """Bytes of the host that loading takes at most, on a CPU what stays too, of all ranks: they load at once."""
        taken = self.memory.needs_gb if self.hardware.device == "cpu" else self.memory.host_gb
        return int(taken * 1e9) * processes(self.asked)

    @cached_property
    def attention(self) -> KernelChoice | None:
        """The kernel of attention; None where several are measured at the start. SettingsError if it cannot be used.

        What is installed on another machine is not known. On this one torch is imported.
        """
        asked, hardware = self.asked.attention, self.hardware
        if self.here and self.asked.ring_degree > 1:
            return ring.choose(asked, hardware.capability, hardware.dtype)
        if asked == "auto" and self.asked.ranks > 1:
            return KernelChoice(NATIVE, SHARED)
        if self.here:
            return choose(asked, hardware.capability, hardware.dtype)
        if asked == "auto":
            return None
        if why := refusal(replace(KERNELS[asked], lacking=str), hardware.capability, hardware.dtype):
            raise SettingsError(f"KINDLING_ATTENTION={asked}: {why}. Use auto, or native.", "KINDLING_ATTENTION")
        return KernelChoice(asked, f"KINDLING_ATTENTION={asked}")

    @property
    def weights(self) -> Source:
        """The source; else what is wrong. Of weights that are missing, also that they would not fit if fetched."""
        if isinstance(self.fault, WeightsMissing) and (why := self._misfit()):
            raise WeightsMissing(f"{self.fault.message} But {why.message}") from None
        if self.fault:
            raise self.fault
        assert self.source, "of another machine's volume nothing is known"
        return self.source

    def require(self) -> MemoryPlan:
        """The memory plan; DoesNotFit, with the arithmetic and what would fit, rather than running out of memory."""
        if why := self._misfit():
            raise why
        return self.memory

    def _misfit(self) -> DoesNotFit | None:
        if self.memory.fits:
            return None
        freely = replace(self, settings=self.settings.model_copy(update={"offload": "auto"}))
        advice = "It would with KINDLING_OFFLOAD=auto." if freely.memory.fits else nearest(self.hardware, self.host_gb)
        return DoesNotFit(f"{self.spec.id} does not fit at {self.hardware.precision}: {self.memory.reason}. {advice}")

    @property
    def eager(self) -> Plan | None:
        """Why nothing is compiled, nor looked for, where that is known ahead."""
        if self.memory.mode == "blocks":
            return STREAMING
        if why := uncompiled(self.spec, self.asked):
            return Plan("EAGER", why)
        if self.settings.compile != "off":
            return None
        return OFF if self.settings is self.asked else Plan("EAGER", self.hardware.reason)

    def compilation(self, found: Found, remaining_s: float, past: Durations, failure: str = "") -> Plan:
        """Whether compiled code runs, and why, after a look for it; `failure` says why compiling would fail."""
        known = self.compile_s(past)
        policy, device = self.settings.compile, self.hardware.device
        return self.eager or plan(policy, device, found.outcome, found.reason, remaining_s, known, failure)

    def compile_s(self, past: Durations) -> float | None:
        """How long compiling took in past starts, in seconds, if it was measured."""
        return past.longest("compile", self.spec.id, self.hardware.name, self.hardware.precision, COMPILE_S)

    def corrected(self, hardware: Hardware) -> "Outlook":
        """The same for hardware that is not as it seemed. Weights are looked for again if the precision differs."""
        decision = decide(self.asked, self.spec, hardware)
        if decision.hardware.precision != self.hardware.precision:
            return outlook(self.asked, self.spec, hardware, without=self.without)
        return replace(self, settings=decision.settings, hardware=decision.hardware, receipt=decision.receipt)


def outlook(
    settings: Settings,
    spec: ModelSpec,
    where: Hardware | Gpu,
    host_gb: float | None = None,
    without: Mapping[Path, str] = NONE,
) -> Outlook:
    """What a worker will do on this machine, or, where `host_gb` is given, on another with so much host memory.

    SettingsError where a GPU cannot compute in KINDLING_PRECISION. Nothing else is raised: what is wrong is part of it.
    """
    hardware = rented(settings, where) if isinstance(where, Gpu) else where
    here = host_gb is None
    spec = settled(spec, settings.volume) if here else spec
    decision = decide(settings, spec, hardware, host_gb)
    decided = decision.settings, spec, decision.hardware, decision.receipt
    seen = Outlook(settings, *decided, host_share(settings, host_gb), here, without=without)
    if not here:
        return seen
    try:
        require_folder(settings.volume)
        if not settings.weights or find(settings.model).id != spec.id:
            source = served_source(spec, settings.volume, decision.hardware.precision, without=without)
            return replace(seen, source=source)
        return replace(seen, **_under(settings, spec, decision.hardware.precision, without))
    except KindlingError as error:
        return replace(seen, fault=error.with_traceback(None))


def _under(settings: Settings, spec: ModelSpec, precision: str, without: Mapping[Path, str]) -> dict[str, Any]:
    """The source, and what is over it: nothing of what is baked into it, of which no header is read."""
    names, volume = settings.weights, settings.volume
    wanted = tuple(given(name, volume) for name in names)
    known = contents(wanted, volume, find=False)
    baked, why = baked_source(spec, volume, precision, known, without) if known else (None, "")
    if baked:
        return {"source": baked, "over": Overlay(wanted)}
    source = replace(model_source(spec, volume), instead=why)
    return {"source": source, "over": overlay(names, spec, source, volume)}
