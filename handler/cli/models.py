"""The catalogue: what each model needs, whether it is on the volume and fits here, its licence; and the LoRAs there."""

import argparse
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from handler.catalog.models import MODELS, MODES
from handler.catalog.spec import ModelSpec
from handler.cli.files import files
from handler.cli.files import lines as lines_of_files
from handler.core.errors import KindlingError, WeightsMissing
from handler.core.host import host_memory
from handler.core.settings import Settings
from handler.model.compiling import artifacts
from handler.model.hardware import Hardware, looked_at
from handler.volume.adapters import Adapter, adapters
from handler.volume.patience import cause, patiently
from handler.worker.chips import dollars_of
from handler.worker.memory import MemoryPlan
from handler.worker.outlook import Outlook, outlook

FITS = {"resident": "fits", "encoders": "fits with text encoders offloaded", "blocks": "fits offloaded"}
ROW = "{:<21} {:>7} {:>6} {:>9} {:>10}  {}"


@dataclass(frozen=True, slots=True)
class ModelState:
    """One model on this volume and this machine, and in which precision it would be served.

    `revision` is the commit: its row's, else the volume's, empty where that has none. `baked` is HIT where compile
    artifacts fit this device; `dollars` is what a picture costs by the current receipt, None where it does not say.
    """

    id: str
    revision: str
    fetched: bool
    baked: str
    baked_weights: bool
    reason: str
    fit: MemoryPlan
    precision: str
    dollars: float | None = None


def state(spec: ModelSpec, settings: Settings, hardware: Hardware) -> ModelState:
    """Whether `spec` is on the volume, what was baked for it, whether it fits; else why not."""
    seen = outlook(settings, spec, hardware)
    spec = seen.spec
    try:
        if seen.fault:
            raise seen.fault
        memory = seen.memory
        look = artifacts.look(spec, seen.hardware, settings.volume, volume_key=settings.volume_key)
        found = artifacts.examined(look)
    except KindlingError as error:
        why = "not fetched" if isinstance(error, WeightsMissing) else error.message
        return ModelState(spec.id, spec.revision, False, "MISS", False, why, listed(seen), seen.hardware.precision)
    baked = seen.weights.kind == "baked"
    dollars = dollars_of(settings.volume, spec.id, seen.hardware.identity)
    served, why = seen.hardware.precision, found.reason
    if seen.weights.instead:
        why += f"; the baked weights are damaged: {seen.weights.instead}"
    return ModelState(spec.id, spec.revision, True, found.outcome, baked, why, memory, served, dollars)


def listed(seen: Outlook) -> MemoryPlan:
    """The memory plan by the catalogue, whatever the files are."""
    return replace(seen, source=None).memory


def states(settings: Settings, hardware: Hardware) -> list[ModelState]:
    """The state of every model in the catalogue."""

    def unknown(spec: ModelSpec, why: str) -> ModelState:
        seen = outlook(settings, spec, hardware, host_memory() / 1e9)  # as of a machine whose volume nobody sees
        return ModelState(spec.id, spec.revision, False, "MISS", False, why, seen.memory, seen.hardware.precision)

    def examined(spec: ModelSpec) -> ModelState:
        try:
            return state(spec, settings, hardware)
        except Exception as error:  # one model's folder that cannot be read hides no other
            return unknown(spec, cause(error))

    def all_examined() -> list[ModelState]:
        return [examined(spec) for spec in MODELS.values()]

    return patiently(all_examined, otherwise=lambda why: [unknown(spec, why) for spec in MODELS.values()])


def run(options: argparse.Namespace) -> int:
    """Print the catalogue; the exit code."""
    settings = Settings.from_env()
    hardware = looked_at(settings)
    found, loras = states(settings, hardware), adapters_on(settings)
    own = patiently(files, settings.volume, otherwise=lambda why: [])
    if options.json:
        models = [described(MODELS[s.id]) | {"state": asdict(s)} for s in found]
        modes = [asdict(mode) for mode in MODES.values()]
        brought = {"loras": [asdict(lora) for lora in loras], "files": [asdict(each) for each in own]}
        print(json.dumps({"models": models, "modes": modes, **brought}))
        return 0
    print(ROW.format("MODEL", "PARAMS", "STEPS", "GUIDANCE", "SIZE", f"HERE ({hardware.name})"))
    for one in found:
        print("\n".join(lines(MODELS[one.id], one)))
    print("\nMODES")
    for mode in MODES.values():
        print(f"{mode.id:<21} {mode.model}: {mode.promise}")
    print("\n".join(lines_of_files(own)), end="\n" if own else "")
    if loras:
        print("\n".join(["\nLORAS", *map(adapter_line, loras)]))
    return 0


def adapters_on(settings: Settings) -> list[Adapter]:
    """The LoRAs on the volume; none where nobody can tell."""
    return patiently(adapters, settings.volume, otherwise=lambda why: [])


def adapter_line(lora: Adapter) -> str:
    """A LoRA for people: its size, and its maker's words, or why it cannot be used."""
    words = [f"made for {lora.made_for}"] * bool(lora.made_for)
    words += [f"trigger words: {', '.join(lora.trigger_words)}"] * bool(lora.trigger_words)
    said = f"cannot be used: it is {lora.fault}" if lora.fault else "; ".join(words)
    return f"{lora.name:<21} {lora.bytes / 1e6:,.1f} MB{', ' if said else ''}{said}"


def described(spec: ModelSpec) -> dict[str, Any]:
    """A row as JSON takes it."""
    return {name: dict(value) if isinstance(value, Mapping) else value for name, value in asdict(spec).items()}


def lines(spec: ModelSpec, found: ModelState) -> list[str]:
    """One model for people: its numbers, whether it fits and why, its licence."""
    count, size = spec.parameters, "x".join(map(str, spec.size))
    parameters = f"{count / 1e6:,.1f}M" if count < 1e9 else f"{count / 1e9:g}B"
    at = "" if spec.revision else f" at {found.revision[:8]}"
    fetched = "ships with Kindling" if spec.embedded else f"fetched{at}" if found.fetched else found.reason
    baked = [", baked weights"] * found.baked_weights + [", compiled"] * (found.baked == "HIT")
    price = "" if found.dollars is None else f"; {found.dollars:.6f} dollars a picture"
    fits = FITS[found.fit.mode] if found.fit.fits else "does not fit"
    where = f"{fits} in {found.precision}; {fetched}{''.join(baked)}{price}"
    return [
        ROW.format(spec.id, parameters, f"{spec.steps}/{spec.max_steps}", spec.guidance, size, where),
        f"{'':<22}{found.fit.reason}",
        f"{'':<22}{spec.license.name}: {spec.license.obligation}",
    ]
