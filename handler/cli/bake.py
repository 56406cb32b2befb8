"""Bake a model on this machine for later workers: its weights as they are served, and its compile artifacts."""

import argparse
import json
import logging
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from handler.catalog.models import find
from handler.catalog.spec import ModelSpec
from handler.core.settings import Settings
from handler.model.compiling import artifacts as compiled
from handler.model.hardware import Hardware, detect
from handler.volume.damaged import unmark
from handler.volume.hashes import contents
from handler.volume.overlay import NOTHING, Overlay, overlay
from handler.volume.publishing import publishing, retire, whole
from handler.volume.revisions import settled
from handler.volume.room import reading, require, require_folder, require_writable
from handler.volume.sources import (
    baked_sources,
    model_source,
    served_source,
    weight_facts,
    weights_folder,
)
from handler.worker.clock import Clock
from handler.worker.decision import decide
from handler.worker.footprint import weigh
from handler.worker.sharing import alone
from handler.worker.worker import Worker

log = logging.getLogger(__name__)
PATIENT_S = 3600.0  # baking is done once and nobody waits for an answer


@dataclass(frozen=True, slots=True)
class Baked:
    """What a bake left on the volume, and why where it left nothing new."""

    model: str
    device: str
    weights: str
    artifacts: str
    compile_s: float
    seconds: float


def run(options: argparse.Namespace) -> int:
    """Bake and report; the exit code."""
    settings = Settings.from_env(model=options.model, weights=options.weights)
    baked = bake(settings, progress=not options.json and sys.stderr.isatty())
    if options.json:
        print(json.dumps(asdict(baked)))
        return 0
    print(f"{baked.model} on {baked.device}, baked in {baked.seconds:.1f} s")
    print(f"  weights: {baked.weights}")
    print(f"  compile artifacts: {baked.artifacts}")
    return 0


def bake(settings: Settings, progress: bool = False) -> Baked:
    """Load and compile the model, publish both on the volume; what is there whole, and works, is left alone."""
    spec = settled(find(settings.model), settings.volume)
    model = spec.id

    def announce(phase: str) -> None:
        if progress:
            print(f"kindling: {model}: {phase} ...", file=sys.stderr, flush=True)

    require_folder(settings.volume)
    decided = decide(settings, spec, detect(settings))  # for the workers that will follow the receipt
    settings, hardware = decided.settings, decided.hardware
    announce("check")
    over = _over(settings, spec)
    discard_damaged(spec, settings.volume, hardware.precision, over)
    # There may be no room, or no leave to write, and hours of work are ahead.
    if (
        unbaked(spec, hardware, settings.volume, over)
        or compiled.look(spec, hardware, settings.volume, volume_key=settings.volume_key).outcome != "HIT"
    ):
        require_writable(settings.volume / "baked" / spec.id)
    patient = alone(settings).model_copy(update={"compile": "on", "cold_start_budget_s": PATIENT_S, "vae": ""})
    worker, clock = _booted(patient, announce)
    if worker.found.outcome == "HIT" and worker.ledger.plan == "EAGER":  # what was there did not work, and is gone
        del worker
        worker, clock = _booted(patient, announce)
    announce("publish")
    artifacts = _placed(worker.publish(settings.volume)) if worker.unpublished else worker.ledger.plan_reason
    weights = publish_weights(worker, settings.volume, over)
    compiling = sum(phase.seconds for phase in clock.ledger.phases if phase.name == "compile")
    return Baked(
        model,
        worker.hardware.name,
        _placed(weights) if weights else "those on the volume are as small; nothing to gain",
        artifacts,
        compiling,
        round(clock.elapsed, 1),
    )


def _booted(settings: Settings, announce: Callable[[str], None]) -> tuple[Worker, Clock]:
    clock = Clock(PATIENT_S, announce=announce, publish=lambda ledger: None)
    return Worker.boot(settings, clock), clock


def _over(settings: Settings, spec: ModelSpec) -> Overlay:
    """What KINDLING_WEIGHTS puts over the model; a worker that refuses it says so first."""
    if not settings.weights:
        return NOTHING
    return overlay(settings.weights, spec, model_source(spec, settings.volume), settings.volume)


def discard_damaged(spec: ModelSpec, volume: Path, precision: str, over: Overlay = NOTHING) -> None:
    """Remove baked weights that are not whole, so that they are made again, if there is something to make them from.

    Raises WeightsMissing or WeightsCorrupt if there is not: then they stay as they are.
    """
    wanted = weight_facts(spec, precision, contents(over.given, volume))
    for source in baked_sources(spec, volume):
        if source.manifest and source.manifest.facts == wanted:
            if whole(source.folder, wanted):
                unmark(source.folder)
                continue
            model_source(spec, volume)
            log.warning("The weights in %s are damaged; they are made again.", source.folder)
            retire(source, keep=lambda folder: whole(folder, wanted))


def unbaked(spec: ModelSpec, hardware: Hardware, volume: Path, over: Overlay = NOTHING) -> bool:
    """Whether those on the volume are not what is served; VolumeFailed if there is no room for what would be left."""
    source = served_source(spec, volume, hardware.precision, contents(over.given, volume))
    weights = weigh(spec, hardware, source, over)
    if source.precision == hardware.precision or not weights.changed:
        return False
    require(volume, weights.held, f"The weights of {spec.id} in {hardware.precision}")
    return True


def publish_weights(worker: Worker, volume: Path, over: Overlay = NOTHING) -> Path | None:
    """Leave the weights as they are served at baked/<id>/; None if those on the volume are that already."""
    spec, precision = worker.spec, worker.hardware.precision
    if not unbaked(spec, worker.hardware, volume, over):
        return None
    content = contents(over.given, volume)
    target = weights_folder(spec, volume, precision, content)
    with publishing(target, weight_facts(spec, precision, content)) as folder:
        worker.save(folder)
    return target


def _placed(folder: Path) -> str:
    with reading(folder):
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return f"{folder} ({size / 1e6:,.1f} MB)"
