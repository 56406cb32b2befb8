"""What a process takes until it has imported what draws and loaded spark, with the measures of `imports.py` and
`upstream.py` in `handler/model/` one after the other.

Each start is a fresh process; the rows take turns, so their ratios hold on a busy machine. Seconds of the processor are
told beside those that passed: what others do here changes them less. `handler` is what `import handler` takes, `import`
and `loaded` count from a process that has it; `modules` are all that are loaded in the end, and `of` some of those.

    python benchmarks/imports.py --save
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import report

ROOT = Path(__file__).parent.parent
TOLD = ("torch", "scipy", "sympy", "botocore", "torchao", "websockets")
# By row, which measures are undone before it starts, of these:
UNDONE = {
    "torchao": "imports.HIDDEN = ()",
    "collector": "imports.uncollected = nullcontext",
    "late": "imports.LATE = {}",
    **{name: f"upstream.MEASURES.pop({name!r})" for name in ("structure", "distributions", "dynamo", "distributed")},
}
MEASURES = tuple(UNDONE)
ROWS = {
    "torchao found too": MEASURES,
    "before": MEASURES[1:],
    "no collection": MEASURES[2:],
    "scipy and boto3 late": MEASURES[3:],
    "transformers read never": MEASURES[4:],
    "distributions not asked": MEASURES[5:],
    "compiler waits": MEASURES[6:],
    "for one GPU": (),
}
START = f"""
import time
begun, worked = time.perf_counter(), time.process_time()
import collections, gc, json, resource, sys
from contextlib import nullcontext
from handler import Clock, Settings, Worker, dedicated
of_handler, begun = time.perf_counter() - begun, time.perf_counter()
from handler.model import imports, upstream
dedicated()
exec(sys.argv[1])
ledger = Worker.boot(Settings(compile="off"), Clock(3600, publish=lambda ledger: None)).ledger
seconds = {{phase.name: phase.seconds for phase in ledger.phases}}
roots = collections.Counter(name.split(".")[0] for name, module in [*sys.modules.items()] if module)
print(json.dumps({{
    "handler_s": of_handler, "import_s": seconds["import"], "loaded_s": time.perf_counter() - begun,
    "processor_s": time.process_time() - worked, "modules": roots.total(),
    "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    "of": {{name: roots[name] for name in {TOLD}}},
}}))
"""


def main() -> None:
    """Start every row `--rounds` times, in turns; a table and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="starts of each row (default: 3)")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/imports.json")
    options = parser.parse_args()
    with report.measuring("imports", options.save) as figures:
        figures["rounds"] = options.rounds
        found: dict[str, list[dict[str, Any]]] = {name: [] for name in ROWS}
        start("")  # which leaves byte code, and what transformers finds in its models
        for _ in range(options.rounds):
            for name, undone in ROWS.items():
                found[name].append(start("; ".join(UNDONE[each] for each in undone)))
            figures["rows"] = {name: medians(starts) for name, starts in found.items() if starts}
        before = figures["rows"]["before"]
        for name, row in figures["rows"].items():
            row["of_before"] = {key: round(row[key] / before[key], 3) for key in ("import_s", "processor_s")}
            print(f"{name:<24}" + "".join(f"{key} {value}  " for key, value in row.items() if key != "of"))


def start(undo: str) -> dict[str, Any]:
    """One start's figures."""
    command = [sys.executable, "-c", START, undo]
    environment = report.environment(PYTHONPATH=str(ROOT), PYTHONDONTWRITEBYTECODE="")
    done = subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def medians(starts: list[dict[str, Any]]) -> dict[str, Any]:
    """Of each figure its median; of the counted modules the last."""
    numbers = {name: round(statistics.median(each[name] for each in starts), 3) for name in starts[0] if name != "of"}
    return {**numbers, "of": starts[-1]["of"]}


if __name__ == "__main__":
    main()
