"""A check-up: the machine, the volume, the models on it, every setting, the last boots, and what a cold start takes."""

import argparse
import json
import os
import shutil
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from handler.api.store import Store
from handler.catalog.attention import refusals
from handler.catalog.models import find
from handler.catalog.prices import unheld
from handler.cli.configured import described, listed
from handler.cli.files import files
from handler.cli.findings import lines
from handler.cli.models import adapter_line, adapters_on, states
from handler.core.errors import DoesNotFit, KindlingError, SettingsError
from handler.core.host import free_memory
from handler.core.settings import Settings
from handler.core.version import __version__
from handler.model.compiling import artifacts, toolchain
from handler.model.compiling.failures import Failures
from handler.model.given_gpus import SEEN
from handler.model.hardware import GPU_DRIVER, Hardware, looked_at
from handler.volume.autoencoder import vae_source
from handler.volume.leftovers import Leftover, leftovers
from handler.volume.listing import weight_files
from handler.volume.manifest import Source
from handler.volume.patience import patiently
from handler.volume.room import reading, require_folder, try_to_write, unwritable
from handler.worker.boots import last_boots
from handler.worker.compilation import COMPILE_S
from handler.worker.durations import LOOKED, Durations
from handler.worker.footprint import weigh
from handler.worker.outlook import Outlook, outlook
from handler.worker.sharing import require_exact, require_shared, require_splittable, require_workers, visible

BOOTS_SHOWN = 5
SAMPLE = 256 << 20  # bytes read to measure the volume's speed
ASSUMED_S = {"import": 8.0, "artifacts": 1.0, "warm": 3.0}  # where this volume has no boot to learn from


@dataclass(frozen=True, slots=True)
class Part:
    """One summand of the estimated cold start, in seconds, with where it comes from."""

    name: str
    seconds: float
    why: str


def run(options: argparse.Namespace) -> int:
    """Examine, print; the exit code."""
    settings, faults = Settings.examined(os.environ)
    if faults:
        wrong = described(settings, faults)
        print(json.dumps({"settings": wrong}) if options.json else "\n".join(["SETTINGS", *listed(wrong)]))
        Settings.from_env()  # says which; of a worker that cannot start there is nothing else to tell
    find(settings.model)  # nor of a model that nobody knows
    hardware = looked_at(settings)
    volume, model = {"path": str(settings.volume)}, {"model": settings.model}
    boots: tuple[list[dict[str, Any]], str] = patiently(
        lambda: (last_boots(settings.volume, BOOTS_SHOWN), ""), otherwise=lambda why: ([], why)
    )
    left: list[Leftover] = patiently(leftovers, settings.volume, otherwise=lambda why: [])
    begun = workers(settings, hardware)
    served = settings.model_copy(update={"workers": begun["count"] or 1})
    report = {
        "version": __version__,
        "settings": described(settings, faults),
        "hardware": asdict(patiently(_served, served, hardware, otherwise=partial(_unserved, hardware))),
        "workers": begun,
        "machine": machine(hardware),
        "compiling": compiling(hardware),
        "attention": refusals(hardware.capability, hardware.dtype) if hardware.capability else {},
        "volume": patiently(volume_state, settings.volume, otherwise=lambda why: volume | {"reason": why}),
        "leftovers": [each.path.as_posix() for each in left],
        "leftovers_bytes": sum(each.bytes for each in left),
        "store": store_state(settings),
        "models": [asdict(found) for found in states(served, hardware)],
        "loras": [asdict(lora) | {"line": adapter_line(lora)} for lora in adapters_on(settings)],
        "files": [asdict(each) for each in patiently(files, settings.volume, otherwise=lambda why: [])],
        "cold_start": patiently(cold_start, served, hardware, otherwise=lambda why: model | {"reason": why}),
        "boots": boots[0],
        "boots_reason": boots[1],
    }
    print(json.dumps(report) if options.json else "\n".join(lines(report)))
    return 0


def _served(settings: Settings, hardware: Hardware) -> Hardware:
    """With what `auto` means for the configured model, and why."""
    seen = outlook(settings, find(settings.model), hardware)
    return replace(seen.hardware, attention=seen.attention.id if seen.attention else "")


def _unserved(hardware: Hardware, why: str) -> Hardware:
    return replace(hardware, reason=f"{hardware.reason}; what else decides it is not known: {why}")


def workers(settings: Settings, hardware: Hardware) -> dict[str, Any]:
    """How many `serve` would begin, and the GPUs of each by CUDA_VISIBLE_DEVICES, if it begins several; or why none."""
    try:
        count = require_workers(settings)
    except SettingsError as error:
        return {"count": None, "gpus": [], "reason": error.message}
    several = range(count if count > 1 and hardware.device == "cuda" else 0)
    return {"count": count, "gpus": [visible(i * settings.ranks, settings.ranks)[SEEN] for i in several], "reason": ""}


def machine(hardware: Hardware) -> dict[str, Any]:
    """Versions and free memory (bytes); `driver` is None without an NVIDIA one."""
    import torch

    facts: dict[str, Any] = {"torch": torch.__version__, "cuda": torch.version.cuda, "cores": os.cpu_count()}
    facts["driver"] = GPU_DRIVER.read_text().splitlines()[0] if GPU_DRIVER.exists() else None
    facts["host_memory_free"] = free_memory()
    if hardware.device == "cuda":
        facts["gpu_memory_free"], facts["gpu_memory"] = torch.cuda.mem_get_info()
    return facts


def compiling(hardware: Hardware) -> dict[str, str]:
    """What there is to compile with, and why that does not do, if so."""
    tools = toolchain.look()
    return {**tools.facts, "missing": tools.missing(hardware.device)}


def volume_state(volume: Path) -> dict[str, Any]:
    """Is the volume there, may this process write to it, else why not and what to do; how many bytes are free."""
    require_folder(volume)
    free = None
    with reading(volume), suppress(FileNotFoundError):
        free = shutil.disk_usage(volume).free
    there = free is not None
    refusal = ""
    if there:
        try:
            try_to_write(volume)
        except OSError as error:
            refusal = unwritable(volume, error)
    return {"path": str(volume), "there": there, "writable": there and not refusal, "refusal": refusal, "free": free}


def store_state(settings: Settings) -> dict[str, Any]:
    """The object store, if there is one, and why it cannot be reached, if so."""
    store = Store.of(settings)
    if store is None:
        return {"bucket": None, "reason": "none; KINDLING_STORE_BUCKET names one"}
    reason = patiently(store.unreachable, otherwise=str, where="it")
    return {"bucket": store.bucket, "endpoint": store.endpoint or None, "reachable": not reason, "reason": reason}


def cold_start(settings: Settings, hardware: Hardware) -> dict[str, Any]:
    """The estimate for the configured model against the budget, summand by summand."""
    seen = outlook(settings, find(settings.model), hardware)
    spec, hardware = seen.spec, seen.hardware
    try:
        found = _grounds(seen)
        size = weigh(spec, hardware, seen.weights, seen.over).stored
    except KindlingError as error:
        return {"model": spec.id, "reason": error.message}
    past = Durations.on(settings.volume)

    def took(phase: str) -> Part:
        known = past.longest(phase, spec.id, hardware.name, hardware.precision, ASSUMED_S[phase])
        why = f"longest of its last {LOOKED} boots here" if known else "assumed"
        return Part(phase, known or ASSUMED_S[phase], why)

    speed = read_speed(_largest(seen.weights))
    parts = [took("import"), Part("weights", size / speed, f"{size / 1e9:.2f} GB at {speed / 1e9:.2f} GB/s")]
    spent = sum(part.seconds for part in parts)
    left = settings.cold_start_budget_s - spent
    failure = Failures(settings.compile, spec, hardware, settings.volume).expected
    chosen, compile_s = seen.compilation(found, left, past, failure), seen.compile_s(past)
    if chosen.compiles:
        parts.append(Part("compile", compile_s or COMPILE_S, "measured" if compile_s else "assumed"))
    parts += [took("artifacts")] * (found.outcome == "HIT") + [took("warm")]
    total = sum(part.seconds for part in parts)
    return {
        "model": spec.id,
        "parts": [asdict(part) for part in parts],
        "total_s": total,
        "budget_s": settings.cold_start_budget_s,
        "fits": total <= settings.cold_start_budget_s,
        "plan": asdict(chosen),
        "memory": asdict(seen.memory),
    }


def _grounds(seen: Outlook) -> artifacts.Found:
    """The compiled code that a start has to go by. Raises what would end it, as a worker does."""
    settings, hardware = seen.settings, seen.hardware
    if settings.vae:
        vae_source(settings.vae, settings.volume)
    seen.spec.served_caching(settings.step_cache)
    _ = seen.attention
    _require_ranks(seen)
    if not seen.memory.fits:
        raise DoesNotFit(f"it does not fit: {seen.memory.reason}")
    if why := unheld(settings, hardware.name):
        raise SettingsError(why)
    return artifacts.examined(artifacts.look(seen.spec, hardware, settings.volume, volume_key=settings.volume_key))


def _require_ranks(seen: Outlook) -> None:
    from handler.model import split

    require_splittable(seen.spec, seen.asked)
    require_shared(seen.weights, seen.asked)
    require_exact(seen.hardware, seen.asked)
    split.require_devices(seen.hardware.device, seen.asked.ranks)


def _largest(source: Source) -> Path:
    files = [source.folder / name for names in weight_files(source).values() for name in names]
    return max(files, key=lambda path: path.stat().st_size)


def read_speed(path: Path) -> float:
    """Bytes a second of one plain read of up to `SAMPLE` bytes, past the page cache if the system lets us."""
    with path.open("rb", buffering=0) as file:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        start, count = time.perf_counter(), 0
        while count < SAMPLE and (got := len(file.read(8 << 20))):
            count += got
        return count / (time.perf_counter() - start)
