"""Draw a graph's pictures on this machine, without a server, with the model that it asks for. Each PNG has the graph.

Exit codes: 0 all that it asks for is drawn; 1 it is refused, or something that it names is not here; 2 the file cannot
be read as a graph.
"""

import argparse
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from handler.api import codec
from handler.api.comfy.explaining import reported
from handler.api.comfy.grounds import as_set, drawable, weighed
from handler.api.comfy.inscription import finished, texts
from handler.api.dialects.comfy.opening import Opened
from handler.api.dialects.comfy.plan import Before, Output, Plan
from handler.api.recipes import recipes_of
from handler.cli import generate
from handler.cli.comfy import explain, looking
from handler.core.errors import GraphRefused, InvalidValue
from handler.core.recipe import Recipe
from handler.core.request import ImageRequest
from handler.core.settings import Settings
from handler.core.untrusted import printed_lines
from handler.model.text.pieces import embedded
from handler.volume import embeddings
from handler.volume.adapters import chosen
from handler.volume.manifest import write_picture
from handler.volume.room import writing
from handler.worker.worker import Worker


@dataclass(frozen=True, slots=True)
class Drawn:
    """A PNG as it comes from the model, of what, the seconds of each stage, and the prompt's unknown words."""

    data: bytes
    recipe: Recipe
    stages: dict[str, float]
    unknown: tuple[str, ...]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the action's options on `parser`."""
    looking.add_file(parser)
    looking.add_images(parser)
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        default=Path("out.png"),
        help="PNG; the second picture gets -2 added, and so on (default: out.png)",
    )


def run(options: argparse.Namespace) -> int:
    """Draw, write, report; the exit code."""
    if generate.format_of(options.output) != "png":
        raise InvalidValue(f"{options.output}: only a PNG takes the graph with it; name a .png file.", "output")
    opened, ground = looking.read(options), looking.ground(options)
    files, found = weighed(opened.graph, ground)
    report = reported(opened, ground, files, found)
    if not report.ready:
        print("\n".join(explain.head(report)), file=sys.stderr)
        return 1
    try:
        plan = drawable(opened.graph, ground, found.worker)
    except GraphRefused as error:
        print(f"kindling: {printed_lines(error.message)}", file=sys.stderr)
        return 1
    settings = as_set(ground.settings, found.worker)
    drawing = Drawing(settings, generate.booted(settings, options.json))
    said = _said(opened) if settings.metadata else {}
    for number, (output, one) in enumerate(drawing.all(plan), 1):
        path = options.output if number == 1 else options.output.with_stem(f"{options.output.stem}-{number}")
        start = time.perf_counter()
        with writing(path):
            write_picture(path, finished(one.data, output.after, said))
        one.stages["serialize"] += time.perf_counter() - start
        generate.say(drawing.worker, one.recipe, path, one.stages, options.json, one.unknown)
    return 0


def _said(opened: Opened) -> dict[str, str]:
    """The graph as ComfyUI's pictures have it, and the page's own, where the file has that."""
    return texts(opened.graph, {"extra_pnginfo": {"workflow": opened.workflow}} if opened.workflow else {})


@dataclass(slots=True)
class Drawing:
    """Draws on one worker, each request once."""

    settings: Settings
    worker: Worker
    made: dict[tuple[ImageRequest, Before | None], list[Drawn]] = field(default_factory=dict)

    def all(self, plan: Plan) -> Iterator[tuple[Output, Drawn]]:
        """Every picture, with the output that it is of; what is saved and shown too is given once."""
        alike: dict[object, Output] = {}
        for output in plan.outputs:
            alike.setdefault((output.request, output.before, output.after), output)
        for output in alike.values():
            yield from ((output, one) for one in self.pictures(output))

    def pictures(self, what: Output | Before) -> list[Drawn]:
        """Those of one request, after the pictures before it. Raises what drawing raises."""
        asked = what.request, what.before
        if asked not in self.made:
            request = what.request
            if what.before:
                [first] = self.pictures(what.before)
                image = finished(first.data, what.before.after, {})
                request = request.model_copy(update={"images": (image,)})
            self.made[asked] = list(self._drawn(request))
        return self.made[asked]

    def _drawn(self, request: ImageRequest) -> Iterator[Drawn]:
        worker, volume = self.worker, self.settings.volume
        names = embedded(request, worker.spec)
        found = chosen(request.loras, volume), embeddings.chosen(names, volume)
        for recipe in recipes_of(request, worker.spec, "off", *found):
            recipe = replace(recipe, revision=worker.spec.revision)
            pixels, stages = worker.generate(recipe)
            start = time.perf_counter()
            parameters = generate.parameters_for(worker, recipe) if self.settings.metadata else None
            data = codec.encode(pixels.rgb, "png", 100, parameters)
            stages |= {"serialize": time.perf_counter() - start}
            yield Drawn(data, recipe, stages, pixels.tokens.unknown)
