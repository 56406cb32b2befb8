"""A graph judged as a whole: all that is wrong with it, at once, on the worker that suits it best."""

import io
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import islice
from typing import Any, Literal

from handler.api.dialects.comfy.faults import Fault
from handler.api.dialects.comfy.graph import planned, require_graph, require_outputs, walked
from handler.api.dialects.comfy.plan import Folder, Load, Plan, Served, class_of
from handler.api.dialects.comfy.table import INSTEAD, TABLE
from handler.api.dialects.comfy.walk import Walk
from handler.api.dialects.comfy.wanted import Serving, linked
from handler.core.errors import GraphRefused, RequestError

PATIENCE_S = 4.0  # after which no other worker is thought of
STAND_IN = (1024, 768)  # pixels of an image that is not there
HOLE = (200, 200, 500, 500)  # what is transparent of it
NO_OUTPUT = "No node gives a picture: a graph needs a SaveImage, or another output."
UNKNOWN = "no class of this name is known here."
Admit = Callable[[Plan, Served], None]  # raises a RequestError for what would be refused later


@dataclass(frozen=True, slots=True)
class Judgement:
    """What came of a graph on a worker: the plan, or why there is none; the walk knows each node."""

    worker: Serving
    walk: Walk
    plan: Plan | None
    refusal: str = ""

    @property
    def verdict(self) -> Literal["runs", "runs in part", "refused"]:
        """Whether it runs, runs in part, or is refused."""
        if self.plan is None:
            return "refused"
        return "runs in part" if self.plan.node_errors else "runs"


def judged(
    graph: Mapping[str, Any],
    workers: Sequence[Serving],
    serving: Callable[[Serving], Served],
    load: Load,
    admit: Admit,
) -> Judgement:
    """By the one of `workers` that draws most of it, with the fewest faults; GraphRefused if it is no graph at all."""
    require_graph(graph)
    begun, found = time.monotonic(), list[Judgement]()
    for worker in workers:
        found.append(_on(graph, worker, serving(worker), load, admit))
        if time.monotonic() - begun > PATIENCE_S:
            break
    return max(found, key=lambda one: (len(one.plan.outputs) if one.plan else 0, -len(wrong(one.walk))))


def _on(graph: Mapping[str, Any], worker: Serving, served: Served, load: Load, admit: Admit) -> Judgement:
    walk = walked(graph, served, load)
    try:
        require_outputs(graph)
        plan = planned(walk)
        admit(plan, served)
        refusal = ""
    except GraphRefused as error:
        plan, refusal = None, _said(error)
    except RequestError as error:
        plan, refusal = None, error.message
    _explore(walk)
    return Judgement(worker, walk, plan, refusal)


def _said(error: GraphRefused) -> str:
    """The sentence, where it is of the graph and not of its nodes."""
    if error.answer["error"]["type"] == "prompt_no_outputs":
        return NO_OUTPUT
    return "" if error.answer["node_errors"] else error.message


def _explore(walk: Walk) -> None:
    """Visit also what lies behind nodes of unknown classes, of a graph without an output all: for what is wrong."""
    todo = [node for node in walk.came if class_of(walk.graph.get(node)) not in TABLE] if walk.came else [*walk.graph]
    while todo:
        node, before = todo.pop(), len(walk.came)
        for wanted in (node, *linked(walk.graph.get(node) or {})):
            if wanted in walk.graph and wanted not in walk.came:
                walk.settle(wanted)
        fresh = islice(reversed(walk.came), len(walk.came) - before)
        todo += [one for one in fresh if class_of(walk.graph.get(one)) not in TABLE]


def wrong(walk: Walk) -> dict[str, list[Fault]]:
    """The nodes that something is wrong with, and what."""
    return {node: found for node, found in walk.wrong.items() if found}


def sentence(fault: Fault) -> str:
    """An error of ComfyUI's for people, who see at which node it is."""
    if fault["type"] == "missing_node_type":
        instead = INSTEAD.get(fault["extra_info"]["class_type"], UNKNOWN)
        return f"{instead[:1].upper()}{instead[1:]}"
    if fault["type"] == "dependency_cycle":
        return str(fault["message"])
    if fault["type"] in ("custom_validation_failed", "value_not_in_list"):
        return str(fault["details"])
    return f"{fault['message']}: {fault['details']}"


def standing_in(load: Load) -> Load:
    """`load`, which gives a grey image with a hole where there is none."""

    def loaded(name: str, subfolder: str, folder: Folder) -> bytes:
        try:
            return load(name, subfolder, folder)
        except (OSError, RequestError):
            return stand_in()

    return loaded


@cache
def stand_in() -> bytes:
    """A PNG for what nobody has sent yet."""
    from PIL import Image

    buffer = io.BytesIO()
    image = Image.new("RGBA", STAND_IN, (128, 128, 128, 255))
    image.paste((0, 0, 0, 0), HOLE)
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
