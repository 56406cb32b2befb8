"""Every node class that is read, by name, those that only rename included; and what to use instead of others."""

import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib import resources
from typing import Any

from handler.api.dialects.comfy.node import ANY, IMAGE, MODEL, Node, maybe, rows
from handler.api.dialects.comfy.nodes import (
    conditioning,
    efficient,
    images,
    latents,
    loaders,
    loading,
    masks,
    outputs,
    primitives,
    resizing,
    samplers,
)

SINGLE = rows(
    Node("Reroute", "utils", primitives.value, ("*",), {"value": ANY}),
    Node(
        "SaveImageAs",
        "image",
        outputs.save_as,
        ("IMAGE",),
        {"images": IMAGE, "filename_prefix": maybe(outputs.PREFIX)},
        output=True,
        rest="rest",
    ),
    Node("SpeedPatch", "model_patches", loaders.same_model, ("MODEL",), {"model": MODEL}, rest="rest"),
)
INSIDE = ("SpeedPatch", "SaveImageAs")  # rows that only aliases have
PLAIN: Mapping[str, Node] = (
    loaders.TABLE
    | conditioning.TABLE
    | latents.TABLE
    | samplers.TABLE
    | loading.TABLE
    | images.TABLE
    | resizing.TABLE
    | masks.TABLE
    | efficient.TABLE
    | primitives.TABLE
    | outputs.TABLE
    | SINGLE
)


def _data(name: str) -> Mapping[str, Any]:
    return tomllib.loads(resources.files(__package__).joinpath(name).read_text("utf-8"))


def _renamed(run: Callable[..., Any], ours: Mapping[str, str], fixed: Mapping[str, Any]) -> Callable[..., Any]:
    """`run`, called with other names of its inputs, and with values of some."""

    def renamed(at: Any, **given: Any) -> Any:
        return run(at, **{ours.get(name, name): value for name, value in given.items()}, **fixed)

    return renamed


def _alias(name: str, said: Mapping[str, Any]) -> Node:
    """The row of a class that is like another's."""
    like = PLAIN[said["like"]]
    theirs: Mapping[str, str] = said.get("inputs", {})
    fixed: Mapping[str, Any] = said.get("values", {})
    inputs = {theirs.get(one, one): wanted for one, wanted in like.inputs.items() if one not in fixed}
    run = _renamed(like.run, {their: our for our, their in theirs.items()}, fixed)
    row = replace(like, name=name, title=name, category="custom", run=run, inputs=inputs)
    return _arranged(row, said["outputs"]) if "outputs" in said else row


def _arranged(row: Node, places: Sequence[int]) -> Node:
    """`row` with other outputs: each the one at this place of its own."""

    def arranged(at: Any, **given: Any) -> Any:
        found = row.run(at, **given)
        values = found if len(row.outputs) > 1 else (found,)
        return tuple(values[place] for place in places) if len(places) > 1 else values[places[0]]

    return replace(row, run=arranged, outputs=tuple(row.outputs[place] for place in places), names=())


RENAMED = _data("aliases.toml")
ALIASES = {name: _alias(name, said) for name, said in RENAMED.items()}
TABLE: Mapping[str, Node] = {name: row for name, row in PLAIN.items() if name not in INSIDE} | ALIASES
INSTEAD: Mapping[str, str] = {
    name: sentence for sentence, names in _data("instead.toml").items() for name in names["classes"]
}


def like(kind: str) -> tuple[str, Mapping[str, str]]:
    """The plain class that one of the table is like, with its names for that one's inputs."""
    said: Mapping[str, Any] = RENAMED.get(kind, {"like": kind})
    return said["like"], said.get("inputs", {})
