"""What a UI-format file says: nodes, links and subgraphs, read from whatever shape a version of the page gave them.

Nothing here fails: what has the wrong type is as if it were not there, for the page opens such files too.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

OUTER_IN: Final = "-10"  # a subgraph's own inputs, as the origin of a link inside it
OUTER_OUT: Final = "-20"  # its outputs, as the target of one
ANY: Final = "*"


@dataclass(frozen=True, slots=True)
class Slot:
    """An input: `link` is the id of what leads to it, `widget` the name of the widget whose place it takes."""

    name: str
    type: str = ANY
    link: str = ""
    widget: str = ""
    label: str = ""


@dataclass(frozen=True, slots=True)
class Link:
    """From an output to an input, both by their node's id and their place."""

    origin: str
    slot: int
    target: str
    place: int


@dataclass(frozen=True, slots=True)
class Port:
    """An input or output of a subgraph, with the links inside that begin or end there."""

    name: str
    links: tuple[str, ...] = ()
    type: str = ANY


@dataclass(frozen=True, slots=True)
class Node:
    """`values` are the widgets', by place or by name; `named` those that newer pages also keep by name."""

    id: str
    kind: str
    mode: int = 0
    title: str = ""
    inputs: tuple[Slot, ...] = ()
    outputs: tuple[str, ...] = ()  # types
    values: tuple[Any, ...] | Mapping[str, Any] = ()
    named: Mapping[str, Any] = field(default_factory=dict)
    properties: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Graph:
    """Nodes and links by id; of a subgraph its ports too."""

    nodes: Mapping[str, Node] = field(default_factory=dict)
    links: Mapping[str, Link] = field(default_factory=dict)
    inputs: tuple[Port, ...] = ()
    outputs: tuple[Port, ...] = ()
    title: str = ""


@dataclass(frozen=True, slots=True)
class Document:
    """A file: its own graph, and those that nodes in it stand for, by these nodes' class."""

    graph: Graph
    subgraphs: Mapping[str, Graph] = field(default_factory=dict)


def is_document(found: object) -> bool:
    """Whether it is UI format."""
    return isinstance(found, dict) and isinstance(found.get("nodes"), list)


def document(found: Mapping[str, Any]) -> Document:
    """Read a file's JSON object, for which `is_document` holds."""
    subgraphs: dict[str, Graph] = {}
    todo = [found]
    while todo:
        for said in records(mapping(todo.pop().get("definitions")).get("subgraphs")):
            if (name := text(said.get("id"))) and name not in subgraphs:
                subgraphs[name] = graph(said)
                todo.append(said)
    return Document(graph(found), subgraphs)


def graph(said: Mapping[str, Any]) -> Graph:
    """One graph of a file, whose links are lists or objects, or, as very old pages have them, an object of these."""
    nodes = (node(one) for one in records(said.get("nodes")))
    links = dict(_links(said.get("links")))
    inputs, outputs = (tuple(_port(one) for one in records(said.get(key))) for key in ("inputs", "outputs"))
    return Graph({one.id: one for one in nodes if one.id}, links, inputs, outputs, text(said.get("name")))


def node(said: Mapping[str, Any]) -> Node:
    """One node of a file."""
    values = said.get("widgets_values")
    return Node(
        identity(said.get("id")),
        text(said.get("type")) or text(said.get("class_type")),
        whole(said.get("mode")),
        text(said.get("title")),
        tuple(_slot(one) for one in records(said.get("inputs"))),
        tuple(kind(one.get("type")) for one in records(said.get("outputs"))),
        values if isinstance(values, dict) else tuple(values) if isinstance(values, list) else (),
        mapping(said.get("widgets_values_named")),
        mapping(said.get("properties")),
    )


def _slot(said: Mapping[str, Any]) -> Slot:
    widget = text(mapping(said.get("widget")).get("name"))
    name = text(said.get("name")) or widget
    return Slot(name, kind(said.get("type")), identity(said.get("link")), widget, text(said.get("label")))


def _port(said: Mapping[str, Any]) -> Port:
    links = said.get("linkIds")
    ids = tuple(identity(one) for one in links) if isinstance(links, list) else ()
    return Port(text(said.get("name")), ids, kind(said.get("type")))


def _links(said: object) -> Iterator[tuple[str, Link]]:
    for one in said.values() if isinstance(said, dict) else said if isinstance(said, list) else ():
        match one:
            case [name, origin, slot, target, place, *_]:
                yield identity(name), Link(identity(origin), whole(slot), identity(target), whole(place))
            case {"id": name, "origin_id": origin, "target_id": target}:
                slot, place = whole(one.get("origin_slot")), whole(one.get("target_slot"))
                yield identity(name), Link(identity(origin), slot, identity(target), place)


def identity(said: object) -> str:
    """An id, which is a number or a text; empty where it is neither."""
    if isinstance(said, float) and said.is_integer():
        said = int(said)
    return str(said) if isinstance(said, str | int) and not isinstance(said, bool) else ""


def kind(said: object) -> str:
    """A type; old pages write a list of choices for one."""
    if isinstance(said, list):
        return "COMBO"
    return said if isinstance(said, str) and said else ANY


def whole(said: object) -> int:
    """A whole number, else 0."""
    return said if isinstance(said, int) else 0


def text(said: object) -> str:
    """A text, else an empty one."""
    return said if isinstance(said, str) else ""


def mapping(said: object) -> Mapping[str, Any]:
    """An object, else an empty one."""
    return said if isinstance(said, dict) else {}


def records(said: object) -> Iterable[Mapping[str, Any]]:
    """Those members of a list that are objects."""
    return [one for one in said if isinstance(one, dict)] if isinstance(said, list) else []
