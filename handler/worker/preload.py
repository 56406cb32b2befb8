"""Preloading: what of a cold start needs no GPU, done in a process that is then copied, as snapshots of memory are.

Of such a snapshot many workers are made, perhaps weeks later and on other machines. So nothing that is one worker's own
is made here: no name, no key, no thread, no open file, and no answer to whether there is a GPU.
"""

import gc
import importlib
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType

from handler.catalog.gpus import Gpu
from handler.catalog.models import find
from handler.catalog.spec import ModelSpec
from handler.core.birth import Birth
from handler.core.errors import StartError
from handler.core.settings import Settings
from handler.core.tracebacks import let_go
from handler.model import imports, upstream
from handler.volume.autoencoder import vae_source
from handler.volume.held import Held
from handler.volume.revisions import settled
from handler.volume.sources import NONE, spoilt
from handler.worker.boots import BootLog
from handler.worker.clock import Clock, Ledger, Phase
from handler.worker.outlook import outlook


@dataclass(frozen=True, slots=True)
class Preloaded:
    """What workers that are made of this process need not do: how long it took, and the weights, if they were read."""

    phases: tuple[Phase, ...]
    weights: Held | None = None


def preload(settings: Settings, gpu: Gpu | None = None) -> Preloaded:
    """Import what draws; for workers on `gpu`, also read their weights to host memory, all of them.

    It has a cold-start budget of its own, and a StartError, which `doctor` tells too, says why it failed.
    """
    clock = Clock.anew(settings.cold_start_budget_s)
    if settings.ranks > 1:
        upstream.shared()
    with clock.start(settings.model), imports.thawed(), ExitStack() as reading:
        spec = find(settings.model)
        clock.ledger.model, clock.record = spec.id, partial(_record, settings.volume, clock.birth)
        clock.arm()
        weights = None
        if gpu:
            with clock.phase("volume"):
                weights = _begun(settings, spec, gpu, reading)
                clock.ledger.weights = weights.source.told
        with clock.phase("import"), imports.uncollected(), imports.lean():
            libraries(spec)
        if gpu and weights:
            with clock.phase("weights"):
                if without := _spoilt(reading, spec, settings.volume):
                    weights.free()
                    weights = _begun(settings, spec, gpu, reading, without)
                    clock.ledger.weights = weights.source.told
                    reading.close()
        clock.finish("preloaded", "a snapshot may be taken")
    gc.collect()  # errors that were caught in imports know the frames here, and so these settings
    return Preloaded(tuple(clock.ledger.phases), weights)


def _begun(
    settings: Settings, spec: ModelSpec, gpu: Gpu, reading: ExitStack, without: Mapping[Path, str] = NONE
) -> Held:
    """The weights that workers on `gpu` will load, which are all there when `reading` ends."""
    seen = outlook(settings, spec, gpu, without=without)
    vae = vae_source(settings.vae, settings.volume) if settings.vae else None
    return reading.enter_context(Held.reading(seen.weights, vae, seen.over))


def _spoilt(reading: ExitStack, spec: ModelSpec, volume: Path) -> Mapping[Path, str]:
    """Until all is there: what of it is damaged, with what is wrong, if the model can be loaded without."""
    try:
        reading.close()
    except StartError as error:
        found = spoilt(error, settled(spec, volume), volume)
        let_go(error)  # what it holds would be there twice
        return found
    return NONE


def libraries(spec: ModelSpec) -> tuple[ModuleType, ModuleType]:
    """What all families share, and the family of `spec`. Importing these asks nothing about GPUs."""
    families = importlib.import_module("handler.model.families")
    families.quiet()
    return families, importlib.import_module(spec.family)


def _record(volume: Path, birth: Birth, ledger: Ledger) -> None:
    """Leave word on the volume of what failed; of what did not, the workers will."""
    if ledger.outcome == "failed":
        BootLog(volume, birth)(ledger)
