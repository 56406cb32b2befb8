"""What is wrong with a node or a graph, in the shapes that ComfyUI answers with and its clients read."""

from collections.abc import Mapping, Sequence
from typing import Any

from handler.api.dialects.comfy.node import Input
from handler.core.errors import GraphRefused

Fault = dict[str, Any]
MOST = 2.0**64  # of numbers that are said again
LISTED = 20  # choices that are named; of more only the number is


def fault(kind: str, message: str, details: str, **extra: Any) -> Fault:
    """One error of a node, or of a graph."""
    return {"type": kind, "message": message, "details": details, "extra_info": extra}


def config(wanted: Input, choices: Sequence[str] = ()) -> list[Any]:
    """What an input takes, as `/object_info` says it."""
    limits = {"default": wanted.default, "min": wanted.low, "max": wanted.high, "step": wanted.step}
    told: dict[str, Any] = {name: value for name, value in limits.items() if value is not None}
    if wanted.multiline:
        told["multiline"] = True
    return [wanted.type if isinstance(wanted.type, str) else list(choices or wanted.type), told]


def echo(value: Any) -> Any:
    """What was sent, if it is short and JSON has it; else how it begins."""
    if isinstance(value, bool | None) or (isinstance(value, int | float) and abs(value) < MOST):
        return value
    if isinstance(value, int):
        return f"a number of {value.bit_length()} bits"  # of which Python may refuse to write the digits
    if isinstance(value, list) and len(value) <= 3:
        return [one if isinstance(one, str | int) and one == echo(one) else f"{one!s:.200}" for one in value]
    return f"{value!s:.200}"


def missing(name: str) -> Fault:
    """A required input is not there."""
    return fault("required_input_missing", "Required input is missing", name, input_name=name)


def bad_link(name: str, wanted: Input, value: Any, told: str = "") -> Fault:
    """A list that is no link, or, as `told` says, one to nothing."""
    message = "Bad linked input" if told else "Bad linked input, must be a length-2 list of [node_id, slot_index]"
    extra = {"input_name": name, "input_config": config(wanted), "received_value": echo(value)}
    return fault("bad_linked_input", message, told or name, **extra)


def mismatch(name: str, wanted: Input, link: Any, received: str) -> Fault:
    """A link from an output of another type."""
    details = f"{name}, received_type({received}) mismatch input_type({config(wanted)[0]})"
    extra = {"input_name": name, "input_config": config(wanted), "received_type": received, "linked_node": echo(link)}
    return fault("return_type_mismatch", "Return type mismatch between linked nodes", details, **extra)


def unreadable(name: str, wanted: Input, value: Any, why: str) -> Fault:
    """A value of another type, that is not read as this one."""
    message = f"Failed to convert an input value to a {wanted.type} value"
    extra = {
        "input_name": name,
        "input_config": config(wanted),
        "received_value": echo(value),
        "exception_message": why,
    }
    return fault("invalid_input_type", message, f"{name}, {echo(value)}, {why}", **extra)


def outside(name: str, wanted: Input, value: Any) -> Fault | None:
    """A number below the least or above the most; None where it is within."""
    for kind, words, limit in (
        ("value_smaller_than_min", "smaller than min", wanted.low),
        ("value_bigger_than_max", "bigger than max", wanted.high),
    ):
        if limit is not None and (value < limit if "smaller" in words else value > limit):
            extra = {"input_name": name, "input_config": config(wanted), "received_value": echo(value)}
            return fault(kind, f"Value {echo(value)} {words} of {limit}", name, **extra)
    return None


def not_listed(name: str, wanted: Input, value: Any, choices: Sequence[str], told: str = "") -> Fault:
    """A word that is none of the choices; `told` says more of it."""
    few = len(choices) <= LISTED
    listed = str(list(choices)) if few else f"(list of length {len(choices)})"
    details = told or f"{name}: '{value!s:.200}' not in {listed}"
    known = config(wanted, choices) if few else None
    extra = {"input_name": name, "input_config": known, "received_value": echo(value)}
    return fault("value_not_in_list", "Value not in list", details, **extra)


def refused(kind: str, name: str, sentence: str) -> Fault:
    """What a node says of itself."""
    message = "Value not in list" if kind == "value_not_in_list" else "Custom validation failed for node"
    return fault(kind, message, f"{name} - {sentence}" if name else sentence, input_name=name)


def unknown(node: str, kind: str, title: str, instead: str = "") -> Fault:
    """A class that is not in the table; `instead` says what to do where it is known."""
    message = f"Node '{title}' not found. It is not among those that Kindling draws; see docs/comfyui.md."
    message = f"Node '{title}' ({kind}) cannot be drawn: {instead}" if instead else message
    extra = {"node_id": node, "class_type": kind, "node_title": title}
    return fault("missing_node_type", message, f"Node ID '#{node}'", **extra)


def cycle(path: Sequence[str]) -> Fault:
    """Nodes that wait for each other."""
    shown = " -> ".join(path if len(path) <= LISTED else [*path[:3], "...", *path[-3:]])
    return fault("dependency_cycle", "Dependency cycle detected", shown, cycle_nodes=list(path[:LISTED]))


def no(
    kind: str, message: str, details: str = "", nodes: Mapping[str, Any] | None = None, **extra: Any
) -> GraphRefused:
    """The graph is refused as a whole: ComfyUI's envelope."""
    answer = {"error": fault(kind, message, details, **extra), "node_errors": dict(nodes or {})}
    return GraphRefused(message if details in ("", message) else f"{message.rstrip('.')}: {details}", answer)
