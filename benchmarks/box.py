"""What several workers behind one queue cost and bring: `serve --workers 1` against 2, spark on CPU processes.

Seconds until the first worker is ready; memory of all processes, their shared pages counted once (PSS); what the hop
to a worker's process adds to a small picture's latency, asked in turns; pictures a second with as many clients as keep
all busy. Latencies are medians of wall time; processor time, which others on the machine disturb less, is the mean of
all that the server's processes used. Any other server with OpenAI's route can be measured beside them: --beside URL.

    python benchmarks/box.py --save
"""

import argparse
import contextlib
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

import report
from serving import Server, complete, started

ASKED = {"size": "64x64", "response_format": "b64_json", "prompt": "a red circle on a blue background"}
WORKERS = (1, 2)
CLIENTS = 4
TICKS = 100  # of /proc/PID/stat, in a second


def main() -> None:
    """Measure, print a line for each server and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--starts", type=int, default=3, help="of each (default: 3)")
    parser.add_argument("--rounds", type=int, default=60, help="pictures of each for the hop (default: 60)")
    parser.add_argument("--pictures", type=int, default=48, help="of each for the throughput (default: 48)")
    parser.add_argument("--size", default="256x256", help="of the throughput's pictures (default: 256x256)")
    parser.add_argument("--beside", help="another server, measured too but for its start and its memory")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/box.json")
    options = parser.parse_args()
    with report.measuring("box", options.save) as figures, contextlib.ExitStack() as stack:
        begun: dict[str, list[float]] = {str(count): [] for count in WORKERS}
        for _ in range(options.starts - 1):
            for count in begun:
                with ready(count, begun[count]):
                    pass
        servers = {count: stack.enter_context(ready(count, begun[count])) for count in begun}
        rows = {count: {"ready_s": median(begun[count]), **memory(servers[count])} for count in servers}
        if options.beside:
            servers["beside"], rows["beside"] = Server(options.beside), {}
        figures |= {"rounds": options.rounds, "pictures": options.pictures, "workers": rows}
        hop(servers, rows, options.rounds)
        throughput(servers, rows, options.pictures, options.size)
        for name, row in rows.items():
            row["hop_ms"] = round(row["latency_ms"] - rows["1"]["latency_ms"], 3)
            print(f"{name:>7}: " + ", ".join(f"{key} {value}" for key, value in row.items()), flush=True)


@contextlib.contextmanager
def ready(count: str, seconds: list[float]) -> Iterator[Server]:
    """A server with so many workers, of which the first is ready; how long that took is added."""
    since = time.perf_counter()
    with started(600, KINDLING_WORKERS=count, KINDLING_BATCH="1", KINDLING_DEVICE="cpu") as server:
        seconds.append(time.perf_counter() - since)
        while not all(one["status"] == "ready" for one in state(server).get("workers", [])):
            time.sleep(0.1)
        yield server


def state(server: Server) -> dict[str, Any]:
    """What its health says."""
    found: dict[str, Any] = httpx.get(f"{server.address}/health/ready", trust_env=False).json()
    return found


def hop(servers: dict[str, Server], rows: dict[str, dict[str, Any]], rounds: int) -> None:
    """Latency of small pictures, one after another, the servers in turns."""
    seconds: dict[str, list[float]] = {name: [] for name in servers}
    used = dict.fromkeys(servers, 0.0)
    for i in range(rounds + 5):  # the first are cold
        for name, server in servers.items():
            before = processor_s(server)
            [outcome] = complete(server.load([ASKED | {"seed": i}], 1)[1])
            seconds[name].append(outcome.latency)
            used[name] += (processor_s(server) - before) * (i >= 5)
    for name in servers:
        rows[name] |= {"latency_ms": round(1e3 * median(seconds[name][5:]), 3)}
        rows[name] |= {"picture_cpu_ms": round(1e3 * used[name] / rounds, 2)}


def throughput(servers: dict[str, Server], rows: dict[str, dict[str, Any]], pictures: int, size: str) -> None:
    """Pictures a second with several clients, the servers in turns."""
    rates: dict[str, list[float]] = {name: [] for name in servers}
    for turn in range(3):
        for name, server in servers.items():
            asked = [ASKED | {"size": size, "seed": 1000 * turn + i} for i in range(pictures // 3)]
            duration, outcomes = server.load(asked, CLIENTS)
            rates[name].append(len(complete(outcomes)) / duration)
    for name in servers:
        rows[name] |= {"pictures_per_s": round(median(rates[name]), 3)}


def family(server: Server) -> list[int]:
    """The server's process and all below it."""
    found, new = list[int](), [server.pid] if server.pid else []
    while new:
        found += new
        tasks = [path for pid in new for path in Path(f"/proc/{pid}/task").glob("*/children")]
        new = [int(pid) for path in tasks for pid in path.read_text().split()]
    return found


def memory(server: Server) -> dict[str, float]:
    """MB of all its processes."""
    rollups = [Path(f"/proc/{pid}/smaps_rollup").read_text() for pid in family(server)]
    return {"memory_mb": round(sum(int(text.split("\nPss:")[1].split()[0]) for text in rollups) / 1024, 1)}


def processor_s(server: Server) -> float:
    """Seconds of processors that all its processes have used."""
    stats = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in family(server)]
    return sum(int(stat[11]) + int(stat[12]) for stat in stats) / TICKS


def median(values: list[float]) -> float:
    return round(statistics.median(values), 4)


if __name__ == "__main__":
    main()
