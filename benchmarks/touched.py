"""What the list of a start's files saves where the page cache is cold: starts with and without it, in turns.

A start is `Worker.boot` of spark in a new process of its own. Before each, this environment's files are dropped from
the page cache, but for those that another process has mapped: run it while nobody else uses torch. `warm` starts drop
nothing.

    python benchmarks/touched.py --save     about 3 minutes; writes benchmarks/results/touched.json
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

import pagecache

import report

LIST = Path(sys.prefix, "kindling.touched")
RECORD = "from handler.worker import touched; touched.record()"
START = """
import json, resource
from handler import Settings, Worker, dedicated
dedicated()
with Worker.boot(Settings(compile="off")) as worker:
    used = resource.getrusage(resource.RUSAGE_SELF)
    seconds = {phase.name: phase.seconds for phase in worker.ledger.phases}
    print(json.dumps({"total_s": worker.ledger.total_s, "import_s": seconds["import"],
        "processor_s": used.ru_utime + used.ru_stime, "read_mb": used.ru_inblock * 512 / 1e6}))
"""
KINDS = {  # whether there is a list, and whether the page cache is cold
    "cold, without a list": (False, True),
    "cold, with a list": (True, True),
    "warm, without a list": (False, False),
    "warm, with a list": (True, False),
}


def start(listed: bool, cold: bool) -> dict[str, float]:
    """One start: what it took."""
    LIST.unlink(missing_ok=True)
    environment = report.environment(KINDLING_DEVICE="cpu")
    if listed:
        subprocess.run([sys.executable, "-c", RECORD], check=True, env=environment)
    if cold:
        pagecache.drop_files([Path(sys.prefix).resolve()])
    done = subprocess.run([sys.executable, "-c", START], check=True, env=environment, stdout=subprocess.PIPE)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def main() -> None:
    """Measure; print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/touched.json")
    options = parser.parse_args()
    kept = LIST.read_bytes() if LIST.exists() else None
    found: dict[str, list[dict[str, float]]] = {name: [] for name in KINDS}
    try:
        with report.measuring("touched", options.save) as figures:
            for _ in range(options.rounds):
                for name, kind in KINDS.items():
                    found[name].append(start(*kind))
            for name, starts in found.items():
                figures[name] = {key: round(statistics.median(one[key] for one in starts), 3) for key in starts[0]}
            figures["rounds"] = options.rounds
    finally:
        LIST.write_bytes(kept) if kept is not None else LIST.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
