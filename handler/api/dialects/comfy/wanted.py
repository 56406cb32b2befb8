"""Which files a graph names, and which worker would serve it: a row of the catalogue, with people's own files over it.

Of a file that nobody has seen, what it is of is guessed, by all that the graph says; how is told.
"""

import shlex
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from handler.api.dialects.comfy.checking import placeholder
from handler.api.dialects.comfy.files import MODEL_FOLDERS, instead, meant, stem, table
from handler.api.dialects.comfy.graph import outputs_of
from handler.api.dialects.comfy.guessing import guessed
from handler.api.dialects.comfy.nodes.efficient import BAKED, NONE
from handler.api.dialects.comfy.plan import Served, class_of
from handler.api.dialects.comfy.table import TABLE
from handler.catalog.models import MODELS
from handler.catalog.spec import ModelSpec
from handler.core.untrusted import printed
from handler.volume.autoencoder import label

FIELDS = {  # of classes that are not in the table
    "ckpt_name": "checkpoints",
    "unet_name": "diffusion_models",
    "vae_name": "vae",
    "lora_name": "loras",
}
PARTS = ("vae", "text_encoders")
MOST_FILES = 200  # that are looked for
MOST = 3  # workers that are thought of for one graph
# A file's name -> what KINDLING_WEIGHTS calls it, and the rows that take it by what it holds; none if it is not there.
Look = Callable[[str], tuple[str, tuple[str, ...]]]


@dataclass(frozen=True, slots=True)
class Named:
    """A file that a node names, and ComfyUI's folder for it."""

    node: str
    field: str
    folder: str
    name: str


@dataclass(frozen=True, slots=True)
class Serving:
    """One that would serve a graph, by its settings; `because` says how that is known, and whether it is a guess."""

    spec: ModelSpec
    weights: tuple[str, ...]
    vae: str
    because: str
    guess: bool = False

    def settings(self, places: bool = True) -> tuple[str, ...]:
        """What it is started with; without `places`, where files lie that are not on the volume is left out."""
        told = [one if places else label(one) for one in (*self.weights, self.vae)]
        named = {"MODEL": self.spec.id, "WEIGHTS": ",".join(told[:-1]), "VAE": told[-1]}
        return tuple(f"KINDLING_{name}={shlex.quote(printed(value))}" for name, value in named.items() if value)


def leading(graph: Mapping[str, Any]) -> set[str]:
    """The nodes that lead to an output by any link, be their class known or not; all of them where no output is."""
    todo = outputs_of(graph) or list(graph)
    found = set(todo)
    while todo:
        fresh = [one for one in linked(graph[todo.pop()]) if one in graph and one not in found]
        found.update(fresh)
        todo += fresh
    return found


def linked(body: Mapping[str, Any]) -> list[str]:
    """The ids that a node's inputs may be links to."""
    inputs = body.get("inputs")
    values = inputs.values() if isinstance(inputs, dict) else ()
    return [str(value[0]) for value in values if isinstance(value, list) and len(value) == 2]


def named(graph: Mapping[str, Any]) -> list[Named]:
    """The first files that nodes name which lead to an output, in the graph's order."""
    needed = leading(graph)
    return list(islice((one for node in graph if node in needed for one in _of(node, graph[node])), MOST_FILES))


def _of(node: str, body: Mapping[str, Any]) -> Iterator[Named]:
    kind, given = class_of(body), body.get("inputs")
    inputs = given if isinstance(given, dict) else {}
    row = TABLE.get(kind)
    folders = {name: wanted.folder for name, wanted in row.inputs.items() if wanted.folder} if row else FIELDS
    for field, folder in folders.items():
        if isinstance(value := inputs.get(field), str) and value not in ("", NONE, BAKED):
            yield Named(node, field, folder, value)
    if row and row.rest:
        yield from _in_lists(node, inputs)


def _in_lists(node: str, inputs: Mapping[str, Any]) -> Iterator[Named]:
    """LoRAs of rgthree's loader, which are objects, and of the stacker."""
    for field, value in inputs.items():
        if isinstance(value, dict) and value.get("on") and field.lower().startswith("lora_"):
            value = value.get("lora")
        if isinstance(value, str) and field.lower().startswith("lora_") and value not in ("", NONE):
            yield Named(node, field, "loras", value)


def workers(graph: Mapping[str, Any], files: list[Named], look: Look) -> list[Serving]:
    """Those that would serve one of the models which a graph names, the first named first."""
    names = list(dict.fromkeys(file.name for file in files if file.folder in MODEL_FOLDERS))
    offered = [name for name in names if not (instead(name) or placeholder(name))]
    found = [_worker(graph, files, name, look) for name in offered[:MOST]]
    if not found:
        row, because = guessed(graph, files, next(iter(names), ""))
        found = [Serving(row, (), "", because, guess=True)]
    return list({(one.spec.id, one.weights): one for one in found}.values())


def _worker(graph: Mapping[str, Any], files: list[Named], name: str, look: Look) -> Serving:
    """One that serves this model."""
    own: tuple[str, ...]
    row, own, guess = meant(name), (), False
    if row:
        because = f"which the name '{name}' means"
    else:
        called, by = look(name)
        own, guess = (called,), not by
        row, because = (MODELS[by[0]], f"by the tensors that {called} holds") if by else guessed(graph, files, name)
    parts = dict.fromkeys(
        look(one.name)[0]
        for one in files
        if one.folder in PARTS and stem(one.name) not in table()[one.folder] and not placeholder(one.name)
    )
    return Serving(row, (*own, *parts), "", because, guess)


def serving(worker: Serving, files: list[Named], there: Mapping[str, tuple[str, ...]], max_n: int) -> Served:
    """`worker` as it would be with all that the graph names: LoRAs and text encoders are taken to be there."""
    lacking = {folder: tuple(one.name for one in files if one.folder == folder) for folder in ("loras", *PARTS)}
    unknown = {
        folder: tuple(name for name in names if stem(name) not in table().get(folder, {}) and not placeholder(name))
        for folder, names in lacking.items()
    }
    held = {folder: (*there.get(folder, ()), *names) for folder, names in unknown.items()}
    return Served(worker.spec, {**there, **held}, worker.weights, worker.vae, max_n)
