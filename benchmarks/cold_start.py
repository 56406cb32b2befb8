"""The cold start, from the birth of the process to the first picture served over HTTP, phase by phase.

Each start is a fresh `python -m handler serve` on a volume of its own; variants take turns and each round's figures
come from one run, so their ratios hold on a busy machine. "All imports" is eager without the measures of `imports.py`
and `upstream.py` in `handler/model/`. For a cold cache the system's page cache is dropped or, where it does not let us,
that of the environment's files and the volume's; `cache_dropped_by` says which.

    python benchmarks/cold_start.py --rounds 4 --save

With `--random flux-schnell` the volume gets a FLUX.1 of full size and random weights (speed does not depend on values);
that wants a GPU and 34 GB of disk:

    python benchmarks/cold_start.py --random flux-schnell --volume /tmp/volume --rounds 3 --save

KINDLING_PRECISION=fp8 before it measures that precision: then the plain weights are rounded in every start that does
not find baked ones. KINDLING_ATTENTION, _DEVICE, _OFFLOAD, _STEP_CACHE and _VAE hold likewise, in starts and in what is
baked; no other setting does. Exit code 1: a start that was to run compiled code did not. Interrupted, it tells the
starts it has finished.
"""

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pagecache
from imports import ROWS, UNDONE

import chart
import random_models
import report

ROOT = Path(__file__).parent.parent
PHASES = ("python", "volume", "import", "weights", "ranks", "attention", "artifacts", "compile", "warm", "serve")
# Settings that a start and the bake before it have in common, if whoever measures sets them.
KEPT = tuple(f"KINDLING_{name}" for name in ("PRECISION", "ATTENTION", "DEVICE", "OFFLOAD", "STEP_CACHE", "VAE"))
SERVE = (sys.executable, "-m", "handler", "serve", "--port", "0")
UNDO = "; ".join(UNDONE[name] for name in ROWS["before"])
ALL_IMPORTS = (
    *(sys.executable, "-c"),
    f"from contextlib import nullcontext; from handler.model import imports, upstream; {UNDO}; "
    "from handler.__main__ import command; command()",
    *SERVE[3:],
)


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to start: what is on the volume, what the worker is told, whether the page cache is emptied first."""

    name: str
    compile: str
    baked: tuple[str, ...] = ()  # which of the baked folders are there
    cold: bool = False
    command: tuple[str, ...] = SERVE


@dataclass(frozen=True, slots=True)
class Start:
    """Seconds by phase and in all, the peak memory in MB, the plan with its reason, how the page cache was emptied."""

    seconds: dict[str, float]
    peak_mb: int
    plan: str
    cache_dropped_by: str = ""

    @property
    def eager(self) -> bool:
        return self.plan.startswith("EAGER")

    @property
    def figures(self) -> dict[str, float]:
        return {**self.seconds, "peak_mb": self.peak_mb}


VARIANTS = (
    Variant("all imports", "off", command=ALL_IMPORTS),
    Variant("eager", "off"),
    Variant("no artifacts", "on"),
    Variant("artifacts", "auto", ("code",)),
    Variant("baked", "auto", ("code", "weights")),
    Variant("all imports, cold cache", "off", cold=True, command=ALL_IMPORTS),
    Variant("eager, cold cache", "off", cold=True),
    Variant("baked, cold cache", "auto", ("code", "weights"), cold=True),
)


def main() -> int:
    """Bake once, start every variant `--rounds` times; a table, a chart and one JSON line; the exit code.

    Interrupted, it tells the starts it has finished.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="starts of each variant (default: 3)")
    parser.add_argument("--volume", type=Path, help="where to keep the volume (default: a temporary folder)")
    parser.add_argument("--random", choices=random_models.CONFIGS, help="put a full-size MODEL of random weights there")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/cold_start.json and .png")
    options = parser.parse_args()
    model = options.random or "spark"
    starts: dict[str, list[Start]] = {}
    bake_s = 0.0
    try:
        with contextlib.ExitStack() as stack:
            volume = options.volume or Path(stack.enter_context(tempfile.TemporaryDirectory()))
            if options.random:
                random_models.write(options.random, volume)
            bake_s = bake(model, volume)
            for _ in range(options.rounds):
                measure(model, volume, starts)
    finally:
        tell(model, options.rounds, bake_s, starts, options.save)
    return wrong(starts)


def measure(model: str, volume: Path, starts: dict[str, list[Start]]) -> None:
    """One start of every variant, each kept in `starts` once it is over."""
    for variant in VARIANTS:
        with arranged(variant, model, volume) as folder:
            dropped = pagecache.drop(volume) if variant.cold else ""
            found = replace(start(model, folder, variant.compile, command=variant.command), cache_dropped_by=dropped)
        starts.setdefault(variant.name, []).append(found)
        print(f"{variant.name}: {found.seconds['total']:.1f} s", flush=True)


def tell(model: str, rounds: int, bake_s: float, starts: Mapping[str, list[Start]], save: bool) -> None:
    """Print, draw and write what was found."""
    rows = {name: medians([found.figures for found in each]) for name, each in starts.items()}
    print_table(rows)
    dropped = {found.cache_dropped_by for each in starts.values() for found in each} - {""}
    figures = {"model": model, "rounds": rounds, "bake_s": bake_s, "cache_dropped_by": sorted(dropped)}
    figures |= {"rows": rows, "ratios": ratios(rows)}
    name = "cold_start" if model == "spark" else f"cold_start_{model}"
    if save and rows:
        chart.stacked(rows, PHASES, report.RESULTS / f"{name}.png", "seconds from process birth to the first picture")
    report.finish(name, figures, save and bool(rows))


def wrong(starts: Mapping[str, list[Start]]) -> int:
    """1 if a start that was to run compiled code did not, which is said too; else 0."""
    compiled = {variant.name for variant in VARIANTS if variant.compile != "off"}
    eager = {name: found.plan for name in starts if name in compiled for found in starts[name] if found.eager}
    for name, plan in eager.items():
        print(f"'{name}' is not compiled: {plan}", file=sys.stderr)
    return int(bool(eager))


def bake(model: str, volume: Path) -> float:
    """Bake `model`; the seconds that took, process and all."""
    begun = time.perf_counter()
    environment = report.environment(*KEPT, KINDLING_VOLUME=str(volume))
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
        for manifest in (volume / "baked" / model).glob("*/manifest.json"):
            if json.loads(manifest.read_text())["facts"]["kind"] in variant.baked:
                (folder / "baked" / model / manifest.parent.name).symlink_to(manifest.parent)
        yield folder


def start(model: str, volume: Path, policy: str, precision: str = "", command: Sequence[str] = SERVE) -> Start:
    """Start a server, ask for one picture, stop it. `policy` is KINDLING_COMPILE; `precision`, if given, wins."""
    environment = report.environment(*KEPT, KINDLING_VOLUME=str(volume), KINDLING_COMPILE=policy)
    environment |= {"KINDLING_MODEL": model, "KINDLING_PUBLISH": "0", "KINDLING_COLD_START_BUDGET_S": "3600"}
    environment |= {"KINDLING_PRECISION": precision} if precision else {}
    begun = time.perf_counter()
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            ledger, address = watch(process)
            asked = time.perf_counter()
            draw(address)
            done = time.perf_counter()
            peak = peak_mb(process.pid)
        finally:
            process.terminate()
            process.communicate()  # to the end: nobody closes a server's stderr while it still has something to say
    phases = {phase["name"]: phase["seconds"] for phase in ledger["phases"]}
    first = next(phase["start_s"] for phase in ledger["phases"])
    seconds = {"python": first, **phases, "serve": done - asked, "total": done - begun}
    return Start(seconds, peak, f"{ledger['plan']}: {ledger['plan_reason']}")


def draw(address: str) -> None:
    """Ask a server for one picture."""
    body = json.dumps({"prompt": "a red circle on a blue background", "seed": 1}).encode()
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{address}/v1/images/generations", body, headers)  # noqa: S310
    with urllib.request.urlopen(request, timeout=600) as answer:  # noqa: S310
        assert len(json.load(answer)["data"]) == 1


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
    """The figures the project promises, each from medians of this run; those whose starts are finished."""

    def compiling(name: str) -> float:
        return rows[name].get("compile", 0.0) + rows[name].get("artifacts", 0.0)

    def total(name: str) -> float:
        return rows[name]["total"]

    pairs = {
        "compile_with_over_without_artifacts": (compiling, "artifacts", "no artifacts"),
        "artifacts_over_eager": (total, "artifacts", "eager"),
        "baked_over_eager": (total, "baked", "eager"),
        "eager_over_all_imports": (total, "eager", "all imports"),
        "cold_cache_over_warm": (total, "eager, cold cache", "eager"),
    }
    return {
        name: round(of(one) / of(other), 3) for name, (of, one, other) in pairs.items() if {one, other} <= rows.keys()
    }


def print_table(rows: dict[str, dict[str, float]]) -> None:
    columns = (*PHASES, "total", "peak_mb")
    print(f"{'':<24}" + "".join(f"{name:>10}" for name in columns))
    for name, row in rows.items():
        print(f"{name:<24}" + "".join(f"{row.get(column, 0.0):>10.2f}" for column in columns))


if __name__ == "__main__":
    sys.exit(main())
