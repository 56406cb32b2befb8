"""What somebody's own file is most likely of, by the rest of the graph: a guess, with what it rests on."""

from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, Protocol

from handler.api.dialects.comfy.files import stem, table
from handler.api.dialects.comfy.plan import class_of
from handler.catalog.models import MODELS
from handler.catalog.spec import ModelSpec

LARGE = 768  # pixels a side; below them people draw with Stable Diffusion 1.5
LATENTS = ("EmptyLatentImage", "Efficient Loader")
SIDES = ("width", "height", "empty_latent_width", "empty_latent_height")
Clue = tuple[Sequence[str], str]  # families, and what says so


class File(Protocol):
    """A file that a graph names."""

    @property
    def folder(self) -> str: ...

    @property
    def name(self) -> str: ...


def guessed(graph: Mapping[str, Any], files: Sequence[File], name: str) -> tuple[ModelSpec, str]:
    """The row that a file `name` in `graph` is most likely of, and why."""
    families, why = list(table()["rows"]), list[str]()
    for clue, said in _clues(graph, files, name):
        fitting = [family for family in families if family in clue]
        if fitting and len(fitting) < len(families):
            families, why = fitting, [*why, *([said] if said else [])]
    likely = _by_name(name)
    row = likely if likely and _family(likely) == families[0] else table()["rows"][families[0]]
    return MODELS[row], f"a guess by {' and '.join(why) or 'what is most usual'}"


def _clues(graph: Mapping[str, Any], files: Sequence[File], name: str) -> Iterator[Clue]:
    """The surest first."""
    for file in files:
        if file.folder in ("vae", "text_encoders") and (families := table()[file.folder].get(stem(file.name))):
            yield families, f"the {'VAE' if file.folder == 'vae' else 'text encoder'} {file.name}"
    for body in graph.values():
        inputs = body.get("inputs") if isinstance(body.get("inputs"), dict) else {}
        for sign in (class_of(body), inputs.get("type")):
            if isinstance(sign, str) and (families := table()["signs"].get(sign)):
                yield families, f"the {'node' if sign == class_of(body) else 'type'} {sign}"
    if likely := _by_name(name):
        yield [_family(likely)], "its name"
    yield ["sd15", "sdxl"], ""  # what most checkpoints are
    yield _by_size(graph)


def _by_name(name: str) -> str:
    return next((row for pattern, row in table()["likely"].items() if fnmatchcase(stem(name), pattern)), "")


def _by_size(graph: Mapping[str, Any]) -> Clue:
    sides = [
        side
        for body in graph.values()
        if class_of(body) in LATENTS and isinstance(body.get("inputs"), dict)
        for field in SIDES
        if isinstance(side := body["inputs"].get(field), int)
    ]
    largest = max(sides, default=0)
    return ["sdxl" if largest >= LARGE else "sd15"], f"the size of {largest} pixels a side" if largest else ""


def _family(row: str) -> str:
    return MODELS[row].family.rpartition(".")[2]
