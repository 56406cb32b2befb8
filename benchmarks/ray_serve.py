"""What Ray Serve costs on one machine: `python -m handler serve` beside platform/ray_app.py, both with one spark.

In turns, each from its command on: the first picture, the memory of all its processes, warm requests, a stream's first
byte, and how long what a client left holds up the next one. It runs in the environment that has Ray.

    .venv/ray/bin/python benchmarks/ray_serve.py --save
"""

import argparse
import contextlib
import http.client
import json
import os
import secrets
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import report

ROOT = Path(__file__).parent.parent
ROUTE = "/v1/images/generations"
SMALL = {"prompt": "a red circle on a blue background", "size": "128x128"}
LONG = SMALL | {"size": "512x512", "n": 4, "stream": True, "progress": True}  # `progress` is a first word at once
KEY = "0" * 32
SIDES = ("plain", "ray")
WAIT_S = 180


def main() -> None:
    """Measure, print a line for each side and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="starts of each side (default: 3)")
    parser.add_argument("--requests", type=int, default=40, help="warm requests a start (default: 40)")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/ray.json")
    parser.add_argument("--serve", help=argparse.SUPPRESS)  # the port of what a measured process is started with
    options = parser.parse_args()
    if options.serve:
        serve(int(options.serve))
        return
    with report.measuring("ray", options.save) as figures:
        figures |= {"ray": version("ray"), "rounds": options.rounds, "requests": options.requests, "sides": {}}
        runs: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
        for _ in range(options.rounds):
            for side in SIDES:
                runs[side].append(measured(side, options.requests))
                figures["sides"][side] = summary(runs[side])
                print(side, json.dumps(runs[side][-1] | {"warm_s": None}), flush=True)


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the starts; of warm requests, over all of them."""
    warm = sorted(seconds for run in runs for seconds in run["warm_s"])
    places = {"p50_s": warm[len(warm) // 2], "p99_s": warm[min(len(warm) - 1, len(warm) * 99 // 100)]}
    rest = {name: statistics.median(run[name] for run in runs) for name in runs[0] if name != "warm_s"}
    return {name: round(value, 4) for name, value in (rest | places).items()}


def measured(side: str, requests: int) -> dict[str, Any]:
    """One start of a side, and what it does then."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "handler", "serve", "--port", str(port)]
    if side == "ray":
        command = [sys.executable, __file__, "--serve", str(port)]
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_USAGE_STATS_ENABLED": "0"}
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    given = {"KINDLING_API_KEYS": KEY, "KINDLING_BATCH": "1", "PYTHONPATH": paths, **token}
    start = time.perf_counter()
    process = subprocess.Popen(
        command, env=report.environment(**given), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        first = until_drawn(port, process) - start
        warm = [timed(lambda: post(port, SMALL)) for _ in range(requests)]
        streams = [timed(lambda: begun(port)) for _ in range(5)]
        left = [behind_one_that_left(port) for _ in range(3)]
        return {
            "first_picture_s": first,
            "memory_mb": memory_mb(process.pid),
            "processes": len(family(process.pid)),
            "stream_s": statistics.median(streams),
            "after_leaving_s": statistics.median(left),
            "warm_s": warm,
        }
    finally:
        all_of_it = family(process.pid)
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(60)
        for pid in all_of_it:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def serve(port: int) -> None:
    """The application on a Ray of its own, until told to stop."""
    sys.path.insert(0, str(ROOT / "platform"))
    import ray
    import ray_app
    from ray import serve as rays

    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    ray.init(num_cpus=2, object_store_memory=100_000_000, include_dashboard=False, log_to_driver=False)
    rays.start(http_options={"port": port})
    spark = {"model": "spark", "autoscaling": {"min_replicas": 1, "max_replicas": 1}}
    rays.run(ray_app.app(ray_app.Arguments(models=[spark])), name="kindling")
    stop.wait()
    rays.shutdown()
    ray.shutdown()


def until_drawn(port: int, process: subprocess.Popen[bytes]) -> float:
    """When there is a first picture, in `time.perf_counter`'s seconds."""
    end = time.perf_counter() + WAIT_S
    while time.perf_counter() < end and process.poll() is None:
        with contextlib.suppress(OSError, http.client.HTTPException, RuntimeError):
            post(port, SMALL)
            return time.perf_counter()
        time.sleep(0.05)
    raise RuntimeError("there was no first picture")


def asked(port: int, body: dict[str, Any]) -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=WAIT_S)
    headers = {"authorization": f"Bearer {KEY}", "content-type": "application/json"}
    connection.request("POST", ROUTE, json.dumps(body), headers)
    answer = connection.getresponse()
    if answer.status != 200:
        raise RuntimeError(answer.read().decode())
    return answer


def post(port: int, body: dict[str, Any]) -> bytes:
    with contextlib.closing(asked(port, body)) as answer:
        return answer.read()


def begun(port: int) -> None:
    """Hear the first of a stream."""
    with contextlib.closing(asked(port, SMALL | {"stream": True, "progress": True})) as answer:
        answer.read(1)


def behind_one_that_left(port: int) -> float:
    """Seconds until a small picture comes, asked for when the client of a long request has just hung up."""
    long = asked(port, LONG)
    long.read(1)
    long.close()
    return timed(lambda: post(port, SMALL))


def timed(act: Callable[[], object]) -> float:
    start = time.perf_counter()
    act()
    return time.perf_counter() - start


def family(pid: int) -> list[int]:
    """A process and all that it has started, and those."""
    parents = dict[int, list[int]]()
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            parents.setdefault(parent, []).append(int(folder.name))
    found = [pid]
    for each in found:
        found += parents.get(each, [])
    return found


def memory_mb(pid: int) -> float:
    """Of all of them; what several share counts once (PSS)."""
    total = 0
    for each in family(pid):
        with contextlib.suppress(OSError):
            rollup = Path(f"/proc/{each}/smaps_rollup").read_text()
            total += sum(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:"))
    return total / 1024


if __name__ == "__main__":
    main()
