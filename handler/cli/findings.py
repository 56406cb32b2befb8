"""What a check-up found, as lines for people."""

import shlex
from typing import Any

from handler.cli import files
from handler.cli.configured import listed
from handler.core.birth import process_age
from handler.core.untrusted import printed


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
        *_workers(report["workers"]),
        f"torch {found['torch']}, CUDA {found['cuda'] or 'none'}, driver {found['driver'] or 'none'}; {memory}",
        f"compiling: {_compiling(report['compiling'], hardware['device'])}",
        f"volume: {volume['path']}, {_volume(volume)}",
        *_leftovers(report["leftovers"], report["leftovers_bytes"]),
        f"object store: {_store(report['store'])}",
        "\nMODELS",
        *(f"  {m['id']:<21} {_state(m)}" for m in report["models"]),
        *files.lines([files.FileState(**each) for each in report["files"]]),
        *(["\nLORAS"] if report["loras"] else []),
        *(f"  {lora['line']}" for lora in report["loras"]),
        f"\nCOLD START of {report['cold_start']['model']}",
        *_estimate(report["cold_start"]),
        "\nLAST BOOTS",
        *(_boot(boot) for boot in report["boots"]),
        *([f"  {report['boots_reason'] or 'none recorded on this volume'}"] if not report["boots"] else []),
        "\nSETTINGS",
        *listed(report["settings"]),
    ]


def _workers(found: dict[str, Any]) -> list[str]:
    """How many serve begins, if not one."""
    if found["count"] == 1:
        return []
    gpus = f", a process each, on GPU {'; '.join(found['gpus'])}" if found["gpus"] else ", a process each"
    return [f"workers: {found['reason'] or str(found['count']) + gpus}"]


def _volume(volume: dict[str, Any]) -> str:
    if "reason" in volume:
        return str(volume["reason"])
    if not volume["there"]:
        return "not there yet"
    free = f"{'writable' if volume['writable'] else 'not writable'}, {volume['free'] / 1e9:.3g} GB free"
    return f"{free}. {volume['refusal']}" if volume["refusal"] else free


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
    return str(where if model["fit"]["fits"] else f"{where.rstrip('.')}; does not fit: {model['fit']['reason']}")


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


def _leftovers(paths: list[str], size: int) -> list[str]:
    """What writers that are gone have left, and how to remove it."""
    if not paths:
        return []
    return [
        f"left behind by writers that were killed, or are still at it: {len(paths)} hidden, {size / 1e9:.3g} GB. What "
        "is older than a day goes with the next bake; where nobody writes now, remove it with:",
        printed(f"  rm -rf {shlex.join(paths)}"),
    ]


def _boot(boot: dict[str, Any]) -> str:
    outcome = boot.get("outcome", "?")
    if outcome == "starting":
        outcome = f"still starting, or killed, in phase '{boot.get('phase')}'"
    words = outcome
    if outcome == "failed":
        reason, phase = str(boot.get("reason")), boot.get("phase")
        words = f"failed: {reason}" + (f" (in phase '{phase}')" if phase and "in phase" not in reason else "")
    seconds = boot.get("total_s") or 0
    return printed(f"  {boot['boot']}  {boot.get('model')}  {seconds:.1f} s  {boot.get('plan') or '-'}  {words}")
