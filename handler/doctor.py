"""A check-up: the machine, the volume, the models on it, every setting, the last boots, and what a cold start takes."""

import argparse
import json
import os
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from handler import __version__, compiled, toolchain
from handler.boots import last_boots, measured
from handler.catalog import find
from handler.clock import COMPILE_S, STREAMING, process_age
from handler.clock import plan as planned
from handler.decision import decide
from handler.errors import KindlingError
from handler.failures import Failures
from handler.footprint import weigh
from handler.hardware import GPU_DRIVER, Hardware, detect
from handler.kernels import refusals
from handler.listing import weight_files
from handler.models import SILENT, expected, patiently, states
from handler.settings import PREFIX, Settings
from handler.store import Store
from handler.volume import Source, served_source

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
    settings = Settings.from_env()
    find(settings.model)  # of one that nobody knows there is nothing to tell
    hardware = detect(settings)
    silent = {"reason": SILENT}
    report = {
        "version": __version__,
        "settings": described(settings),
        "hardware": asdict(patiently(_served, settings, hardware, otherwise=hardware)),
        "machine": machine(hardware),
        "compiling": compiling(hardware),
        "attention": refusals(hardware.capability, hardware.dtype) if hardware.capability else {},
        "volume": patiently(volume_state, settings.volume, otherwise={"path": str(settings.volume), **silent}),
        "store": store_state(settings),
        "models": [asdict(found) for found in states(settings, hardware)],
        "cold_start": patiently(cold_start, settings, hardware, otherwise={"model": settings.model, **silent}),
        "boots": patiently(last_boots, settings.volume, BOOTS_SHOWN, otherwise=[]),
    }
    print(json.dumps(report) if options.json else "\n".join(lines(report)))
    return 0


def _served(settings: Settings, hardware: Hardware) -> Hardware:
    """With what `auto` means for the configured model, and why."""
    return decide(settings, find(settings.model), hardware).hardware


def described(settings: Settings) -> dict[str, dict[str, Any]]:
    """Every setting's value, where it came from and what it means; keys are only counted."""
    values = settings.model_dump(mode="json") | {"api_keys": f"{len(settings.api_keys)} set"}
    return {
        PREFIX + name.upper(): {
            "value": values[name],
            "source": "environment" if name in settings.model_fields_set else "default",
            "meaning": field.description,
        }
        for name, field in Settings.model_fields.items()
    }


def machine(hardware: Hardware) -> dict[str, Any]:
    """Versions and free memory (bytes); `driver` is None without an NVIDIA one."""
    import torch

    facts: dict[str, Any] = {"torch": torch.__version__, "cuda": torch.version.cuda, "cores": os.cpu_count()}
    facts["driver"] = GPU_DRIVER.read_text().splitlines()[0] if GPU_DRIVER.exists() else None
    facts["host_memory_free"] = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if hardware.device == "cuda":
        facts["gpu_memory_free"], facts["gpu_memory"] = torch.cuda.mem_get_info()
    return facts


def compiling(hardware: Hardware) -> dict[str, str]:
    """What there is to compile with, and why that does not do, if so."""
    tools = toolchain.look()
    return {**tools.facts, "missing": tools.missing(hardware.device)}


def volume_state(volume: Path) -> dict[str, Any]:
    """Is the volume there, may this process write to it, how many bytes are free."""
    there = volume.is_dir()
    free = shutil.disk_usage(volume).free if there else None
    return {"path": str(volume), "there": there, "writable": there and os.access(volume, os.W_OK), "free": free}


def store_state(settings: Settings) -> dict[str, Any]:
    """The object store, if there is one, and why it cannot be reached, if so."""
    store = Store.of(settings)
    if store is None:
        return {"bucket": None, "reason": "none; KINDLING_STORE_BUCKET names one"}
    reason = patiently(store.check, otherwise="it does not answer")
    return {"bucket": store.bucket, "endpoint": store.endpoint or None, "reachable": not reason, "reason": reason}


def cold_start(settings: Settings, hardware: Hardware) -> dict[str, Any]:
    """The estimate for the configured model against the budget, summand by summand."""
    spec = find(settings.model)
    decision, policy = decide(settings, spec, hardware), settings.compile
    settings, hardware = decision.settings, decision.hardware
    try:
        source = served_source(spec, settings.volume, hardware.precision)
        found = compiled.look(spec, hardware, settings.volume)
        size = weigh(spec, hardware, source).stored
        memory = expected(spec, settings, hardware, source)
    except KindlingError as error:
        return {"model": spec.id, "reason": error.message}
    boots = last_boots(settings.volume, BOOTS_SHOWN)

    def past(phase: str) -> Part:
        known = measured(boots, phase, spec.id, hardware.name)
        why = f"longest of the last {BOOTS_SHOWN} boots" if known else "assumed"
        return Part(phase, known or ASSUMED_S[phase], why)

    speed = read_speed(_largest(source))
    parts = [past("import"), Part("weights", size / speed, f"{size / 1e9:.2f} GB at {speed / 1e9:.2f} GB/s")]
    spent = sum(part.seconds for part in parts)
    compile_s = measured(boots, "compile", spec.id, hardware.name)
    left = settings.cold_start_budget_s - spent
    failure = Failures(policy, spec, hardware, settings.volume).expected
    chosen = planned(settings.compile, hardware.device, found.outcome, found.reason, left, compile_s, failure)
    chosen = STREAMING if memory.mode == "blocks" else chosen
    if chosen.compiles:
        parts.append(Part("compile", compile_s or COMPILE_S, "measured" if compile_s else "assumed"))
    parts += [past("artifacts")] * (found.outcome == "HIT") + [past("warm")]
    total = sum(part.seconds for part in parts)
    return {
        "model": spec.id,
        "parts": [asdict(part) for part in parts],
        "total_s": total,
        "budget_s": settings.cold_start_budget_s,
        "fits": total <= settings.cold_start_budget_s,
        "plan": asdict(chosen),
        "memory": asdict(memory),
    }


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


def lines(report: dict[str, Any]) -> list[str]:
    """The report for people."""
    hardware, volume, found = report["hardware"], report["volume"], report["machine"]
    memory = f"{found['host_memory_free'] / 1e9:.0f} GB of memory free"
    if "gpu_memory" in found:
        memory += f", {found['gpu_memory_free'] / 1e9:.0f} of {found['gpu_memory'] / 1e9:.0f} GB on the GPU"
    return [
        f"kindling {report['version']}, process up for {process_age():.1f} s",
        f"device: {hardware['device']} ({hardware['name']}), {hardware['precision']}: {hardware['reason']}",
        f"attention: {_attention(hardware['attention'], report['attention'])}",
        f"torch {found['torch']}, CUDA {found['cuda'] or 'none'}, driver {found['driver'] or 'none'}; {memory}",
        f"compiling: {_compiling(report['compiling'], hardware['device'])}",
        f"volume: {volume['path']}, {_volume(volume)}",
        f"object store: {_store(report['store'])}",
        "\nMODELS",
        *(f"  {m['id']:<21} {_state(m)}" for m in report["models"]),
        f"\nCOLD START of {report['cold_start']['model']}",
        *_estimate(report["cold_start"]),
        "\nLAST BOOTS",
        *(_boot(boot) for boot in report["boots"]),
        *(["  none recorded on this volume"] if not report["boots"] else []),
        "\nSETTINGS",
        *(
            f"  {name:<32} {s['value']!s:<24} {s['source']:<12} {s['meaning']}"
            for name, s in report["settings"].items()
        ),
    ]


def _volume(volume: dict[str, Any]) -> str:
    if "reason" in volume:
        return str(volume["reason"])
    if not volume["there"]:
        return "not there yet"
    return f"{'writable' if volume['writable'] else 'read-only'}, {volume['free'] / 1e9:.0f} GB free"


def _store(store: dict[str, Any]) -> str:
    where = f"bucket {store['bucket']} at {store['endpoint'] or 'AWS'}, " if store["bucket"] else ""
    return f"{where}{store['reason'] or 'reachable'}"


def _attention(chosen: str, refused: dict[str, str]) -> str:
    usable = ", ".join(name for name, why in refused.items() if not why)
    return "; ".join([chosen or f"the fastest of {usable}", *(f"{name} {why}" for name, why in refused.items() if why)])


def _compiling(tools: dict[str, str], device: str) -> str:
    on_gpu = f", CUDA's headers in {tools['headers']}, {tools['driver']}" if device != "cpu" else ""
    return tools["missing"] or f"possible, with {tools['compiler']}{on_gpu}"


def _state(model: dict[str, Any]) -> str:
    where = f"fetched; artifacts {model['baked']}: {model['reason']}" if model["fetched"] else model["reason"]
    return str(where if model["fit"]["fits"] else f"{where}; does not fit: {model['fit']['reason']}")


def _estimate(estimate: dict[str, Any]) -> list[str]:
    if "parts" not in estimate:
        return [f"  cannot start: {estimate['reason']}"]
    sums = [f"  {part['seconds']:7.1f} s  {part['name']}: {part['why']}" for part in estimate["parts"]]
    verdict = "fits" if estimate["fits"] else "does not fit"
    total = f"  {estimate['total_s']:7.1f} s  in all: {verdict} the budget of {estimate['budget_s']:g} s"
    plan, memory = estimate["plan"], estimate["memory"]
    return [
        *sums,
        total,
        f"  plan: {plan['mode']}, {plan['reason']}",
        f"  memory: {memory['mode']}, {memory['reason']}",
    ]


def _boot(boot: dict[str, Any]) -> str:
    outcome = boot.get("outcome", "?")
    if outcome == "starting":
        outcome = f"still starting, or killed, in phase '{boot.get('phase')}'"
    words = f"{outcome}: {boot['reason']}" if outcome == "failed" else outcome
    return (
        f"  {boot['boot']}  {boot.get('model')}  {boot.get('total_s') or 0:.1f} s  {boot.get('plan') or '-'}  {words}"
    )
