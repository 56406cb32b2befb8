"""The table of node classes as ComfyUI's `/object_info` says it, from which clients make their pages."""

from typing import Any

from handler.api.dialects.comfy.files import listed
from handler.api.dialects.comfy.node import Input, Node
from handler.api.dialects.comfy.plan import Served
from handler.api.dialects.comfy.table import ALIASES, TABLE
from handler.api.dialects.comfy.ui.orders import has_choices
from handler.core.request import MAX_SEED


def object_info(served: Served) -> dict[str, Any]:
    """Every class, with the files that a worker which serves `served` can use."""
    return {name: described(row, served) for name, row in TABLE.items()}


def names(folder: str, served: Served) -> list[str]:
    """The files of a folder that such a worker can use."""
    return [*listed(Input("", folder=folder), served)]


def described(row: Node, served: Served) -> dict[str, Any]:
    """One class."""
    groups = {
        "required": {name: wanted for name, wanted in row.inputs.items() if wanted.required},
        "optional": {name: wanted for name, wanted in row.inputs.items() if not wanted.required},
    }
    kept = {group: inputs for group, inputs in groups.items() if inputs or group == "required"}
    told = {name: _input(row, wanted, served) for name, wanted in row.inputs.items()}
    return {
        "input": {group: {name: told[name] for name in inputs} for group, inputs in kept.items()},
        "input_order": {group: list(inputs) for group, inputs in kept.items()},
        "output": list(row.outputs),
        "output_is_list": [False] * len(row.outputs),
        "output_name": list(row.names or row.outputs),
        "name": row.name,
        "display_name": row.title or row.name,
        "description": "",
        "python_module": "custom_nodes.kindling" if row.name in ALIASES else "nodes",
        "category": row.category,
        "output_node": row.output,
    }


def _input(row: Node, wanted: Input, served: Served) -> list[Any]:
    limits = {"default": wanted.default, "min": wanted.low, "max": wanted.high, "step": wanted.step}
    told: dict[str, Any] = {name: value for name, value in limits.items() if value is not None}
    if wanted.type == "STRING":
        told |= {"multiline": wanted.multiline} | ({"dynamicPrompts": True} if has_choices(row, wanted) else {})
    if wanted.type == "INT" and wanted.high == MAX_SEED:
        told |= {"control_after_generate": True}
    if wanted.folder == "input":
        told |= {"image_upload": True}
    if isinstance(wanted.type, str):
        return [wanted.type, told]
    return [list(listed(wanted, served)), told]
