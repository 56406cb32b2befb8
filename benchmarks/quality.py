"""Does the picture show what the prompt says? Accuracy of spark on prompts it never trained on.

Every later change of precision, caching or compilation is judged by this. Each prompt's combination of shape,
colour and background was held out from training (`--split test`; `validation` steered the training). The judge is
`spark.checker`, itself tested on drawn pictures. "right" means background, count, colours, shapes and places are
all right; "size" is reported beside it. One object and several equal ones count together; pairs of different
objects are apart, and so are those of which a size is named ("sized"). The error of a share p of n prompts is about
sqrt(p(1-p)/n): 2 points at 95 of 100.

    python benchmarks/quality.py             the whole table, about ten minutes on two cores
    python benchmarks/quality.py --quick     ten prompts a kind, 256x256 only
    python benchmarks/quality.py --precisions fp32 int8 fp32+cudnn-fp8     four steps at 256x256, in each of these

After a plus stands how attention is computed, with the roundings that a GPU's kernel has. Likeness (PSNR, SSIM) is the
median of pictures to the first precision's.
"""

import argparse
import itertools
import os
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

import report
from handler import Clock, ImageRequest, Settings, Worker
from handler.catalog import attention
from spark.checker import ATTRIBUTES, check
from spark.scenes import held_out

COUNTS = {"one": 60, "many": 40, "pair": 40, "sized": 40}
SCENES = {"equal": ("one", "many"), "pairs": ("pair",), "sized": ("sized",)}
COLUMNS = ("right", *ATTRIBUTES)
SAME_DB = 99.0
PATIENT_S = 3600.0  # for one start after the other in a process, whose age counts


@dataclass(frozen=True, slots=True)
class Case:
    """One row of the table: how the pictures are asked for."""

    steps: int
    size: tuple[int, int] = (256, 256)
    phrasing: str = "plain"
    prompts: int | None = None  # a kind, where the usual number would take too long


CASES = (
    *(Case(steps) for steps in (1, 2, 4, 8)),
    *(Case(4, phrasing=phrasing) for phrasing in ("everyday", "capitals")),
    *(Case(4, size) for size in ((512, 512), (768, 512), (384, 256), (256, 384), (128, 128))),
    Case(4, (1024, 1024), prompts=20),
)


def main() -> None:
    """Draw, judge, print the table and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--split", choices=("test", "validation"), default="test")
    parser.add_argument("--quick", action="store_true", help="ten prompts a kind, native size only")
    parser.add_argument("--precisions", nargs="+", default=[], help="compare these at 256x256 in four steps")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/quality[_precisions].json")
    options = parser.parse_args()
    if options.precisions:
        return compare(options.precisions, options.split, options.save)
    worker = Worker.boot(Settings.from_env(model="spark"))
    cases = [case for case in CASES if not options.quick or case.size == (256, 256)]
    print(f"{'steps':>5} {'size':>9} {'phrasing':>9} {'scenes':>7} " + " ".join(f"{c:>10}" for c in COLUMNS))
    with report.measuring("quality", options.save) as figures:
        figures |= {"split": options.split, "precision": worker.hardware.precision, "rows": (rows := [])}
        for case, (scenes, kinds) in itertools.product(cases, SCENES.items()):
            row = {"scenes": scenes, **score(worker, case, kinds, options.split, 10 if options.quick else case.prompts)}
            rows.append(row)
            shares = " ".join(f"{row[c]:>10.3f}" for c in COLUMNS)
            size = "x".join(map(str, case.size))
            print(f"{case.steps:>5} {size:>9} {case.phrasing:>9} {scenes:>7} {shares}", flush=True)
        figures |= diversity(worker)


def compare(precisions: list[str], split: str, save: bool) -> None:
    """One case in each of `precisions`: a table, and one JSON line."""
    rows, first = [], list[np.ndarray]()
    print(f"{'precision':>14} " + " ".join(f"{c:>10}" for c in (*COLUMNS, "psnr_db", "ssim")))
    with report.measuring("quality_precisions", save) as figures:
        figures |= {"split": split, "rows": rows}
        for asked in precisions:
            precision, _, kernel = asked.partition("+")
            given = {**os.environ, "KINDLING_PRECISION": precision}
            worker = Worker.boot(Settings.from_env(given, model="spark"), Clock(PATIENT_S))
            if kernel:
                worker._pipeline.transformer.set_attention_backend(attention.backend(kernel))
            drawn = list[np.ndarray]()
            row = {"precision": asked, **score(worker, Case(4), SCENES["equal"], split, None, drawn)}
            first = first or drawn
            rows.append(row | likeness(drawn, first))
            told = " ".join(f"{rows[-1][c]:>10.3f}" for c in (*COLUMNS, "psnr_db", "ssim"))
            print(f"{asked:>14} {told}", flush=True)


def likeness(drawn: list[np.ndarray], first: list[np.ndarray]) -> dict[str, float]:
    """Medians over pictures; 99 dB where none differs."""
    pairs = list(zip(drawn, first, strict=True))
    psnr = [peak_signal_noise_ratio(b, a) if (a != b).any() else SAME_DB for a, b in pairs]
    ssim = [structural_similarity(b, a, channel_axis=2) for a, b in pairs]
    return {"psnr_db": round(float(np.median(psnr)), 2), "ssim": round(float(np.median(ssim)), 4)}


def score(
    worker: Worker,
    case: Case,
    kinds: tuple[str, ...],
    split: str,
    count: int | None,
    drawn: list[np.ndarray] | None = None,
) -> dict[str, object]:
    """Shares right of one case over `kinds`, with the median seconds a picture took; pictures go to `drawn`."""
    verdicts, seconds = [], []
    for image, scene, took in pictures(worker, case, kinds, split, count):
        verdicts.append(check(image, scene))
        if drawn is not None:
            drawn.append(np.asarray(image))
        seconds.append(took)
    return {
        "steps": case.steps,
        "picture": "x".join(map(str, case.size)),
        "phrasing": case.phrasing,
        "prompts": len(verdicts),
        **{name: round(sum(getattr(v, name) for v in verdicts) / len(verdicts), 4) for name in COLUMNS},
        "median_s": round(statistics.median(seconds), 4),
    }


def pictures(
    worker: Worker, case: Case, kinds: tuple[str, ...], split: str, count: int | None
) -> Iterator[tuple[Image.Image, object, float]]:
    """Every picture of a case with the scene it should show and the seconds it took; seed i for prompt i."""
    for kind in kinds:
        for i, (prompt, scene) in enumerate(held_out(count or COUNTS[kind], split, kind, case.phrasing)):
            start = time.perf_counter()
            pixels, _ = worker.generate(worker.spec.recipe(request(prompt, i, case)))
            yield Image.fromarray(pixels.rgb), scene, time.perf_counter() - start


def request(prompt: str, seed: int, case: Case) -> ImageRequest:
    """What a caller would send."""
    width, height = case.size
    return ImageRequest(prompt=prompt, seed=seed, width=width, height=height, num_inference_steps=case.steps)


def diversity(worker: Worker) -> dict[str, float]:
    """How much seeds matter: the standard deviation over 16 seeds of one prompt, in 8-bit units, per pixel."""
    case = Case(4)
    drawn = [
        worker.generate(worker.spec.recipe(request("a red circle on a blue background", seed, case)))[0].rgb
        for seed in range(16)
    ]
    spread = np.stack(drawn).astype(np.float64).std(axis=0)
    return {"seed_std_mean": round(float(spread.mean()), 2), "seed_std_max": round(float(spread.max()), 2)}


if __name__ == "__main__":
    main()
