"""Kindling's pictures against those of plain diffusers, bit by bit: every family, every option, equal random weights.

The models are tests/doubles/tiny.py's, real pipelines with small weights. Plain diffusers draws (plain.py) in a process
that never imports Kindling's families, Kindling in another, asked by JSON and answering PNGs, as callers ask. For each
option: how many of the pictures' values differ, and by how much at most. One is not met: the images that are looked at
beside a mask plain diffusers encodes all at once, which rounds otherwise than one by one, as Kindling always does it.

    python benchmarks/differential.py --save          all rows and options in fp32 and bf16: some minutes
    python benchmarks/differential.py --models sdxl
"""

import argparse
import asyncio
import base64
import io
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
from PIL import Image

import report
from handler import MODELS, Api, Engine, ModelSpec, Settings
from handler.volume.revisions import settled
from handler.volume.sources import fetched_folder

ROOT = Path(__file__).parent.parent
EMBEDDED = ROOT / "handler" / "weights"
PRECISIONS = ("fp32", "bf16")
WIDE, HIGH = 128, 96  # on every grid
LONG = "a red circle left of a small yellow star on a deep blue background, " * 90
RNG = numpy.random.default_rng(15)


def noise(width: int, height: int) -> Image.Image:
    """An image of which every pixel tells where it is."""
    return Image.fromarray(RNG.integers(0, 256, (height, width, 3), numpy.uint8))


def hole(*boxes: tuple[int, int, int, int], size: tuple[int, int] = (WIDE, HIGH), alpha: int = 0) -> Image.Image:
    """A mask that is open in boxes."""
    mask = Image.new("RGBA", size, (0, 0, 0, 255))
    for box in boxes:
        mask.paste((0, 0, 0, alpha), box)
    return mask


def veiled(image: Image.Image) -> Image.Image:
    """`image`, transparent to one side."""
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    return image


PHOTO, OTHER, SMALL, LARGE = noise(WIDE, HIGH), noise(WIDE, HIGH), noise(100, 72), noise(1300, 900)
TALL, THIN = noise(72, 200), noise(65, 500)
OFF = {"width": 100, "height": 72}
BOX = (40, 24, 80, 60)  # on no cell


@dataclass(frozen=True, slots=True)
class Option:
    """What one row asks, but for prompt, size, seed and steps where it says none; `fits` says of which models."""

    name: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    images: Sequence[Image.Image] = ()
    mask: Image.Image | None = None
    fits: Callable[[ModelSpec], bool] = lambda spec: True


def negates(spec: ModelSpec) -> bool:
    """Whether a negative prompt changes anything."""
    return spec.takes_negative_prompt


def redraws(spec: ModelSpec) -> bool:
    """Whether it draws an image anew in part."""
    return not spec.max_images


def refers(spec: ModelSpec) -> bool:
    """Whether images are references."""
    return bool(spec.max_images)


def masks(spec: ModelSpec) -> bool:
    """Whether an edit may have a mask."""
    return bool(spec.masked_pixels)


def both(spec: ModelSpec) -> bool:
    """Whether there may be a mask, and references beside."""
    return masks(spec) and refers(spec)


NEGATIVES = {"none": {}, "empty": {"negative_prompt": ""}, "words": {"negative_prompt": "blurry, dull"}}
OPTIONS = (
    Option("text"),
    Option("text: the model's steps", {"num_inference_steps": None}),
    Option("text: another seed", {"seed": 2**31 - 1}),
    Option("text: a portrait", {"width": 64, "height": 160}),
    Option("text: off the grid", OFF),
    Option("text: a long prompt", {"prompt": LONG}),
    Option("text: another script", {"prompt": "红色圆圈 ⭕ — čtverec"}),
    Option("text: three at once", {"n": 3}),
    Option("guidance: 1", {"guidance_scale": 1.0}, fits=lambda spec: spec.takes_guidance),
    Option("guidance: 7.5", {"guidance_scale": 7.5}, fits=lambda spec: spec.takes_guidance),
    *(Option(f"negative prompt: {name}", fields, fits=negates) for name, fields in NEGATIVES.items()),
    Option("negative prompt: long", {"negative_prompt": LONG[:2000]}, fits=negates),
    Option("negative prompt: empty, of an edit", {"negative_prompt": "", "strength": 0.5}, (PHOTO,), fits=negates),
    *(Option(f"image: strength {share}", {"strength": share}, (PHOTO,), fits=redraws) for share in (0.25, 0.5, 1.0)),
    Option("image: off the grid", {**OFF, "strength": 0.75}, (SMALL,), fits=redraws),
    Option("image: of another size", {"strength": 0.5}, (LARGE,), fits=redraws),
    Option("image: transparent", {"strength": 0.5}, (veiled(noise(WIDE, HIGH)),), fits=redraws),
    Option("image: palette", {"strength": 0.5}, (noise(WIDE, HIGH).quantize(16),), fits=redraws),
    *(Option(f"mask: strength {s}", {"strength": s}, (PHOTO,), hole(BOX), masks) for s in (0.25, 0.5, 1.0)),
    Option("mask: holes of a pixel", {"strength": 1.0}, (PHOTO,), hole((3, 5, 4, 6), (125, 90, 126, 91)), masks),
    Option("mask: half open", {"strength": 1.0}, (PHOTO,), hole(BOX, alpha=128), masks),
    Option("mask: all open", {"strength": 1.0}, (PHOTO,), hole((0, 0, WIDE, HIGH)), masks),
    Option("mask: off the grid", {**OFF, "strength": 1.0}, (SMALL,), hole((7, 9, 50, 31), size=SMALL.size), masks),
    Option("mask: of another size", {"strength": 1.0}, (LARGE,), hole((300, 200, 777, 500), size=LARGE.size), masks),
    Option("mask: an image to look at", {"strength": 1.0}, (PHOTO, OTHER), hole(BOX), both),
    Option("mask: three images to look at", {"strength": 1.0}, (PHOTO, OTHER, *[OTHER] * 2), hole(BOX), both),
    Option("images: one", {}, (PHOTO,), fits=refers),
    Option("images: off the grid", OFF, (SMALL,), fits=refers),
    Option("images: of all shapes", {}, (TALL, LARGE, THIN), fits=refers),
    Option("images: transparent", {}, (veiled(noise(WIDE, HIGH)),), fits=refers),
)


def options(spec: ModelSpec) -> Iterator[Option]:
    """Those that fit, and every scheduler, for text and for edits."""
    yield from (option for option in OPTIONS if option.fits(spec))
    for name in spec.schedulers:
        yield Option(f"scheduler: {name}", {"scheduler": name})
    for name in spec.edit_schedulers:
        half = {"scheduler": name, "strength": 0.5}
        if redraws(spec):
            yield Option(f"scheduler: {name}, of an image", half, (PHOTO,))
        if masks(spec):
            yield Option(f"scheduler: {name}, under a mask", half, (PHOTO,), hole(BOX))


def fields(spec: ModelSpec, option: Option) -> dict[str, Any]:
    """All that is said of a picture, but for its images."""
    plain = {"prompt": "a red circle on a blue background", "width": WIDE, "height": HIGH, "seed": 1}
    asked = {**plain, "num_inference_steps": min(4, spec.max_steps), **option.fields}
    return {name: value for name, value in asked.items() if value is not None}


def asked(spec: ModelSpec, option: Option) -> dict[str, Any]:
    """The JSON of `POST /generate`."""
    files = {"images": [encoded(image) for image in option.images]} if option.images else {}
    return {**fields(spec, option), **files, **({"mask": encoded(option.mask)} if option.mask else {})}


def encoded(image: Image.Image) -> str:
    """As PNG, in base64."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def answered(engine: Engine, spec: ModelSpec, option: Option) -> list[Any]:
    """What a caller gets."""
    reply = asyncio.run(Api(engine).call("/generate", asked(spec, option)))
    if reply.status != 200:
        raise RuntimeError(f"{spec.id}, {option.name}: {reply.body}")
    pictures = [base64.b64decode(image["b64_json"]) for image in reply.body["images"]]
    return [numpy.asarray(Image.open(io.BytesIO(picture))) for picture in pictures]


def plainly(spec: ModelSpec, folder: Path, precision: str, wanted: Sequence[Option]) -> Iterator[tuple[str, list[Any]]]:
    """What plain diffusers draws, by option."""
    import diffusers.utils.logging
    import torch
    import transformers.utils.logging

    from plain import Asked, Plain

    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
    pipelines = Plain(spec, folder, {"fp32": torch.float32, "bf16": torch.bfloat16}[precision])
    for option in wanted:
        yield option.name, pipelines.draw(Asked(fields(spec, option), option.images, option.mask))


def differing(ours: Sequence[Any], theirs: Sequence[Any]) -> tuple[int, int]:
    """How many values differ, and by how much at most."""
    gaps = numpy.abs(numpy.stack(ours).astype(int) - numpy.stack(theirs).astype(int))
    return int((gaps > 0).sum()), int(gaps.max())


def folder_of(spec: ModelSpec, volume: Path) -> Path:
    """Where its weights are."""
    return EMBEDDED / spec.id if spec.embedded else fetched_folder(settled(spec, volume), volume)


def served(spec: ModelSpec, volume: Path, precision: str) -> Engine:
    """An engine that draws several pictures at once."""
    update = {"model": spec.id, "volume": volume, "precision": precision, "compile": "off", "batch": 4}
    engine = Engine(Settings(cold_start_budget_s=3600, **update))
    engine.start()
    engine.wait_booted()
    return engine


def compared(spec: ModelSpec, volume: Path, precision: str, theirs: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """A row for each option."""
    engine = served(spec, volume, precision)
    try:
        for option in options(spec):
            values, most = differing(answered(engine, spec, option), theirs[option.name])
            yield {"model": spec.id, "precision": precision, "option": option.name, "differ": values, "by": most}
    finally:
        engine.stop()


def main() -> None:
    """Draw both, print what differs and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--precisions", nargs="+", default=PRECISIONS, choices=PRECISIONS)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/differential.json")
    parser.add_argument("--plain", type=Path, metavar="VOLUME", help=argparse.SUPPRESS)  # the other process
    given = parser.parse_args()
    if given.plain:
        _plain(given.plain, given.models, given.precisions)
    else:
        with report.measuring("differential", given.save) as figures, tempfile.TemporaryDirectory() as volume:
            rows: list[dict[str, Any]] = figures.setdefault("rows", [])
            _both(Path(volume), given.models, given.precisions, rows)
            figures |= {"pictures": len(rows), "equal": sum(not row["differ"] for row in rows)}


def _both(volume: Path, models: Sequence[str], precisions: Sequence[str], rows: list[dict[str, Any]]) -> None:
    sys.path.insert(0, str(ROOT / "tests/doubles"))
    import tiny

    for model in models:
        if not MODELS[model].embedded:
            tiny.write(MODELS[model], volume)
    command = [sys.executable, __file__, "--plain", volume, "--models", *models, "--precisions", *precisions]
    subprocess.run(command, check=True)
    for model in models:
        for precision in precisions:
            with numpy.load(volume / f"{model}-{precision}.npz") as theirs:
                found = list(compared(MODELS[model], volume, precision, theirs))
            rows += found
            print(
                f"{model} in {precision}: {sum(not row['differ'] for row in found)} of {len(found)} equal", flush=True
            )
            for row in found:
                if row["differ"]:
                    print(f"  {row['option']}: {row['differ']} values differ, by up to {row['by']}", flush=True)


def _plain(volume: Path, models: Sequence[str], precisions: Sequence[str]) -> None:
    for model in models:
        spec = MODELS[model]
        for precision in precisions:
            found = dict(plainly(spec, folder_of(spec, volume), precision, list(options(spec))))
            numpy.savez(volume / f"{model}-{precision}.npz", **found)
    assert "handler.model.families" not in sys.modules


if __name__ == "__main__":
    main()
