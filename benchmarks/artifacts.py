"""Which compile artifact makes a cold start cheap: the same FLUX.1 model compiled in each way torch has, then restored.

Every figure comes from a fresh process with an empty Inductor cache, and is the median of the rounds. "compile" is
what a worker pays before its first picture beyond drawing it: compiling or restoring, plus what of the first picture
is not drawing. "next size" is the same for the first picture of a size it has not drawn yet. "start" is from process
birth to the first picture. Pictures are latents of 4 steps; differences are against eager.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxPipeline, FluxTransformer2DModel

import report
from handler.model.compiling.package import bind_blocks, compile_blocks

SPARK = Path(__file__).parent.parent / "handler" / "weights" / "spark"
LARGER = {"num_layers": 4, "num_single_layers": 8, "num_attention_heads": 16}  # random weights: 110 M parameters
NATIVE, SMALL, UNSEEN = (256, 256), (128, 128), (384, 256)
DEVICE, DTYPE = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
BLOB, PACKAGE, FOLDER = "mega-cache.bin", "blocks.pt2", "inductor"
Draw = Callable[..., torch.Tensor]


@dataclass(frozen=True, slots=True)
class Variant:
    """A way to run the blocks: what is done before the first picture, the artifact it needs, what it leaves."""

    prepare: Callable[[Any, Draw, Path], object]
    needs: str | None = None
    leaves: tuple[str, ...] = ()


def regional(transformer: Any, draw: Draw, store: Path) -> None:
    transformer.compile_repeated_blocks(fullgraph=True)


def mega_cache(transformer: Any, draw: Draw, store: Path) -> None:
    torch.compiler.load_cache_artifacts((store / BLOB).read_bytes())
    regional(transformer, draw, store)


def packaged(transformer: Any, draw: Draw, store: Path) -> None:
    compile_blocks(transformer, lambda: [draw(size, steps=1) for size in (NATIVE, SMALL)], store / PACKAGE)
    bind_blocks(transformer, store / PACKAGE)


VARIANTS = {
    "eager": Variant(lambda transformer, draw, store: None),
    "whole model": Variant(lambda transformer, draw, store: transformer.compile(fullgraph=True)),
    "regional": Variant(regional, leaves=(FOLDER, BLOB)),
    "regional + Inductor's folder": Variant(regional, needs=FOLDER),
    "regional + Mega-Cache": Variant(mega_cache, needs=BLOB),
    "packages": Variant(packaged, leaves=(PACKAGE,)),
    "packages restored": Variant(lambda transformer, _, store: bind_blocks(transformer, store / PACKAGE), PACKAGE),
}


def main() -> None:
    """Measure, print a table for each model and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="fresh processes a variant (default: 3)")
    parser.add_argument("--models", nargs="+", default=["spark", "larger"], choices=["spark", "larger"])
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/artifacts.json")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        model, name, store, born = options.child
        print(json.dumps(child(model, VARIANTS[name], Path(store), float(born))))
        return
    with report.measuring("artifacts", options.save) as figures:
        figures |= {"device": DEVICE, "dtype": str(DTYPE), "models": (models := {})}
        for model in options.models:
            models[model] = measure(model, options.rounds)


def measure(model: str, rounds: int) -> dict[str, dict[str, float]]:
    """The rows of one model's table."""
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in VARIANTS}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as store:
            for name in VARIANTS:
                runs[name].append(run(model, name, Path(store)))
    rows = {n: {figure: statistics.median(run[figure] for run in of) for figure in of[0]} for n, of in runs.items()}
    heads = ("compile_s", "next_size_s", "start_s", "picture_s", "unseen_picture_s", "artifact_bytes", "difference")
    print(f"\n| {model} | {' | '.join(heads)} |\n|{'---|' * (len(heads) + 1)}")
    for name, row in rows.items():
        print(f"| {name} | {' | '.join(f'{row[head]:.6g}' for head in heads)} |")
    compiling = rows["packages restored"]["compile_s"] / rows["packages"]["compile_s"]
    starting = rows["packages restored"]["start_s"] / rows["eager"]["start_s"]
    print(f"packages restored: compile {compiling:.4f} of without artifacts, start {starting:.2f} of eager's")
    return rows


def run(model: str, name: str, store: Path) -> dict[str, float]:
    """One variant in a process of its own."""
    number = [*VARIANTS].index(name)  # not the name: g++ wants no spaces
    cache = store / (FOLDER if FOLDER in (VARIANTS[name].needs, *VARIANTS[name].leaves) else f"empty{number}")
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache)}
    command = [sys.executable, __file__, "--child", model, name, str(store), str(time.time())]
    out = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
    figures: dict[str, float] = json.loads(out.splitlines()[-1])
    return figures


def child(model: str, variant: Variant, store: Path, born: float) -> dict[str, float]:
    """Prepare, draw, time: all figures of one run."""
    pipeline = load(model)

    def draw(size: tuple[int, int], steps: int = 4, seed: int = 1) -> torch.Tensor:
        with torch.inference_mode():
            latents: torch.Tensor = pipeline(
                "a red circle on a blue background", width=size[0], height=size[1], num_inference_steps=steps,
                guidance_scale=0.0, max_sequence_length=32, output_type="latent",
                generator=torch.Generator().manual_seed(seed),
            ).images.cpu()  # fmt: skip
        return latents

    ready = time.time()
    variant.prepare(pipeline.transformer, draw, store)
    prepared = time.time()
    latents = [draw(NATIVE)]
    first = time.time()
    save(variant, store)
    picture = median_s(draw, NATIVE)
    again = time.time()
    latents.append(draw(UNSEEN))
    unseen = time.time() - again
    unseen_picture = median_s(draw, UNSEEN)
    return {
        "load_s": ready - born,
        "prepare_s": prepared - ready,
        "compile_s": first - ready - picture,
        "next_size_s": unseen - unseen_picture,
        "start_s": first - born,
        "picture_s": picture,
        "unseen_picture_s": unseen_picture,
        "artifact_bytes": float(size_of(store / variant.needs)) if variant.needs else 0.0,
        "difference": difference(latents, store / "eager.pt"),
    }


def load(model: str) -> Any:
    """spark, or spark around a larger transformer."""
    more: dict[str, Any] = {}
    if model == "larger":
        torch.manual_seed(0)
        config = FluxTransformer2DModel.load_config(SPARK / "transformer")
        more["transformer"] = FluxTransformer2DModel.from_config({**config, **LARGER}).to(DTYPE).eval()
    pipeline = FluxPipeline.from_pretrained(SPARK, dtype=DTYPE, **more).to(DEVICE)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.transformer.requires_grad_(False)
    return pipeline


def save(variant: Variant, store: Path) -> None:
    """Leave the blob; folders and packages are there already."""
    if BLOB in variant.leaves and (artifacts := torch.compiler.save_cache_artifacts()):
        (store / BLOB).write_bytes(artifacts[0])


def median_s(draw: Draw, size: tuple[int, int]) -> float:
    """Seconds a picture, of 20."""
    marks = [time.perf_counter()]
    for seed in range(20):
        draw(size, seed=seed)
        marks.append(time.perf_counter())
    return statistics.median(later - start for start, later in itertools.pairwise(marks))


def size_of(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def difference(latents: list[torch.Tensor], reference: Path) -> float:
    """The largest, against eager's; the first to come is eager."""
    if not reference.exists():
        torch.save(latents, reference)
    return max((a - b).abs().max().item() for a, b in zip(latents, torch.load(reference), strict=True))


if __name__ == "__main__":
    main()
