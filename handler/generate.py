"""Make pictures without a server and say what was done. With --from, make the picture in a PNG again."""

import argparse
import json
import logging
import sys
import time
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from handler import __version__, codec
from handler.catalog import find
from handler.clock import Clock
from handler.dialects import openai
from handler.errors import InvalidValue, MissingParameter
from handler.hardware import detect
from handler.kernels import KERNELS, refusal
from handler.references import decoded
from handler.request import MAX_SEED, Format, ImageRequest, Recipe
from handler.room import writing
from handler.settings import Settings
from handler.spec import ModelSpec
from handler.vae import label
from handler.worker import Worker

FORMATS: dict[str, Format] = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's options on `parser`."""
    parser.add_argument("prompt", nargs="?", help="what the picture should show")
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("out.png"), help="file; -1, -2 ... added when --n > 1"
    )
    parser.add_argument("--model", help="model id, alias or mode (default: $KINDLING_MODEL or spark)")
    parser.add_argument("--size", default="auto", help="WIDTHxHEIGHT in pixels (default: the model's)")
    parser.add_argument("--n", type=int, default=1, help="how many pictures, 1 to 4 (default: 1)")
    parser.add_argument("--steps", type=int, help="denoising steps (default: the model's)")
    parser.add_argument("--guidance", type=float, help="guidance scale (default: the model's)")
    parser.add_argument("--scheduler", help="scheduler (default: the model's)")
    parser.add_argument("--seed", type=int, help="0 to 2147483647 (default: random; it is printed)")
    parser.add_argument("--negative-prompt", help="what to avoid, where the model can")
    parser.add_argument("--step-cache", metavar="VALUES", help="on, off or such as Fn=1,W=4,R=0.24 (default: off)")
    parser.add_argument(
        "--image", type=Path, action="append", default=[], metavar="FILE", help="image to edit; some models take more"
    )
    parser.add_argument("--mask", type=Path, metavar="PNG", help="transparent where the image is to be drawn anew")
    parser.add_argument("--strength", type=float, help="how much of the image is drawn anew, up to 1 (default: 0.6)")
    parser.add_argument("--from", dest="source", type=Path, metavar="PNG", help="make this picture again, bit for bit")


def run(options: argparse.Namespace) -> int:
    """Draw, write, report; the exit code."""
    settings, form = Settings.from_env(model=options.model), _format(options.output)
    recipe, count, settings = _again(options, settings) if options.source else _asked(options, settings)
    worker = _boot(settings.model_copy(update={"step_cache": recipe.step_cache or "off"}), options.json)
    for i, path in enumerate(_paths(options.output, count)):
        _make(
            worker,
            replace(recipe, seed=(recipe.seed + i) % (MAX_SEED + 1)),
            path,
            form,
            settings.metadata,
            options.json,
        )
    return 0


def _format(output: Path) -> Format:
    if output.suffix.lower() not in FORMATS:
        raise InvalidValue(f"{output}: the name should end in {', '.join(FORMATS)}.", "output")
    if not output.parent.is_dir():
        raise InvalidValue(f"{output}: there is no folder {output.parent}.", "output")
    return FORMATS[output.suffix.lower()]


def _asked(options: argparse.Namespace, settings: Settings) -> tuple[Recipe, int, Settings]:
    if not options.prompt:
        raise MissingParameter('say what to draw, as in: generate "a red circle on a blue background"', "prompt")
    request = openai.parse(
        {
            "prompt": options.prompt,
            "n": options.n,
            "size": options.size,
            "num_inference_steps": options.steps,
            "guidance_scale": options.guidance,
            "scheduler": options.scheduler,
            "seed": options.seed,
            "negative_prompt": options.negative_prompt,
            "step_cache": options.step_cache,
            "images": [_read(path) for path in options.image],
            "mask": _read(options.mask, "mask") if options.mask else None,
            "strength": options.strength,
        }
    )
    return _recipe(find(settings.model), request, settings), request.n, settings


def _recipe(spec: ModelSpec, request: ImageRequest, settings: Settings) -> Recipe:
    served = request.step_cache or settings.step_cache  # the worker is started as the request wants it
    spec.check(request, served)  # of two faults, tell first what no other image would mend
    images, mask = decoded(request, spec)
    return spec.recipe(request, images, served, mask)


def _read(path: Path, option: str = "image") -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidValue(f"cannot read {path}: {error.strerror}", option) from None


def _again(options: argparse.Namespace, settings: Settings) -> tuple[Recipe, int, Settings]:
    """The recipe in a picture, checked like any request, and settings with its model, precision and autoencoder."""
    source = options.source
    images, mask = [_read(path) for path in options.image], _read(options.mask, "mask") if options.mask else None
    try:
        found: dict[str, Any] = codec.read_parameters(source)
        spec, (width, height) = find(str(found["model"])), found["size"]
        _check_files(source, images, mask, list(found["images"]), found.get("mask"))
        request = ImageRequest.parse(
            {
                "prompt": found["prompt"],
                "width": width,
                "height": height,
                "num_inference_steps": found["steps"],
                "guidance_scale": found["guidance"] if spec.takes_guidance else None,
                "scheduler": found["scheduler"],
                "seed": found["seed"],
                "negative_prompt": found["negative_prompt"] or None,
                "step_cache": found.get("step_cache") or "off",
                "images": images,
                "mask": mask,
                "strength": found.get("strength"),
            }
        )
        made_by, update = found["version"], {"model": spec.id, "precision": found["precision"]}
        if found["vae"] != label(settings.vae):
            update["vae"] = found["vae"]
        update["attention"] = _kernel(settings.model_copy(update=update), found.get("attention", "native"), source)
        if found["plan"] == "EAGER":  # compiled code rounds differently
            update["compile"] = "off"
        same = made_by == __version__ and found["revision"] == spec.revision
    except OSError as error:
        raise InvalidValue(f"cannot read {source}: {error.strerror}", "from") from None
    except (KeyError, TypeError, ValueError):
        raise InvalidValue(f"{source}: its parameters are incomplete.", "from") from None
    others = "drawn together with others" if "batch" in found else ""
    if why := others if same else f"made by version {made_by}":
        print(f"kindling: {source} was {why}; pixels may differ", file=sys.stderr)
    return _recipe(spec, request, settings), 1, settings.model_copy(update=update)


def _check_files(source: Path, images: list[bytes], mask: bytes | None, hashes: list[str], masked: str | None) -> None:
    """Whether these are the files that the picture was made from."""
    if [sha256(image).hexdigest() for image in images] != hashes:
        told = f"{source} was made from {len(hashes)} images; give exactly those, in their order, with --image."
        raise InvalidValue(told, "image")
    if (sha256(mask).hexdigest() if mask else None) != masked:
        told = "with a mask; give exactly that with --mask" if masked else "without a mask; leave --mask out"
        raise InvalidValue(f"{source} was made {told}.", "mask")


def _kernel(settings: Settings, asked: str, source: Path) -> str:
    """The kernel of attention that made a picture; what is best, and a word about it, where it is not to be had."""
    hardware = detect(settings)
    reason = refusal(KERNELS[asked], hardware.capability, hardware.dtype)
    if reason:
        print(f"kindling: {source} was made with {KERNELS[asked].name}: {reason}; pixels may differ", file=sys.stderr)
    return "auto" if reason else asked


def _boot(settings: Settings, quiet: bool) -> Worker:
    logging.basicConfig(level=settings.log_level.upper(), format="%(levelname)s %(name)s: %(message)s")
    show = not quiet and sys.stderr.isatty()

    def announce(phase: str) -> None:
        if show:
            print(f"\r\033[Kkindling: {settings.model}: {phase} ...", end="", file=sys.stderr, flush=True)

    clock = Clock(settings.cold_start_budget_s, announce=announce, publish=lambda ledger: None)
    worker = Worker.boot(settings, clock)
    if show:
        print("\r\033[K", end="", file=sys.stderr, flush=True)
    return worker


def _paths(output: Path, count: int) -> list[Path]:
    if count == 1:
        return [output]
    return [output.with_stem(f"{output.stem}-{i + 1}") for i in range(count)]


def _make(worker: Worker, recipe: Recipe, path: Path, form: Format, metadata: bool, as_json: bool) -> None:
    pixels, stages = worker.generate(recipe)
    start = time.perf_counter()
    parameters = codec.parameters_of(recipe, worker.facts, __version__)
    with writing(path):
        path.write_bytes(codec.encode(pixels.rgb, form, 95, parameters if metadata else None))
    stages["serialize"] = time.perf_counter() - start
    if as_json:
        print(json.dumps({"file": str(path), **parameters, "stages_s": stages, "boot_s": worker.ledger.total_s}))
        return
    width, height = recipe.size
    print(f"{path}: {recipe.prompt!r}")
    print(f"  {recipe.model}, {width}x{height}, {recipe.steps} steps, guidance {recipe.guidance:g}, seed {recipe.seed}")
    spent = ", ".join(f"{name} {1000 * value:.0f} ms" for name, value in stages.items())
    print(f"  {worker.hardware.precision} on {worker.hardware.name}: {spent}; loaded in {worker.ledger.total_s:.1f} s")
