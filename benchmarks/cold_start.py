"""The cold start, from the birth of the process to the first picture served over HTTP, phase by phase.

Each start is a fresh `python -m handler serve` on a volume of its own; variants take turns and each round's figures
come from one run, so their ratios hold on a busy machine. With `--random flux-schnell` the volume gets a FLUX.1
of full size and random weights (speed does not depend on values); that wants a GPU and 34 GB of disk:

    python benchmarks/cold_start.py --random flux-schnell --volume /tmp/volume --rounds 3 --save

KINDLING_PRECISION=fp8 before it measures that precision: then the plain weights are rounded in every start that does
not find baked ones.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import chart
import random_models
import report

ROOT = Path(__file__).parent.parent
PHASES = ("python", "volume", "import", "weights", "artifacts", "compile", "warm", "serve")
DROP_CACHES = Path("/proc/sys/vm/drop_caches")


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to start: what is on the volume, what the worker is told, whether the page cache is emptied first."""

    name: str
    compile: str
    baked: tuple[str, ...] = ()  # which of the baked folders are there
    cold: bool = False


VARIANTS = (
    Variant("eager", "off"),
    Variant("no artifacts", "on"),
    Variant("artifacts", "auto", ("code",)),
    Variant("baked", "auto", ("code", "weights")),
    Variant("eager, cold cache", "off", cold=True),
    Variant("baked, cold cache", "auto", ("code", "weights"), cold=True),
)


def main() -> None:
    """Bake once, start every variant `--rounds` times, print a table, draw the chart, end with one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="starts of each variant (default: 3)")
    parser.add_argument("--volume", type=Path, help="where to keep the volume (default: a temporary folder)")
    parser.add_argument("--random", choices=random_models.CONFIGS, help="put a full-size MODEL of random weights there")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/cold_start.json and .png")
    options = parser.parse_args()
    model = options.random or "spark"
    with contextlib.ExitStack() as stack:
        volume = options.volume or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if options.random:
            random_models.write(options.random, volume)
        bake_s = bake(model, volume)
        variants = [v for v in VARIANTS if not v.cold or os.access(DROP_CACHES, os.W_OK)]
        starts: dict[str, list[dict[str, float]]] = {v.name: [] for v in variants}
        for _ in range(options.rounds):
            for variant in variants:
                with arranged(variant, model, volume) as folder:
                    starts[variant.name].append(start(variant, model, folder))
                print(f"{variant.name}: {starts[variant.name][-1]['total']:.1f} s", flush=True)
    rows = {name: medians(found) for name, found in starts.items()}
    print_table(rows)
    figures = {"model": model, "rounds": options.rounds, "bake_s": bake_s, "rows": rows, "ratios": ratios(rows)}
    name = "cold_start" if model == "spark" else f"cold_start_{model}"
    if options.save:
        chart.stacked(rows, PHASES, report.RESULTS / f"{name}.png", "seconds from process birth to the first picture")
    report.finish(name, figures, options.save)


def bake(model: str, volume: Path) -> float:
    """Bake `model`; the seconds that took, process and all."""
    begun = time.perf_counter()
    environment = {**os.environ, "KINDLING_VOLUME": str(volume)}
    subprocess.run([sys.executable, "-m", "handler", "bake", model], cwd=ROOT, env=environment, check=True)
    return round(time.perf_counter() - begun, 1)


@contextlib.contextmanager
def arranged(variant: Variant, model: str, volume: Path) -> Iterator[Path]:
    """A volume that holds what `variant` may find, by links to the real one."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if (volume / "models").exists():
            (folder / "models").symlink_to(volume / "models")
        (folder / "baked" / model).mkdir(parents=True)
        for baked in (volume / "baked" / model).iterdir():
            kind = json.loads((baked / "manifest.json").read_text())["facts"]["kind"]
            if kind in variant.baked:
                (folder / "baked" / model / baked.name).symlink_to(baked)
        if variant.cold:
            os.sync()
            DROP_CACHES.write_text("3")
        yield folder


def start(variant: Variant, model: str, volume: Path) -> dict[str, float]:
    """Start a server, ask for one picture, stop it; seconds by phase, in all, and its peak memory in MB."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("KINDLING_")}
    environment |= {"KINDLING_VOLUME": str(volume), "KINDLING_COMPILE": variant.compile, "KINDLING_PUBLISH": "0"}
    environment |= {"KINDLING_MODEL": model, "KINDLING_COLD_START_BUDGET_S": "3600"}
    command = [sys.executable, "-m", "handler", "serve", "--port", "0"]
    begun = time.perf_counter()
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            ledger, address = watch(process)
            body = json.dumps({"prompt": "a red circle on a blue background", "seed": 1}).encode()
            asked = time.perf_counter()
            request = urllib.request.Request(  # noqa: S310
                f"{address}/v1/images/generations", body, {"Content-Type": "application/json"}
            )
            with urllib.request.urlopen(request, timeout=600) as answer:  # noqa: S310
                assert len(json.load(answer)["data"]) == 1
            done = time.perf_counter()
            peak = peak_mb(process.pid)
        finally:
            process.terminate()
    phases = {phase["name"]: phase["seconds"] for phase in ledger["phases"]}
    first = next(phase["start_s"] for phase in ledger["phases"])
    return {"python": first, **phases, "serve": done - asked, "total": done - begun, "peak_mb": peak}


def watch(process: "subprocess.Popen[str]") -> tuple[dict[str, Any], str]:
    """The ledger and the address a server prints."""
    assert process.stderr
    ledger: dict[str, Any] = {}
    for line in process.stderr:
        if line.startswith('{"cold_start"'):
            ledger = json.loads(line)["cold_start"]
        if "is ready on " in line:
            return ledger, line.split("is ready on ")[1].split()[0]
    raise RuntimeError(f"the server did not start: {ledger}")


def peak_mb(pid: int) -> int:
    """A process's largest resident memory so far."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) // 1024


def medians(starts: list[dict[str, float]]) -> dict[str, float]:
    names = {name for found in starts for name in found}
    return {name: round(statistics.median(found.get(name, 0.0) for found in starts), 3) for name in sorted(names)}


def ratios(rows: dict[str, dict[str, float]]) -> dict[str, float]:
    """The figures the project promises, each from medians of this run."""

    def compiling(name: str) -> float:
        return rows[name].get("compile", 0.0) + rows[name].get("artifacts", 0.0)

    return {
        "compile_with_over_without_artifacts": round(compiling("artifacts") / compiling("no artifacts"), 3),
        "artifacts_over_eager": round(rows["artifacts"]["total"] / rows["eager"]["total"], 3),
        "baked_over_eager": round(rows["baked"]["total"] / rows["eager"]["total"], 3),
    }


def print_table(rows: dict[str, dict[str, float]]) -> None:
    columns = (*PHASES, "total", "peak_mb")
    print(f"{'':<20}" + "".join(f"{name:>10}" for name in columns))
    for name, row in rows.items():
        print(f"{name:<20}" + "".join(f"{row.get(column, 0.0):>10.2f}" for column in columns))


if __name__ == "__main__":
    main()
