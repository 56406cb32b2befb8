"""Warm pictures of full-size models: Kindling, eager and compiled, against plain diffusers.

Each side is a process of its own, and all draw the same pictures, asked for one by one, in turns (where the GPU
holds the model once for each side; else one side after the other: `turns` says which). Plain diffusers gets the same
steps, guidance, size, text length and precision, goes straight to the device, and writes its PNGs with Pillow.
Prompts differ, so that every picture pays for its text. `picture_s` is from prompt to PNG, `png_s` the PNG's part in
it (pictures of random weights are noise), `step_s` what one more step takes, `peak_gb` the most memory ever held,
loading and compiling included. `tflop` is the arithmetic of a picture, counted by torch on the plain pipeline;
`floor_s` how long the GPU takes for that at the rates below, and the bars show how far each side is from it. Weights
are random: `random_models.py` writes them where the volume has none.

On a lent GPU `gpu.py` comes first: it writes no models. This one, in the repository's root, in ten minutes, after
the same first lines as there:

    timeout -s INT 370 python3 benchmarks/cold_start.py --random flux-schnell --rounds 1 --save;
    timeout -s INT 200 python3 benchmarks/latency.py --models sdxl-turbo z-image-turbo sd3.5-large --pictures 3 --save;
    cp benchmarks/results/latency.* benchmarks/results/cold_start_flux-schnell.* $OUT

and in a second call, after the same first lines, the precisions (compiling four sides takes most of the time):

    timeout -s INT 560 python3 benchmarks/latency.py --models flux-schnell flux-dev --pictures 3 --save
        --sides diffusers kindling-compiled kindling-fp8 kindling-fp8-tensor; cp benchmarks/results/latency.* $OUT

and in a third one, with wheels of scikit-image and its needs (lazy-loader, imageio, tifffile, networkx, scipy), what
several pictures at once gain, in the receipt that it leaves:

    export KINDLING_VOLUME=/tmp/volume; python3 benchmarks/random_models.py flux-schnell $KINDLING_VOLUME;
    python3 -m handler optimize flux-schnell --candidates bf16+compile --rounds 1 --limit 500;
    cp -r $KINDLING_VOLUME/receipts $OUT

Exit code 1: a side ended early, or is called compiled and is not. Interrupted, it reports the models it has finished.
FLUX.2 [dev] is 113 GB: it wants a call of its own, 139 GiB of GPU memory, a volume in memory
(`mount -o remount,size=115G /dev/shm; export TMPDIR=/dev/shm`), and `--sides diffusers kindling-eager`.
"""

import argparse
import asyncio
import contextlib
import inspect
import io
import itertools
import multiprocessing
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch.utils.flop_counter import FlopCounterMode

import chart
import random_models
import report
from handler import MODELS, PRECISIONS, Api, Engine, ImageRequest, ModelSpec, Settings
from handler.model.hardware import detect
from handler.volume.revisions import settled
from handler.volume.sources import fetched_folder

SPAWN = multiprocessing.get_context("spawn")
LOADING = ("volume", "import", "weights")  # the phases of a cold start that plain diffusers has too
COLUMNS = ("picture_s", "floor_s", "step_s", "png_s", "load_s", "compile_s", "peak_gb")
# TFLOP/s that large matrix products reach of the 989 and 1979 which NVIDIA's data sheet of both promises: estimates
HOPPER = {"bfloat16": 790, "float8_e4m3fn": 1450}
RATES = {"NVIDIA H200": HOPPER, "NVIDIA H100 80GB HBM3": HOPPER}
Draw = Callable[[ImageRequest], tuple[bytes, float]]  # a PNG, and the seconds it took to make of pixels
Side = Callable[[ModelSpec, Path], tuple[Draw, dict[str, Any]]]  # loads a model; also the facts about that


def main() -> int:
    """Measure model by model, print a row a side, end with one JSON line; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=random_models.CONFIGS, required=True, metavar="MODEL")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=DEFAULT, help=f"default: {' '.join(DEFAULT)}")
    parser.add_argument("--pictures", type=int, default=5, help="pictures a side and model (default: 5)")
    parser.add_argument("--volume", type=Path, help="where to keep the models (default: each in a temporary folder)")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/latency.json")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    print(f"{'':<32}" + "".join(f"{name:>11}" for name in COLUMNS))
    try:
        for model in options.models:
            with contextlib.ExitStack() as stack:
                volume = options.volume or Path(stack.enter_context(tempfile.TemporaryDirectory()))
                random_models.write(model, volume)
                rows += compare(settled(MODELS[model], volume), volume, options.sides, options.pictures)
    finally:
        if options.save and rows:
            bars = {f"{row['model']} {row['side'].removeprefix('kindling-')}": parts(row) for row in rows}
            chart.stacked(bars, ("floor", "above it"), report.RESULTS / "latency.png", "A picture: floor, and above it")
        figures = {"device": detect(Settings()).name, "pictures": options.pictures, "rows": rows}
        report.finish("latency", figures, options.save)
    return wrong(rows)


def wrong(rows: list[dict[str, Any]]) -> int:
    """1 if a side ended early, or was to run compiled code and did not, which is said too; else 0."""
    told = [
        f"{row['model']} {row['side']}: {row.get('error') or 'not compiled: ' + row['plan']}"
        for row in rows
        if "error" in row or (row["side"] not in EAGER and row["plan"].startswith("EAGER"))
    ]
    for line in told:
        print(line, file=sys.stderr)
    return int(bool(told))


def parts(row: dict[str, Any]) -> dict[str, float]:
    """The bar of a row: what the GPU's arithmetic needs of a picture's seconds, and what is above that."""
    floor = row.get("floor_s", 0.0)
    return {"floor": floor, "above it": max(0.0, row.get("picture_s", 0.0) - floor)}


def plain(spec: ModelSpec, volume: Path) -> tuple[Draw, dict[str, Any]]:
    """What a careful user of diffusers would write."""
    hardware, begun = detect(Settings()), time.perf_counter()
    pipeline = DiffusionPipeline.from_pretrained(
        fetched_folder(spec, volume), dtype=getattr(torch, hardware.dtype), device_map=hardware.device
    )
    loaded_s = time.perf_counter() - begun
    facts = {"load_s": loaded_s, "plan": "EAGER: diffusers", "precision": hardware.precision}
    pipeline.set_progress_bar_config(disable=True)
    tokens = {"max_sequence_length": spec.text_tokens}
    known = tokens.keys() & inspect.signature(type(pipeline).__call__).parameters

    def draw(request: ImageRequest) -> tuple[bytes, float]:
        recipe = spec.recipe(request)
        image = pipeline(
            prompt=recipe.prompt,
            width=recipe.size[0],
            height=recipe.size[1],
            num_inference_steps=recipe.steps,
            guidance_scale=recipe.guidance,
            generator=torch.Generator("cpu").manual_seed(recipe.seed),
            **{name: tokens[name] for name in known},
        ).images[0]
        begun, buffer = time.perf_counter(), io.BytesIO()
        image.save(buffer, "PNG")
        return buffer.getvalue(), time.perf_counter() - begun

    return draw, facts


def kindling(spec: ModelSpec, volume: Path, policy: str, precision: str = "") -> tuple[Draw, dict[str, Any]]:
    """An engine with a worker, as the server has it; `policy`: KINDLING_COMPILE. Plain diffusers' precision if none."""
    precision = precision or detect(Settings()).precision
    given: dict[str, Any] = {"model": spec.id, "volume": volume, "compile": policy, "precision": precision}
    engine = Engine(Settings(**given, publish=False, cold_start_budget_s=3600))
    engine.start()
    engine.wait_booted()
    phases = {phase.name: phase.seconds for phase in engine.ledger.phases}
    facts = {
        "load_s": sum(phases[name] for name in LOADING),
        "compile_s": phases.get("compile", 0.0),
        "plan": engine.ledger.decision,
        "attention": engine.ledger.attention,
        "precision": precision,
    }

    def draw(request: ImageRequest) -> tuple[bytes, float]:
        [picture] = asyncio.run(Api(engine).draw(request))
        return picture.data, picture.stages["serialize"]

    return draw, facts


SIDES: dict[str, Side] = {
    "diffusers": plain,
    "kindling-eager": partial(kindling, policy="off"),
    "kindling-compiled": partial(kindling, policy="on"),
    **{f"kindling-{p}": partial(kindling, policy="on", precision=p) for p, row in PRECISIONS.items() if row.quantised},
}
DEFAULT = list(SIDES)[:3]
EAGER = DEFAULT[:2]


def serve(pipe: Connection, side: str, model: str, volume: Path) -> None:
    """The life of a side's process: loads, tells the facts, draws what it is told to, tells its peak."""
    draw, facts = SIDES[side](settled(MODELS[model], volume), volume)
    pipe.send(facts)
    while asked := pipe.recv():
        begun = time.perf_counter()
        data, png_s = draw(asked)
        assert data.startswith(b"\x89PNG")
        pipe.send((time.perf_counter() - begun, png_s))
    pipe.send(peak_gb())
    if side == "diffusers":
        pipe.send(tflop(draw, MODELS[model]))


def tflop(draw: Draw, spec: ModelSpec) -> float:
    """The arithmetic of one picture in the model's steps, told from pictures of fewer: steps are alike."""
    counted = []
    for steps in (spec.min_steps, spec.min_steps + 1) if spec.steps > spec.min_steps else (spec.steps,):
        with FlopCounterMode(display=False) as counter:
            draw(request(0, steps))
        counted.append(counter.get_total_flops() / 1e12)
    return counted[0] + (spec.steps - spec.min_steps) * (counted[-1] - counted[0])


def peak_gb() -> float:
    """The most memory this process ever held: of the GPU, or of the host where there is none."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


@contextlib.contextmanager
def process(side: str, model: str, volume: Path) -> Iterator[Connection]:
    """A side's process; talking to it raises EOFError or ConnectionError once it has ended."""
    ours, theirs = SPAWN.Pipe()
    child = SPAWN.Process(target=serve, args=(theirs, side, model, volume), name=side)
    child.start()
    theirs.close()
    try:
        yield ours
    finally:
        ours.close()
        child.terminate()
        child.join()


def compare(spec: ModelSpec, volume: Path, sides: list[str], pictures: int) -> list[dict[str, Any]]:
    """A row for each side, printed too. Where a side fails, its row says so, and its traceback is above."""
    weights = sum(path.stat().st_size for path in fetched_folder(spec, volume).rglob("*.safetensors")) / 1e9
    turns = len(sides) * (weights + spec.work_gb) <= detect(Settings()).memory_gb
    rows = []
    for group in [sides] if turns else [[side] for side in sides]:
        for side, row in measure(spec, volume, group, pictures).items():
            rows.append({"model": spec.id, "side": side, "turns": turns, **row})
            print(f"{spec.id:<15}{side:<17}" + "".join(f"{row.get(c, 0):>11.3f}" for c in COLUMNS), flush=True)
    return rows


def measure(spec: ModelSpec, volume: Path, group: list[str], pictures: int) -> dict[str, dict[str, Any]]:
    """What each side of `group` needs; a picture of each side at a time, the first ones not counted.

    A side whose process ends early gets an error for a row, and the others go on.
    """
    counts = (spec.min_steps, spec.steps) if spec.steps > spec.min_steps else (spec.steps, spec.max_steps)
    found: dict[str, dict[str, Any]] = {side: {} for side in group}
    spent: dict[str, dict[int, list[tuple[float, float]]]] = {side: {c: [] for c in counts} for side in group}
    with contextlib.ExitStack() as stack:
        pipes = {}
        for side in group:
            pipes[side] = stack.enter_context(process(side, spec.id, volume))
            with alive(found[side]):
                found[side] |= pipes[side].recv()
        for seed, steps, side in itertools.product(range(pictures + 1), counts, group):
            with alive(found[side]):
                pipes[side].send(request(seed, steps))
                spent[side][steps].append(pipes[side].recv())
        for side, pipe in pipes.items():
            with alive(found[side]):
                pipe.send(None)
                found[side] |= {**seconds(spent[side], spec.steps), "peak_gb": pipe.recv()}
        if "diffusers" in pipes:
            with alive(found["diffusers"]):
                tell_floors(found, pipes["diffusers"].recv())
    return {side: rounded(row) for side, row in found.items()}


@contextlib.contextmanager
def alive(row: dict[str, Any]) -> Iterator[None]:
    """Talk to a side's process; once it has ended, its row says so."""
    try:
        yield
    except (EOFError, ConnectionError):
        row["error"] = "its process ended early"


def tell_floors(found: dict[str, dict[str, Any]], count: float) -> None:
    """Put the arithmetic of a picture, in TFLOP, into each row, and how long the GPU takes for that."""
    rates = RATES.get(detect(Settings()).name, {})
    for row in found.values():
        served = PRECISIONS.get(row.get("precision", ""))
        rate = rates.get(served.products or served.activations) if served else None
        row |= {"tflop": count, **({"floor_s": count / rate} if rate else {})}


def request(seed: int, steps: int) -> ImageRequest:
    """What every side is asked: prompts of one length, no two of them equal."""
    prompt = f"a red circle on a blue background, picture {seed:03} in {steps:02} steps"
    return ImageRequest(prompt=prompt, seed=seed, num_inference_steps=steps)


def seconds(spent: Mapping[int, list[tuple[float, float]]], steps: int) -> dict[str, Any]:
    """Medians: of a picture in `steps` steps and its PNG, and of a step, from the two counts that were drawn."""
    medians = {n: [statistics.median(column) for column in zip(*times[1:], strict=True)] for n, times in spent.items()}
    (few, first), (many, last) = sorted(medians.items())
    picture_s, png_s = medians[steps]
    return {"steps": steps, "picture_s": picture_s, "png_s": png_s, "step_s": (last[0] - first[0]) / (many - few)}


def rounded(row: dict[str, Any]) -> dict[str, Any]:
    return {name: round(value, 4) if isinstance(value, float) else value for name, value in row.items()}


if __name__ == "__main__":
    sys.exit(main())
