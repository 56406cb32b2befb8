"""Kept workflows: their routes, and each one's own operation, with its fields."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from handler.api.workflows.fields import SIZE as SIZED
from handler.api.workflows.fields import TRANSPORT
from handler.api.workflows.service import ROUTE
from handler.catalog.spec import ModelSpec
from handler.core.settings import Settings
from handler.server.access import WORKFLOW
from handler.server.openapi.jobs import fields as later_fields
from handler.server.openapi.named import worded
from handler.server.openapi.operation import ALWAYS, JSON, Answer, Operation
from handler.server.openapi.requests import ANSWERED, SIZE, fields, nullable
from handler.server.openapi.responses import DRAWN, NATIVE, SELDOM
from handler.server.openapi.schema import COUNT, NULL, TEXT, Schema, array, closed, only, ref, whole
from handler.server.patience import DEADLINE

LIST, ONE = ROUTE, WORKFLOW
LATER = ("async", "webhook")
GRAPH: Schema = {
    "type": "object",
    "properties": {"workflow": {"type": "object", "description": "What ComfyUI saves, in API or in UI format."}},
    "required": ["workflow"],
    "description": "With the workflow, its fields as POST /explain finds them; null is as left out.",
}
ANY: Schema = {"type": "object", "description": "By the fields that GET of this path tells; null is as left out."}
NAME = {"type": "string", "pattern": "^[a-z0-9][a-z0-9_-]{0,63}(@[0-9a-f]{12})?$"}
PARAMETERS: dict[str, Schema] = {
    "name": {"in": "path", "required": True, "schema": NAME, "description": "Of a workflow; @VERSION is optional."}
}
HEAD = ("x-request-id", "traceparent")
FLAG = {"type": "boolean"}
TOLD: dict[str, Schema] = {
    "name": TEXT,
    "version": TEXT | {"description": "By what is in the graph."},
    "drawable": FLAG | {"description": "Whether this worker can draw it."},
    "why": {"anyOf": [TEXT, NULL], "description": "Why it cannot."},
    "fields": {"type": "object", "description": "JSON Schemas by field."},
    "required": array(TEXT),
    "outputs": array(whole({"node": TEXT, "title": TEXT})),
    "notes": array(TEXT),
    "fixed": FLAG | {"description": "Whether it comes with the image, and cannot be changed."},
}
EXPLAINED: dict[str, Schema] = {
    "ready": FLAG | {"description": "Whether it could be drawn now."},
    "graph": {"type": "object", "description": "In API format."},
    "fields": TOLD["fields"],
    "values": {"type": "object", "description": "What the graph has in its fields, but for images."},
    "required": array(TEXT),
}
SHOWN = {"node": TEXT, "title": TEXT, "width": COUNT, "height": COUNT}
MORE: dict[str, Schema] = {
    "images": array(whole(DRAWN | SHOWN, "b64_json", "url")),
    "seed": {"type": ["integer", "null"], "description": "Of the field of this name: sent again, the same pictures."},
    "workflow": TEXT,
    "version": TEXT,
    "notes": array(TEXT),
}
EVENT: Schema = {"type": only("image_generation.completed")}
ANSWERS: dict[str, Schema] = {
    "WorkflowBrought": GRAPH,
    "Workflow": whole(TOLD),
    "KeptWorkflow": whole(TOLD | {"shared": FLAG | {"description": "Whether other workers have it too."}}),
    "WholeWorkflow": whole(TOLD | {"graph": {"type": "object"}}),
    "Workflows": whole({"workflows": array(ref("Workflow"))}),
    "WorkflowImages": whole(NATIVE | MORE, *SELDOM, "image"),
    "WorkflowCompleted": whole(EVENT | NATIVE | MORE, *SELDOM, "image"),
    "WorkflowEvent": {"oneOf": [ref(name) for name in ("PartialImage", "Progress", "WorkflowCompleted", "Error")]},
}
LISTED = (
    Operation(
        "get",
        "Kept workflows, each with its fields",
        {200: Answer("As they are now.", {JSON: ref("Workflows")})},
        errors=(*ALWAYS, 400, 503, 504),
        parameters=(*HEAD, DEADLINE),
    ),
)
ROWS = (
    Operation(
        "get",
        "One kept workflow, with its graph",
        {200: Answer("As it is, or was.", {JSON: ref("WholeWorkflow")})},
        errors=(*ALWAYS, 400, 404, 503, 504),
        parameters=("name", *HEAD, DEADLINE),
    ),
    Operation(
        "put",
        "Keep a file of ComfyUI's under a name",
        {status: Answer("It is kept.", {JSON: ref("KeptWorkflow")}) for status in (200, 201)},
        {JSON: {"type": "object"}, "image/png": TEXT | {"format": "binary"}},
        errors=(*ALWAYS, 400, 408, 413, 415, 422, 429, 503, 504),
        parameters=("name", *HEAD, DEADLINE),
    ),
    Operation(
        "delete",
        "Forget a kept workflow, and what it was before",
        {204: Answer("It is gone.")},
        errors=(*ALWAYS, 400, 404, 503, 504),
        parameters=("name", *HEAD, DEADLINE),
    ),
)


def rows(name: str) -> tuple[Operation, ...]:
    """What else one kept workflow's own path answers."""
    return tuple(replace(row, summary=f"{row.summary}: {name}", parameters=(*HEAD, DEADLINE)) for row in ROWS)


def described(one: Mapping[str, Any]) -> tuple[str, Schema]:
    """What a kept workflow's own operation promises, and the schema of its body."""
    return f"Draw {one['name']}", ref(_body(one["name"]))


def bodies(kept: Sequence[Mapping[str, Any]], spec: ModelSpec, settings: Settings) -> dict[str, Schema]:
    """The schemas of kept workflows' bodies, by their names."""
    native = fields(spec, settings) | later_fields(settings)
    return {_body(one["name"]): worded(_fields(one, native)) for one in kept if one["drawable"]}


def _body(name: str) -> str:
    return f"Workflow_{name}"


def _fields(one: Mapping[str, Any], native: Mapping[str, Schema]) -> Schema:
    told = {name: native[name] for name in (*TRANSPORT, *LATER) if name in native} | one["fields"]
    if len(one["outputs"]) > 1 or one["fields"].get("n", {}).get("default", 1) > 1:
        told["partial_images"] = {"enum": [0]}  # which are of one picture
    sized = {SIZED: SIZE} if {"width", "height"} <= one["fields"].keys() else {}
    return closed(nullable(told | sized, one["required"]), tuple(one["required"]), ANSWERED)
