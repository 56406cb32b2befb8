"""How well spark draws at every size: `spark.measures` beside the judge's `right`, by size and kind of scene.

Each size gets as many prompts that were held out from training (`--split test`), and the same scenes are measured as
they should be drawn ("true") and after the autoencoder's round trip ("coded"): no transformer can do better than that.
`right` is `spark.checker`'s; `iou`, `edge_px`, `object_std` and `background_std` are `spark.measures.Measured`'s,
means over pictures. The error of a share p of n prompts is about sqrt(p(1-p)/n).

    python benchmarks/sharpness.py --save              200 prompts a size, 60 sized pairs: an hour and more, 2 cores
    python benchmarks/sharpness.py --prompts 12        a quick look, about five minutes
    python benchmarks/sharpness.py --old FOLDER        other weights beside the shipped ones
    python benchmarks/sharpness.py --prompts 0 --sheet SHEET.png [--old FOLDER]     24 prompts at four sizes to look at

Weights are a folder in diffusers' layout; `git archive COMMIT handler/weights/spark | tar -x -C /tmp` gets old ones.
"""

import argparse
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path

from diffusers import FluxPipeline
from PIL import Image

import report
from spark.autoencoder import round_trip
from spark.latents import Size
from spark.measures import MEASURES
from spark.scenes import Scene, draw, held_out
from spark.train import SHIPPED
from spark.validation import drawn, judged

SIZES: tuple[Size, ...] = (
    (128, 128), (256, 256), (512, 512), (768, 512), (512, 768), (672, 384), (384, 672), (1024, 1024),
)  # fmt: skip
SHARES = {"one": 0.4, "many": 0.3, "pair": 0.3, "sized": 0.3}  # of the prompts; sized pairs come on top
QUESTIONS = ("right", *MEASURES)
SHOWN_SIZES: tuple[Size, ...] = ((128, 128), (256, 256), (512, 512), (1024, 1024))
SHOWN, SIDE, GAP = 24, 192, 6


def main() -> None:
    """Draw, judge and measure; print the table and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--split", choices=("test", "validation"), default="test")
    parser.add_argument("--prompts", type=int, default=200, help="held-out prompts a size; 0 measures nothing")
    parser.add_argument("--sizes", nargs="+", type=_size, default=SIZES, metavar="WIDTHxHEIGHT")
    parser.add_argument("--weights", type=Path, default=SHIPPED, help="what is measured, in diffusers' layout")
    parser.add_argument("--old", type=Path, help="weights to measure and show beside them")
    parser.add_argument("--sheet", type=Path, help="write a contact sheet there")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/spark.json")
    options = parser.parse_args()
    artists = {name: load(folder) for name, folder in (("old", options.old), ("drawn", options.weights)) if folder}
    if options.prompts:
        with report.measuring("spark", options.save) as figures:
            figures |= {"split": options.split, "prompts_a_size": options.prompts, "sizes": (sizes := {})}
            print(f"{'size':>9} {'kind':>5} {'':>6}" + "".join(f"{name:>15}" for name in QUESTIONS))
            for size in options.sizes:
                sizes["x".join(map(str, size))] = rows(artists, size, options.prompts, options.split)
    if options.sheet:
        contact_sheet(artists.values(), options.split).save(options.sheet, optimize=True)


def _size(text: str) -> Size:
    width, height = map(int, text.split("x"))
    return width, height


def load(folder: Path) -> FluxPipeline:
    """The pipeline of a folder, quiet."""
    pipeline = FluxPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def rows(artists: dict[str, FluxPipeline], size: Size, prompts: int, split: str) -> dict[str, dict[str, object]]:
    """By kind, and by who drew: the share right and the means of the measures."""
    found: dict[str, dict[str, object]] = {}
    for kind, share in SHARES.items():
        asked = held_out(max(1, round(share * prompts)), split, kind, "plain")
        for artist, pictures in _pictures(artists, asked, size):
            row = {"prompts": len(asked), **judged(pictures, [scene for _, scene in asked])}
            found.setdefault(kind, {})[artist] = row
            name = "x".join(map(str, size))
            print(f"{name:>9} {kind:>5} {artist:>6}" + "".join(f"{row[q]:>15}" for q in QUESTIONS), flush=True)
    return found


def _pictures(
    artists: dict[str, FluxPipeline], asked: list[tuple[str, Scene]], size: Size
) -> Iterator[tuple[str, Iterator[Image.Image]]]:
    vae = next(reversed(artists.values())).vae
    yield "true", (draw(scene, size) for _, scene in asked)
    yield "coded", (round_trip(vae, draw(scene, size)) for _, scene in asked)
    for name, pipeline in artists.items():
        yield name, (drawn(pipeline, prompt, seed, size) for seed, (prompt, _) in enumerate(asked))


def contact_sheet(artists: Iterable[FluxPipeline], split: str) -> Image.Image:
    """A row for each of `SHOWN` prompts, at each of `SHOWN_SIZES` the artists side by side."""
    asked = [pair for kind in SHARES for pair in held_out(SHOWN // len(SHARES), split, kind, "plain")]
    columns = list(itertools.product(SHOWN_SIZES, artists))
    sheet = Image.new("RGB", (len(columns) * (SIDE + GAP) + GAP, len(asked) * (SIDE + GAP) + GAP), "white")
    for row, (prompt, _) in enumerate(asked):
        for column, (size, pipeline) in enumerate(columns):
            picture = drawn(pipeline, prompt, row, size).resize((SIDE, SIDE), Image.Resampling.LANCZOS)
            sheet.paste(picture, (GAP + column * (SIDE + GAP), GAP + row * (SIDE + GAP)))
    return sheet


if __name__ == "__main__":
    main()
