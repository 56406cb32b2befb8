"""Images that ask a decoder for as much as they may: what the worst of each format cost, and who waits for them.

Each file is decoded in a process that does nothing else: seconds of processor time, with what HEIC and AVIF take in
their own process, and how much memory grew, without that (handler/api/isolated.py has its bound). `beside` sends them
to a server together with requests that have no image, for benchmarks/endurance.py.
"""

import argparse
import asyncio
import base64
import json
import math
import resource
import statistics
import struct
import subprocess
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image

import report

sys.path.append(str(Path(__file__).parents[1] / "tests/doubles"))
import image_bombs

SIDE, PROGRESSIVE, BASELINE = 4096, 8000, 14_400  # as many pixels as are decoded, of either kind of JPEG
EDITS, ROUTE = "/v1/images/edits", "/v1/images/generations"
GOOD = {"prompt": "a red circle", "size": "64x64", "seed": 1}
CLIENTS, PATIENCE_S = 6, 5


def noise(channels: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, channels), np.uint8))


def png(kind: int, depth: int, bits: int, interlaced: int = 0, chunk: bytes = b"") -> bytes:
    """All black, of so many bits a pixel."""
    header = struct.pack(">IIBBBBB", SIDE, SIDE, depth, kind, 0, 0, interlaced)
    rows = zlib.compress(bytes(SIDE * (bits * SIDE // 8 + 2)), 9)
    parts = [image_bombs.png_chunk(b"IHDR", header), chunk, image_bombs.png_chunk(b"IDAT", rows)]
    return image_bombs.PNG + b"".join(parts) + image_bombs.png_chunk(b"IEND", b"")


def full_scans() -> bytes:
    """A progressive JPEG in as many scans as it may have, each of which says of every block that nothing is in it."""
    data = image_bombs.jpeg_of_scans(1, PROGRESSIVE)[:-2]
    table = b"\xff\xc4\0\x15\x10\1\1" + bytes(14) + b"\0\1"  # for luma: that is one bit, 0
    scan = b"\xff\xda\0\x08\1\1\0\1\x3f\0" + bytes(PROGRESSIVE * PROGRESSIVE // 64 // 8)
    return data + table + 63 * scan + b"\xff\xd9"


saved = image_bombs.saved
WORST: dict[str, Callable[[], bytes]] = {
    "PNG, 16 bits, one colour transparent": lambda: png(2, 16, 48, chunk=image_bombs.png_chunk(b"tRNS", bytes(6))),
    "PNG, 16 bits with alpha, interlaced": lambda: png(6, 16, 64, interlaced=1),
    "PNG of noise": lambda: saved(noise(3), "PNG", compress_level=1),
    "JPEG, 64 scans of 64 million pixels": full_scans,
    "JPEG, 207 million pixels": lambda: saved(image_bombs.red(BASELINE), "JPEG"),
    "JPEG of noise, progressive": lambda: saved(noise(3), "JPEG", quality=95, progressive=True),
    "WebP of noise, lossless": lambda: saved(noise(3), "WEBP", lossless=True, method=0, quality=0),
    "AVIF of noise, with alpha": lambda: saved(noise(4), "AVIF", speed=10, quality=90, subsampling="4:4:4"),
    "HEIC without end": image_bombs.ENDLESS,
}


def cost(name: str) -> dict[str, Any]:
    """In a process that does nothing else."""
    image_bombs.told(image_bombs.png_with())  # for what is imported then
    data = sys.stdin.buffer.read()
    Path("/proc/self/clear_refs").write_text("5")  # memory's peak begins anew (proc_pid_clear_refs(5))
    held, before = peak_mb(), times()
    answer = image_bombs.told(data)
    spent = times() - before
    return {
        "file_mb": round(len(data) / 1e6, 2),
        "cpu_s": round(spent, 2),
        "memory_mb": round(peak_mb() - held),
        "answer": answer,
    }


def times() -> float:
    """Seconds of processor time, of all processes that have ended too."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def peak_mb() -> float:
    """Of this process alone."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) / 1e3


async def beside(http: httpx.AsyncClient, seconds: float, clients: int = CLIENTS) -> dict[str, Any]:
    """So many clients send bombs that a server can only end by its clock or refuse; one, meanwhile, asks for pictures.

    Milliseconds of the good ones, alone before and beside; how often each status was the answer to the others.
    """
    alone, beside, answers, over = [], [], Counter[int](), time.monotonic() + 2 * seconds
    files = [image_bombs.jpeg_of_scans(8000), image_bombs.ENDLESS(), png(2, 16, 48)]

    async def ask(path: str, body: dict[str, Any], headers: dict[str, str] | None = None) -> tuple[int, float]:
        begun = time.perf_counter()
        answer = await http.post(path, json=body, headers=headers)
        return answer.status_code, 1e3 * (time.perf_counter() - begun)

    async def attack(i: int) -> None:
        sent = {"prompt": "x", "images": [base64.b64encode(files[i % len(files)]).decode()], "size": "64x64"}
        while time.monotonic() < over:
            status, _ = await ask(EDITS, sent, {"x-deadline-s": str(PATIENCE_S)})
            answers[status] += 1

    async def enjoy(until: float, into: list[float]) -> None:
        while time.monotonic() < until:
            status, took = await ask(ROUTE, GOOD)
            into.append(took if status == 200 else float("inf"))

    await enjoy(over - seconds, alone)
    await asyncio.gather(enjoy(over, beside), *map(attack, range(clients)))
    return {"alone": spread(alone), "beside": spread(beside), "bombs": {str(k): n for k, n in sorted(answers.items())}}


def spread(milliseconds: list[float]) -> dict[str, Any]:
    """Of requests, those that failed took for ever: null where so many did."""
    p99 = statistics.quantiles(milliseconds, n=100, method="inclusive")[98]
    found = {"p50_ms": statistics.median(milliseconds), "p99_ms": p99}
    return {"requests": len(milliseconds)} | {
        name: round(ms) if math.isfinite(ms) else None for name, ms in found.items()
    }


def main() -> None:
    """Measure, print a line for each file, end with one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--one", choices=WORST, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=20, help="alone, and beside the bombs (default: 20)")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/bombs.json")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(cost(options.one)))
        return
    with report.measuring("bombs", options.save) as found:
        for name, make in WORST.items():
            command = [sys.executable, __file__, "--one", name]
            out = subprocess.run(command, input=make(), capture_output=True, check=True)
            found[name] = json.loads(out.stdout)
            print(name, out.stdout.decode().strip(), flush=True)
        from serving import started  # which is no matter of a process that decodes

        with started(timeout=600) as server:
            found["beside"] = asyncio.run(measured(server.client, options.seconds))


async def measured(client: Callable[[], httpx.AsyncClient], seconds: float) -> dict[str, Any]:
    async with client() as http:
        return await beside(http, seconds)


if __name__ == "__main__":
    main()
