"""What the host does for a picture while a GPU waits, in milliseconds: walks through module trees, and the PNG.

FLUX.1's modules are those of the full-size model, without memory for weights: only their number counts. The PNG is of
spark's picture "a red circle on a blue background", 1024x1024, with noise of a standard deviation of 6 laid over it
(else it would deflate too well), by one thread and by two. The least of all rounds, for others use this machine too.

    python benchmarks/host.py --save
"""

import argparse
import io
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

import random_models
import report
from handler import ImageRequest, Settings, Worker
from handler.api import codec
from handler.model.families import constants

SIDE = 1024
NOISE = 6


def main() -> None:
    """Measure, print a line for each figure and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=40, help="measurements a figure (default: 40)")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/host.json")
    options = parser.parse_args()
    figures = {**walks(options.rounds), **pngs(options.rounds)}
    for name, ms in figures.items():
        print(f"{name:<34}{ms:>10.3f} ms")
    report.finish("host", {"rounds": options.rounds, "ms": figures}, options.save)


def walks(rounds: int) -> dict[str, float]:
    """`_execution_device` of FLUX.1's pipeline, as diffusers finds it and as it was noted."""
    pipeline_class, parts = random_models.CONFIGS["flux-schnell"]
    pipeline = pipeline_class(**{name: random_models.made(part) for name, part in parts.items()})
    asked = {"where FLUX.1 runs, diffusers": lambda: pipeline._execution_device}
    before = least(asked, rounds)
    constants.settle(pipeline)
    return before | least({"where FLUX.1 runs, settled": lambda: pipeline._execution_device}, rounds)


def pngs(rounds: int) -> dict[str, float]:
    """A PNG as a worker writes it, by threads, and by Pillow; and what is not shared among threads."""
    rgb = picture()

    def png(threads: int) -> bytes:
        if threads != codec.THREADS:
            codec.THREADS = threads
            codec._pool.cache_clear()
        return codec.encode(rgb, "png", 100, None)

    rows = codec._filtered(rgb)
    stripe = rows[: max(1, codec.STRIPE // rows.shape[1])].data
    ways: dict[str, Callable[[], Any]] = {
        "PNG 1024x1024, one thread": lambda: png(1),
        "PNG 1024x1024, two threads": lambda: png(2),
        "one of its 13 stripes": lambda: codec._stripe(stripe),
        "its filter": lambda: codec._filtered(rgb),
        "PNG 1024x1024, Pillow": lambda: Image.fromarray(rgb).save(io.BytesIO(), "png"),
    }
    return least(ways, rounds)


def picture() -> Any:
    """uint8 (1024, 1024, 3)."""
    worker = Worker.boot(Settings.from_env(model="spark"))
    asked = ImageRequest(prompt="a red circle on a blue background", seed=1, width=SIDE, height=SIDE)
    pixels, _ = worker.generate(worker.spec.recipe(asked))
    noise = np.random.default_rng(0).normal(0, NOISE, (SIDE, SIDE, 3))
    return np.clip(pixels.rgb + noise, 0, 255).astype(np.uint8)


def least(ways: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Milliseconds that each took at best, in turns after one warm-up."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, way in ways.items():
            begun = time.perf_counter()
            way()
            if number:
                taken[name].append((time.perf_counter() - begun) * 1000)
    return {name: round(min(times), 3) for name, times in taken.items()}


if __name__ == "__main__":
    main()
