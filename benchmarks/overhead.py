"""What Kindling adds to diffusers: request JSON to response JSON over HTTP, against the bare pipeline.

Both sides draw the same pictures with spark on this machine in this run, in turns: "served" is a POST to a real
server process; "bare" is FluxPipeline called directly, Pillow's default PNG, base64 and json.dumps. The ratio of
medians is the figure; absolute times depend on the machine. Also the import time of `handler` and peak memory.
"""

import argparse
import base64
import contextlib
import http.client
import io
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from diffusers import FluxPipeline

import report

ROOT = Path(__file__).parent.parent
WEIGHTS = ROOT / "handler" / "weights" / "spark"
PROMPT = "a red circle on a blue background"
STEPS, TOKENS = 4, 32


def main() -> None:
    """Measure, print a table and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7, help="pictures a side and size (default: 7)")
    parser.add_argument("--sides", type=int, nargs="+", default=[256, 512, 1024], help="picture sides in pixels")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/overhead.json")
    options = parser.parse_args()
    imports = import_times()
    pipeline = FluxPipeline.from_pretrained(WEIGHTS, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    with report.measuring("overhead", options.save) as figures, server() as (address, process):
        figures |= {"rows": (rows := []), **imports}
        for side in options.sides:
            rows.append(row := compare(pipeline, address, side, options.rounds))
            print("{side:>5}: bare {bare_s:.3f} s, served {served_s:.3f} s, served/bare {ratio:.2f}".format(**row))
        memory = {"served_peak_mb": peak_mb(process), "bare_peak_mb": resource.getrusage(0).ru_maxrss // 1024}
        print(f"import handler: {imports['import_handler_s']:.3f} s; peak memory {memory}")
        figures |= memory


def compare(pipeline: FluxPipeline, address: str, side: int, rounds: int) -> dict[str, Any]:
    """Median seconds of both sides, taken in turns after one warm-up each."""
    sides: dict[str, Callable[[int], bytes]] = {
        "bare_s": lambda seed: bare(pipeline, side, seed),
        "served_s": lambda seed: served(address, side, seed),
    }
    spent: dict[str, list[float]] = {name: [] for name in sides}
    for seed in range(rounds + 1):
        for name, draw in sides.items():
            start = time.perf_counter()
            draw(seed)
            spent[name].append(time.perf_counter() - start)
    medians = {name: round(statistics.median(times[1:]), 4) for name, times in spent.items()}
    return {"side": side, **medians, "ratio": round(medians["served_s"] / medians["bare_s"], 3)}


def bare(pipeline: FluxPipeline, side: int, seed: int) -> bytes:
    """What one would write by hand."""
    image = pipeline(
        PROMPT,
        width=side,
        height=side,
        num_inference_steps=STEPS,
        guidance_scale=0.0,
        max_sequence_length=TOKENS,
        generator=torch.Generator().manual_seed(seed),
    ).images[0]
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return json.dumps({"data": [{"b64_json": base64.b64encode(buffer.getvalue()).decode()}]}).encode()


def served(address: str, side: int, seed: int) -> bytes:
    """The same picture from the server."""
    where = urlsplit(address)
    connection = http.client.HTTPConnection(where.hostname or "", where.port)
    body = {"prompt": PROMPT, "size": f"{side}x{side}", "seed": seed, "num_inference_steps": STEPS}
    connection.request("POST", "/v1/images/generations", json.dumps(body), {"Content-Type": "application/json"})
    with contextlib.closing(connection):
        answer = connection.getresponse()
        data = answer.read()
        assert answer.status == 200, data[:300]
        return data


@contextlib.contextmanager
def server() -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """A ready server process and its address."""
    command = [sys.executable, "-m", "handler", "serve", "--port", "0"]
    with subprocess.Popen(
        command, cwd=ROOT, env=report.environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr
        ready = next(line for line in process.stderr if "is ready on" in line)
        try:
            yield ready.split("is ready on ")[1].split()[0], process
        finally:
            process.terminate()


def peak_mb(process: subprocess.Popen[str]) -> int:
    """A process's largest resident memory so far."""
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) // 1024


def import_times() -> dict[str, float]:
    """Median seconds that `import handler` adds to starting Python, over five starts each."""

    def start(code: str) -> float:
        times = []
        for _ in range(5):
            begun = time.perf_counter()
            subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
            times.append(time.perf_counter() - begun)
        return statistics.median(times)

    return {"import_handler_s": round(start("import handler") - start("pass"), 4)}


if __name__ == "__main__":
    main()
