"""Make pictures without a server and say what was done. With --from, make the picture in a PNG again."""

import argparse
import json
import logging
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from handler.api import codec
from handler.api.dialects import openai
from handler.api.recipes import recipes_of, settled
from handler.catalog.models import find
from handler.cli import again
from handler.core.errors import InvalidValue, MissingParameter
from handler.core.recipe import Recipe
from handler.core.request import Format, ImageRequest, MaskForm
from handler.core.settings import Settings
from handler.core.version import __version__
from handler.model.text.pieces import embedded
from handler.volume import embeddings
from handler.volume.adapters import chosen
from handler.volume.manifest import write_picture
from handler.volume.room import require_writable, writing
from handler.worker.clock import Clock
from handler.worker.worker import Worker

FORMATS: dict[str, Format] = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}
WEIGHTS = "files or folders over the model's own weights, comma-separated (default: $KINDLING_WEIGHTS)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's options on `parser`."""
    parser.add_argument("prompt", nargs="?", help="what the picture should show")
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        default=Path("out.png"),
        help="file; -1, -2 ... added when --n > 1 (default: out.png)",
    )
    parser.add_argument("--model", help="model id, alias or mode (default: $KINDLING_MODEL or spark)")
    parser.add_argument("--weights", metavar="FILES", help=WEIGHTS)
    parser.add_argument("--size", help="WIDTHxHEIGHT in pixels (default: the model's)")
    parser.add_argument("--n", type=int, help="how many pictures, 1 to 10 (default: 1)")
    parser.add_argument("--steps", type=int, help="denoising steps (default: the model's)")
    parser.add_argument("--guidance", type=float, help="guidance scale (default: the model's)")
    parser.add_argument("--scheduler", help="scheduler (default: the model's)")
    parser.add_argument("--seed", type=int, help="0 to 18446744073709551615 (default, and -1: random; it is printed)")
    parser.add_argument("--negative-prompt", help="what to avoid, where the model can")
    parser.add_argument(
        "--step-cache", metavar="VALUES", help="on, off or such as Fn=1,W=4,R=0.24 (default: $KINDLING_STEP_CACHE)"
    )
    parser.add_argument(
        "--image", type=Path, action="append", default=[], metavar="FILE", help="image to edit; some models take more"
    )
    parser.add_argument("--mask", type=Path, metavar="FILE", help="transparent or white where to draw the image anew")
    parser.add_argument("--mask-form", choices=get_args(MaskForm), help="which of them (default: alpha if any)")
    parser.add_argument(
        "--strength", type=float, help="how much of the image is drawn anew, up to 1 (default: the model's)"
    )
    parser.add_argument(
        "--lora", action="append", default=[], metavar="NAME:WEIGHT", help="LoRA on the volume, up to four times"
    )
    parser.add_argument(
        "--from",
        dest="source",
        type=Path,
        metavar="PNG",
        help="make this picture again: bit for bit where all is alike",
    )


def run(options: argparse.Namespace) -> int:
    """Draw, write, report; the exit code."""
    settings, form = Settings.from_env(model=options.model, weights=options.weights), format_of(options.output)
    said = _again(options) if options.source else None
    if said:
        settings, request = said.settings(settings), said.request
    else:
        request = _asked(options)
    served = request.step_cache or settings.step_cache  # the worker is started as the request wants it
    spec = find(settings.model)
    request = settled(request, spec, settings.long_prompts)
    found = chosen(request.loras, settings.volume), embeddings.chosen(embedded(request, spec), settings.volume)
    first, *_ = recipes = recipes_of(request, spec, served, *found)
    for path in (paths := _paths(options.output, request.n)):
        format_of(path)
    worker = booted(settings.model_copy(update={"step_cache": first.step_cache or "off"}), options.json)
    recipes = [replace(recipe, revision=worker.spec.revision) for recipe in recipes]  # which only the volume may say
    if said and (differs := again.differing(said.found, parameters_for(worker, recipes[0]))):
        print(f"kindling: {said.source} may come out otherwise: {'; '.join(differs)}", file=sys.stderr)
    for recipe, path in zip(recipes, paths, strict=True):
        _make(worker, recipe, path, form, settings.metadata, options.json)
    return 0


def format_of(output: Path) -> Format:
    """By the file's name; InvalidValue if it cannot be written, as far as that is known before."""
    if output.suffix.lower() not in FORMATS:
        raise InvalidValue(f"{output}: the name should end in {', '.join(FORMATS)}.", "output")
    if not output.parent.is_dir():
        raise InvalidValue(f"{output}: there is no folder {output.parent}.", "output")
    if output.is_dir():
        raise InvalidValue(f"{output} is a folder; name a file.", "output")
    if not output.exists():
        require_writable(output.parent)
    elif not os.access(output, os.W_OK):
        raise InvalidValue(f"{output} may not be written over; name another file.", "output")
    return FORMATS[output.suffix.lower()]


def _asked(options: argparse.Namespace) -> ImageRequest:
    if options.prompt is None:
        raise MissingParameter('say what to draw, as in: generate "a red circle on a blue background"', "prompt")
    images, mask = _files(options)
    return openai.parse({**_fields(options), "images": images, "mask": mask, **_in_part(options)})


def _fields(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "prompt": options.prompt,
        "n": options.n,
        "size": options.size,
        "num_inference_steps": options.steps,
        "guidance_scale": options.guidance,
        "scheduler": options.scheduler,
        "seed": options.seed,
        "negative_prompt": options.negative_prompt,
        "step_cache": options.step_cache,
        "loras": options.lora or None,
    }


def _in_part(options: argparse.Namespace) -> dict[str, Any]:
    """What is only said with an image to work from."""
    return {"mask_form": options.mask_form, "strength": options.strength}


def _files(options: argparse.Namespace) -> tuple[list[bytes], bytes | None]:
    return [_read(path) for path in options.image], _read(options.mask, "mask") if options.mask else None


def _again(options: argparse.Namespace) -> again.Said:
    """What the PNG that --from names says, which no other option contradicts."""
    said = again.read(options.source, *_files(options))
    prompt = said.request.prompt if options.prompt is None else options.prompt
    asked = openai.parse({**_fields(options), "prompt": prompt})
    again.refuse_contradiction(said, options, asked)
    return said


def _read(path: Path, option: str = "image") -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidValue(f"cannot read {path}: {error.strerror}", option) from None


def booted(settings: Settings, quiet: bool) -> Worker:
    """A worker, whose phases are told on a terminal while it starts."""
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


def parameters_for(worker: Worker, recipe: Recipe) -> dict[str, Any]:
    """What a picture of `recipe` says of itself."""
    return codec.parameters_of(recipe, worker.facts, __version__)


def _make(worker: Worker, recipe: Recipe, path: Path, form: Format, metadata: bool, as_json: bool) -> None:
    pixels, stages = worker.generate(recipe)
    start = time.perf_counter()
    parameters = parameters_for(worker, recipe)
    with writing(path):
        write_picture(path, codec.encode(pixels.rgb, form, 95, parameters if metadata else None))
    stages["serialize"] = time.perf_counter() - start
    say(worker, recipe, path, stages, as_json, pixels.tokens.unknown)


def say(
    worker: Worker, recipe: Recipe, path: Path, stages: dict[str, float], as_json: bool, unknown: Sequence[str]
) -> None:
    """Tell what was drawn, how long it took, and which words of the prompt are `unknown` to the model."""
    if as_json:
        told = parameters_for(worker, recipe) | ({"unknown_words": list(unknown)} if unknown else {})
        print(json.dumps({"file": str(path), **told, "stages_s": stages, "boot_s": worker.ledger.total_s}))
        return
    width, height = recipe.size
    print(f"{path}: {recipe.prompt!r}")
    print(f"  {recipe.model}, {width}x{height}, {recipe.steps} steps, guidance {recipe.guidance:g}, seed {recipe.seed}")
    spent = ", ".join(f"{name} {1000 * value:.0f} ms" for name, value in stages.items())
    print(f"  {worker.hardware.precision} on {worker.hardware.name}: {spent}; loaded in {worker.ledger.total_s:.1f} s")
    if unknown and (lexicon := worker.spec.lexicon):
        print(f"  {recipe.model} does not know: {', '.join(unknown)}. It knows {lexicon.about}.")
