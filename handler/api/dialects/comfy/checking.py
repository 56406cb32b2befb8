"""One node's inputs, checked and read as ComfyUI does it: literals are coerced, links looked at, ranges held."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from handler.api.dialects.comfy import faults
from handler.api.dialects.comfy.faults import Fault
from handler.api.dialects.comfy.node import ANY, Input, Node

WIDEST = 400  # digits that a number may have
PLACEHOLDER = ("{{", "}}", "_PLACEHOLDER", "PLACEHOLDER_", "<placeholder>")


class Link(NamedTuple):
    """An output of another node."""

    node: str
    slot: int


@dataclass(slots=True)
class Inputs:
    """A node's inputs: literals as they are read, links to follow, and what is wrong."""

    values: dict[str, Any] = field(default_factory=dict)
    links: dict[str, Link] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)


Received = Callable[[Link], str | None]  # the type of an output; None where its class is unknown
Choices = Callable[[Input], Sequence[str]]


def checked(node: Node, given: Mapping[str, Any], received: Received, choices: Choices) -> Inputs:
    """Read `given`, the inputs that a graph has for a `node`."""
    found = Inputs()
    for name, wanted in _wanted(node, given):
        if name not in given:
            found.values[name] = None if wanted.required else wanted.default
            if wanted.required:
                found.faults.append(faults.missing(name))
        elif isinstance(value := given[name], list):
            _link(found, name, wanted, value, received)
        else:
            _literal(found, name, wanted, value, choices(wanted))
    return found


def _wanted(node: Node, given: Mapping[str, Any]) -> Iterator[tuple[str, Input]]:
    yield from node.inputs.items()
    if node.rest:
        yield from ((name, ANY) for name in given if name not in node.inputs)


def _link(found: Inputs, name: str, wanted: Input, value: list[Any], received: Received) -> None:
    link = _read(value)
    if link is None:
        found.faults.append(faults.bad_link(name, wanted, value))
        return
    try:
        kind = received(link)
    except LookupError:
        told = f"{name} is linked to output {link.slot} of node {link.node:.80}, which is not there"
        found.faults.append(faults.bad_link(name, wanted, value, told))
        return
    if kind is not None and not _fits(kind, wanted):
        found.faults.append(faults.mismatch(name, wanted, value, kind))
    else:
        found.links[name] = link


def _read(value: list[Any]) -> Link | None:
    """A node's id is a text, but numbers occur; a slot is a number."""
    match value:
        case [str() | int() as node, int() as slot] if not isinstance(slot, bool) and slot >= 0:
            return Link(str(node), slot)
    return None


def _fits(kind: str, wanted: Input) -> bool:
    if not isinstance(wanted.type, str):  # a word is checked when it is there
        return kind in ("*", "COMBO", "STRING")
    takes = set(wanted.type.split(","))
    return bool({"*"} & (takes | {kind}) or takes & set(kind.split(",")) or (takes == {"FLOAT"} and kind == "INT"))


def _literal(found: Inputs, name: str, wanted: Input, value: Any, choices: Sequence[str]) -> None:
    if isinstance(value, dict) and "__value__" in value:
        value = value["__value__"]
    try:
        found.values[name] = read = coerced(wanted, value)
    except (ValueError, TypeError, OverflowError) as error:
        found.faults.append(faults.unreadable(name, wanted, value, placeholder(value) or str(error)[:200]))
        return
    if wrong := fault_of(name, wanted, read, choices):
        found.faults.append(wrong)


def coerced(wanted: Input, value: Any) -> Any:
    """`value` as an INT, FLOAT, STRING or BOOLEAN, as Python's own types read it; ValueError or TypeError if not."""
    match wanted.type:
        case "INT":
            return int(_short(value))
        case "FLOAT":
            return _finite(float(_short(value)))
        case "STRING":
            return _text(value, wanted.longest)
        case "BOOLEAN":
            return bool(value)
    return value


def fault_of(name: str, wanted: Input, value: Any, choices: Sequence[str]) -> Fault | None:
    """What is wrong with a value of the right type."""
    if isinstance(wanted.type, str):
        if wanted.type in ("INT", "FLOAT"):
            return faults.outside(name, wanted, value)
        if wanted.type in ("STRING", "BOOLEAN", "*"):
            return None
        return faults.unreadable(name, wanted, value, f"it takes a link to an output of type {wanted.type}")
    if (wanted.folder and isinstance(value, str)) or value in choices:  # what a file's name means, the node itself says
        return None
    return faults.not_listed(name, wanted, value, choices, _placeholder(name, value))


def _placeholder(name: str, value: Any) -> str:
    return f"{name}: {placeholder(value)}" if placeholder(value) else ""


def placeholder(value: Any) -> str:
    """What to say where an app's template was sent without being filled in; empty where it was."""
    if isinstance(value, str) and any(mark in value for mark in PLACEHOLDER):
        return f"'{value:.80}' is a placeholder of an app's template; fill it in before you send the graph."
    return ""


def _short(value: Any) -> Any:
    """Python takes long to read numbers of very many digits."""
    if isinstance(value, str) and len(value) > WIDEST:
        raise ValueError(f"it has more than {WIDEST} characters")
    return value


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise ValueError("it is not finite")
    return value


def _text(value: Any, longest: int) -> str:
    if isinstance(value, dict | list):
        raise TypeError("it is no text")
    if len(text := str(value)) > longest:
        raise ValueError(f"it is longer than {longest} characters")
    return text
