"""What is found in a graph on the way to its fields: values that mean the same, and where they are."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from handler.api.dialects.comfy.node import Input, Node
from handler.api.dialects.comfy.plan import class_of
from handler.api.dialects.comfy.table import TABLE
from handler.api.workflows.fields import Kind, Place
from handler.api.workflows.wiring import inputs_of, leaf

KINDS: Mapping[str, Kind] = {"INT": "integer", "FLOAT": "number", "STRING": "string", "BOOLEAN": "boolean"}


@dataclass(slots=True)
class Found:
    """Values that mean the same, and where they are; `role` is what they mean, `name` what they are called for that."""

    role: str
    name: str
    value: Any
    wanted: Input
    places: list[Place]


@dataclass(slots=True)
class Search:
    """What was found in a graph so far."""

    graph: Mapping[str, Any]
    found: list[Found] = field(default_factory=list)
    taken: set[Place] = field(default_factory=set)

    def add(self, role: str, places: list[Place], name: str = "") -> None:
        """Values that are not a field yet, with those that are equal and mean the same."""
        fresh = [place for place in places if place not in self.taken]
        if not fresh:
            return
        self.taken.update(fresh)
        values = [self.value(place) for place in fresh]
        value = next((one for one in values if one != ""), values[0])
        called = name or role
        same = next((one for one in self.found if one.name == called and one.role == role and one.value == value), None)
        if same:
            same.places += fresh
        else:
            self.found.append(Found(role, called, value, takes(self.graph, fresh[0]), fresh))

    def value(self, place: Place) -> Any:
        """What the graph has there."""
        found = inputs_of(self.graph, place.node)[place.input]
        return found[place.key] if isinstance(found, dict) else found

    def link(self, role: str, node: str, name: str) -> None:
        """The value of an input, wherever it comes from."""
        if place := leaf(self.graph, node, name):
            self.add(role, [place])


def row_of(graph: Mapping[str, Any], node: str) -> Node:
    """The table's row of a node that has one."""
    return TABLE[class_of(graph[node])]


def literal(graph: Mapping[str, Any], node: str, name: str) -> bool:
    """Whether an input of a node has a value that a field can be for."""
    wanted, value = row_of(graph, node).inputs.get(name), inputs_of(graph, node).get(name)
    simple = wanted is not None and (not isinstance(wanted.type, str) or wanted.type in KINDS)
    return simple and isinstance(value, str | int | float)


def takes(graph: Mapping[str, Any], place: Place) -> Input:
    """The input that a value is for; of a LoRA inside an object its weight."""
    return row_of(graph, place.node).inputs.get(place.input, Input("FLOAT"))


def slug(text: str) -> str:
    """A title as a field's name."""
    bare = re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_")[:40]
    return bare if bare[:1].isalpha() else f"field_{bare}".rstrip("_")
