"""What a kept workflow means at one worker: its fields, whether it can be drawn, and what a request to it asks for.

Only this imports the table of node classes, which most workers never need; so it is imported late.
"""

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from handler.api.comfy.passes import steps
from handler.api.dialects.comfy.graph import read, require_graph, require_outputs
from handler.api.dialects.comfy.opening import opened
from handler.api.dialects.comfy.plan import Folder, Load, Output, Plan, Served
from handler.api.workflows import finding
from handler.api.workflows.fields import Field, FieldValues, require
from handler.api.workflows.filling import filled
from handler.api.workflows.keeping import Workflow
from handler.core.errors import GraphRefused, InvalidValue, RequestError
from handler.core.settings import Settings

SIDE = 512  # of the picture that stands for one that is yet to be sent


@dataclass(frozen=True, slots=True)
class Described:
    """A workflow as clients see it: `why` is what keeps this worker from drawing it, if anything does.

    `outputs` are the nodes whose pictures it answers with; `notes` are sentences for people.
    """

    workflow: Workflow
    fields: tuple[Field, ...] = ()
    outputs: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    why: str = ""

    def required(self, files: Sequence[str]) -> list[str]:
        """The names of fields that cannot be left out where there are these `files`."""
        return [one.name for one in self.fields if one.kept is not None and one.kept not in files]


@dataclass(frozen=True, slots=True)
class Wanted:
    """What one request to a workflow asks for: `graph` has its values, `seed` is the one that may have been drawn."""

    graph: Mapping[str, Any]
    outputs: tuple[Output, ...]
    notes: tuple[str, ...]
    seed: int | None


def sent(name: str, data: bytes) -> Workflow:
    """A file of ComfyUI's as a workflow; GraphRefused if it is none."""
    found = opened(data)
    require_graph(found.graph)
    require_outputs(found.graph)
    return Workflow(name, found.graph, found.notes)


def described(workflow: Workflow, served: Served, settings: Settings) -> Described:
    """What `workflow` is here. For a thread."""
    if workflow.fault:
        return Described(workflow, why=workflow.fault)
    try:
        found = finding.fields(workflow.graph, served.max_n)
    except GraphRefused as error:
        return Described(workflow, why=error.message)
    images = {one.name: _grey() for one in found if one.kind == "image" and one.kept is None and not one.masks}
    try:
        made = planned(workflow, images, found, served, settings, _stand_in)
    except RequestError as error:
        return Described(workflow, found, why=error.message)
    return Described(workflow, found, tuple(one.node for one in made.outputs), made.notes)


def wanted(
    workflow: Workflow, read: Callable[[Sequence[Field]], FieldValues], served: Served, settings: Settings, load: Load
) -> tuple[FieldValues, Wanted]:
    """What a request asks for, which `read` reads by the fields; raises why it cannot be drawn. For a thread."""
    if workflow.fault:
        raise InvalidValue(f"The workflow '{workflow.name}' cannot be drawn. {workflow.fault}", "workflow")
    try:
        fields = finding.fields(workflow.graph, served.max_n)
        asked = read(fields)
        require(fields, asked.values, served.files.get("input", ()))
        return asked, planned(workflow, asked.values, fields, served, settings, load)
    except GraphRefused as error:
        error.param = "workflow"
        raise


def planned(
    workflow: Workflow,
    values: Mapping[str, Any],
    fields: Sequence[Field],
    served: Served,
    settings: Settings,
    load: Load,
) -> Wanted:
    """The plan of a graph with `values` in it, whose every step the model can do."""
    made = filled(workflow.graph, fields, values)
    plan = read(made.graph, served, made.load(load))
    for output in plan.outputs:
        for step in steps(output):
            served.spec.validate(step.request, settings.step_cache)
    seeds = [made.value(one.places[0]) for one in fields if one.seed and one.default is None]
    notes = (*workflow.notes, *plan.notes, *_undrawn(plan))
    return Wanted(made.graph, _answered(plan), notes, next(iter(seeds), None))


def _answered(plan: Plan) -> tuple[Output, ...]:
    """The outputs that an answer has: previews only where nothing is saved or sent."""
    kept = tuple(one for one in plan.outputs if one.folder == "output" or one.streamed)
    return kept or plan.outputs


def _undrawn(plan: Plan) -> tuple[str, ...]:
    """Why other outputs are not drawn."""
    errors = [(node, one["class_type"], one["errors"][0]) for node, one in plan.node_errors.items()]
    return tuple(f"Node {node} ({kind}): {one['message']}: {one['details']}" for node, kind, one in errors)


def _stand_in(name: str, subfolder: str, folder: Folder) -> bytes:
    """In the place of any file: grey, with one half transparent."""
    return _grey()


@cache
def _grey() -> bytes:
    from PIL import Image

    picture = Image.new("RGBA", (SIDE, SIDE), (128, 128, 128, 255))
    picture.paste((128, 128, 128, 0), (0, 0, SIDE // 2, SIDE))
    picture.save(file := io.BytesIO(), "PNG")
    return file.getvalue()
