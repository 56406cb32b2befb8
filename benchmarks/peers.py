"""Kindling beside what one would write instead: diffusers behind FastAPI and behind LitServe, and both sides compiled.

`contestants/` has their servers: the same pictures of the same model in the same dtype, drawn by one thread, as PNGs in
OpenAI's JSON. Each is a process of its own, all are up, and they take turns request by request or crowd by crowd, so
that what else the machine does hits all alike. LitServe batches up to eight requests, as Kindling does. `make peers`
sets their environment up and runs this:

    python benchmarks/peers.py --save

With `--contestants kindling fastapi litserve` nothing is compiled, and half the time is enough.

`picture_s` is a turn's duration for each of its pictures, the median of the turns; `processor_s` what the server's
processes worked for it, which other programs change less. `ratios` are Kindling's seconds of each peer's. A cold start
counts from the birth of the process to its first picture over HTTP. The compiled peer has Inductor's cache from an
earlier start, and the compiled Kindling what `bake` leaves: `prepare_s` says what each of these took.
"""

import argparse
import contextlib
import itertools
import json
import signal
import statistics
import subprocess
import sys
import tempfile
from base64 import b64decode
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import report
from contestant import CONTESTANTS, ENVIRONMENT, Running, prepare, running
from serving import Outcome, complete, prompts, quantile

STEPS = 4
PACKAGES = ("fastapi", "litserve", "uvicorn", "starlette")


@dataclass(frozen=True, slots=True)
class Case:
    """A row: what is asked for, by how many at once, how often in a turn, in how many turns."""

    side: int
    n: int
    clients: int
    requests: int
    turns: int

    @property
    def name(self) -> str:
        return f"{self.side} x {self.side}, n={self.n}, {self.clients} client{'s' * (self.clients > 1)}"

    def bodies(self, turn: int) -> list[dict[str, Any]]:
        """No two of them equal, and the same for every contestant."""
        asked = {"size": f"{self.side}x{self.side}", "n": self.n, "num_inference_steps": STEPS}
        texts = prompts("spark", self.requests)
        return [{"prompt": text, "seed": 1000 * turn + 4 * i, **asked} for i, text in enumerate(texts)]


CASES = (
    Case(64, 1, 1, 12, 5),
    Case(64, 4, 1, 6, 5),
    Case(64, 1, 50, 100, 3),
    Case(256, 1, 1, 3, 5),
    Case(256, 4, 1, 1, 5),
    Case(256, 1, 50, 50, 1),
    Case(512, 1, 1, 1, 3),
    Case(512, 4, 1, 1, 2),
    Case(1024, 1, 1, 1, 3),
    Case(1024, 4, 1, 1, 1),
)
WARM = 256  # the largest side at which several pictures are asked for before anything is measured


def main() -> int:
    """Cold starts first, then rows in turns; a table and one JSON line. Exit code 1: Kindling is behind in a row."""
    options = arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # or the servers would stay
    cases = [case for case in CASES if case.side in options.sides]
    with report.measuring("peers", options.save) as figures, contextlib.ExitStack() as stack:
        figures["peers_versions"] = installed(options.environment)
        folders = {name: Path(stack.enter_context(tempfile.TemporaryDirectory())) for name in options.contestants}
        compiled = [name for name in folders if CONTESTANTS[name].compiled]
        figures["prepare_s"] = {name: prepare(name, folders[name], options.environment) for name in compiled}
        figures["cold_start"] = cold_starts(folders, options)
        up = {name: stack.enter_context(running(name, each, options.environment)) for name, each in folders.items()}
        warm(up, cases)
        figures["pictures"] = alike(up)
        for figures["rows"] in measured(up, cases):
            pass
        for each in figures["rows"]:
            tell(each, "picture_s")
        figures["memory"] = row("memory", {name: each.memory_mb() for name, each in up.items()}, "held_mb")
        tell(figures["memory"], "held_mb")
        figures["behind"] = behind([figures["cold_start"], *figures["rows"], figures["memory"]])
    return int(bool(figures["behind"]))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--contestants", nargs="+", choices=CONTESTANTS, default=[*CONTESTANTS], help="default: all")
    sides = sorted({case.side for case in CASES})
    parser.add_argument("--sides", nargs="+", type=int, choices=sides, default=sides, help="default: all")
    parser.add_argument("--starts", type=int, default=2, help="cold starts of each (default: 2)")
    parser.add_argument("--environment", type=Path, default=ENVIRONMENT, help="the peers' (default: .venv/peers)")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/peers.json")
    return parser.parse_args()


def installed(environment: Path) -> dict[str, str]:
    """The versions of what serves the peers. Raises SystemExit without their environment."""
    code = (
        f"import json; from importlib.metadata import version as v; print(json.dumps({{p: v(p) for p in {PACKAGES}}}))"
    )
    try:
        out = subprocess.run([environment / "bin/python", "-c", code], check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        raise SystemExit(f"The peers are not installed in {environment}: `make peers` installs and measures.") from None
    found: dict[str, str] = json.loads(out.stdout)
    return found


def cold_starts(folders: Mapping[str, Path], options: argparse.Namespace) -> dict[str, Any]:
    """A row of starts in turns, each ended once it has drawn."""
    found: dict[str, list[float]] = {name: [] for name in folders}
    for _, (name, folder) in itertools.product(range(options.starts), folders.items()):
        with running(name, folder, options.environment) as each:
            found[name].append(each.first_picture_s)
    took = {name: {"first_picture_s": statistics.median(each)} for name, each in found.items()}
    tell(whole := row("cold start", took, "first_picture_s"), "first_picture_s")
    return whole


def warm(up: Mapping[str, Running], cases: Sequence[Case]) -> None:
    """One request of each shape first, in the cases' order: whoever compiles does it now."""
    for case, each in itertools.product(cases, up.values()):
        if case.clients == 1 and (case.n == 1 or case.side <= WARM):
            complete(each.server.load(case.bodies(0)[:1], 1)[1])


def alike(up: Mapping[str, Running]) -> dict[str, dict[str, float]]:
    """The same picture by each: by how many of 255 levels it differs from the first one's at most, and its bytes."""
    asked = Case(256, 1, 1, 1, 1).bodies(0)
    pictures = {name: pngs(complete(each.server.load(asked, 1)[1])[0])[0] for name, each in up.items()}
    seen = {name: pixels(png) for name, png in pictures.items()}
    first = next(iter(seen.values()))
    return {name: {"levels": int(abs(each - first).max()), "bytes": len(pictures[name])} for name, each in seen.items()}


def pngs(outcome: Outcome) -> list[bytes]:
    return [b64decode(picture["b64_json"]) for picture in outcome.answer["data"]]


def pixels(png: bytes) -> Any:
    """Of every channel 0 to 255, as numbers that can be subtracted."""
    return np.asarray(Image.open(BytesIO(png)).convert("RGB"), int)


def measured(up: Mapping[str, Running], cases: Sequence[Case]) -> Iterator[list[dict[str, Any]]]:
    """After each round of turns, which begins with another contestant each time, a row for each case."""
    found: dict[Case, dict[str, list[dict[str, float]]]] = {case: {name: [] for name in up} for case in cases}
    for number in range(1, 1 + max(case.turns for case in cases)):
        order = [*up][number % len(up) :] + [*up][: number % len(up)]
        for case, name in itertools.product(cases, order):
            if number <= case.turns:
                found[case][name].append(turn(up[name], case, number))
        yield [
            row(case.name, {name: medians(turns) for name, turns in each.items()}, "picture_s")
            for case, each in found.items()
        ]


def turn(contestant: Running, case: Case, number: int) -> dict[str, float]:
    """What its pictures took. Raises SystemExit if one was not drawn."""
    worked = contestant.processor_s()
    duration, outcomes = contestant.server.load(case.bodies(number), case.clients)
    pictures = case.n * len(complete(outcomes))
    latencies = sorted(outcome.latency for outcome in outcomes)
    return {
        "picture_s": duration / pictures,
        "processor_s": (contestant.processor_s() - worked) / pictures,
        "latency_p50_s": quantile(latencies, 0.5) or 0.0,
        "latency_p99_s": quantile(latencies, 0.99) or 0.0,
    }


def medians(turns: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: statistics.median(each[name] for each in turns) for name in turns[0]}


def row(name: str, figures: Mapping[str, Mapping[str, float]], key: str) -> dict[str, Any]:
    """Each contestant's figures, and Kindling's `key` divided by each peer's; the same of the processor's seconds."""
    rounded = {name: {field: round(value, 5) for field, value in each.items()} for name, each in figures.items()}
    worked = {"processor_ratios": ratios(figures, "processor_s")} if key == "picture_s" else {}
    return {"name": name, "contestants": rounded, "ratios": ratios(figures, key), **worked}


def ratios(figures: Mapping[str, Mapping[str, float]], key: str) -> dict[str, float]:
    pairs = [(ours, peer) for ours, one in CONTESTANTS.items() for peer in one.peers if {ours, peer} <= figures.keys()]
    return {f"{ours}/{peer}": round(figures[ours][key] / figures[peer][key], 3) for ours, peer in pairs}


def tell(row: Mapping[str, Any], key: str) -> None:
    figures = "".join(f"  {name} {each[key]:.4g}" for name, each in row["contestants"].items())
    print(f"{row['name']:<28}{figures}  {row['ratios']}", flush=True)


def behind(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Where a peer is ahead, said too."""
    found = [f"{each['name']}: {pair} {ratio}" for each in rows for pair, ratio in each["ratios"].items() if ratio > 1]
    for line in found:
        print(f"behind: {line}")
    return found


if __name__ == "__main__":
    sys.exit(main())
