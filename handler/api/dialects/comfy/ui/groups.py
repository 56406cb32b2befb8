"""Group nodes, which pages had before subgraphs: read as subgraphs, with a port for all that is not linked inside.

The page finds a group's inputs, outputs and values by their places alone (`GroupNodeConfig` in its `groupNode.js`), so
that ports are named by their places here, and the inputs of group nodes too.
"""

from collections.abc import Callable, Iterator, Mapping, Set
from dataclasses import dataclass, field, replace
from typing import Any, Final

from handler.api.dialects.comfy.ui.document import (
    OUTER_IN,
    OUTER_OUT,
    Document,
    Graph,
    Link,
    Node,
    Port,
    Slot,
    identity,
    mapping,
    node,
    records,
    whole,
)
from handler.api.dialects.comfy.ui.kinds import PRIMITIVE, REROUTES
from handler.api.dialects.comfy.ui.orders import Order

PREFIXES: Final = ("workflow/", "workflow>")
Known = Callable[[str], Order | None]


def with_groups(read: Document, found: Mapping[str, Any], known: Known) -> Document:
    """A document with a subgraph for each of the file's group nodes."""
    said = mapping(mapping(found.get("extra")).get("groupNodes"))
    groups = {name: Group(mapping(one), known).graph(name) for name, one in said.items()}
    if not groups:
        return read
    kinds = {prefix + name: group for name, group in groups.items() for prefix in PREFIXES}
    subgraphs = {name: _hosting(graph, kinds) for name, graph in {**read.subgraphs, **kinds}.items()}
    return Document(_hosting(read.graph, kinds), subgraphs)


def _hosting(graph: Graph, kinds: Mapping[str, Graph]) -> Graph:
    """A graph whose group nodes have inputs that are named by their places."""
    nodes = {
        name: replace(one, inputs=tuple(replace(slot, name=str(place)) for place, slot in enumerate(one.inputs)))
        for name, one in graph.nodes.items()
        if one.kind in kinds
    }
    return replace(graph, nodes={**graph.nodes, **nodes})


@dataclass(slots=True)
class Group:
    """What one group node stands for, while it is put together."""

    said: Mapping[str, Any]
    known: Known
    links: dict[str, Link] = field(default_factory=dict)
    widgets: list[Port] = field(default_factory=list)  # whose values the group node has
    sockets: list[Port] = field(default_factory=list)
    outputs: list[Port] = field(default_factory=list)

    def graph(self, name: str) -> Graph:
        """All of it."""
        nodes = [self._node(place, one) for place, one in enumerate(records(self.said.get("nodes")))]
        self.links.update(self._inside(nodes))
        inside = dict(self.links)
        there = {(link.target, link.place): name for name, link in inside.items()}
        away = {(link.origin, link.slot) for link in inside.values()}
        hidden = away - set(self._external())
        nodes = [self._with_ports(one, there, away) for one in nodes]
        for one in nodes:
            self.outputs += self._outputs(one, hidden)
        inputs = (*self.widgets, *self.sockets)
        for place, port in enumerate(inputs):
            self.links[port.links[0]] = replace(self.links[port.links[0]], slot=place)
        return Graph({one.id: one for one in nodes}, self.links, inputs, tuple(self.outputs), name)

    def _node(self, place: int, said: Mapping[str, Any]) -> Node:
        """One inside, by its place; its widgets are inputs, so that the group node's values reach them."""
        read = replace(node(said), id=str(place))
        if read.kind == PRIMITIVE:  # what the group node has for it passes through
            return replace(read, kind=REROUTES[0], inputs=(Slot("value", widget="value"),))
        order, there = self.known(read.kind), {slot.name for slot in read.inputs}
        more = tuple(Slot(one.name, widget=one.name) for one in (order.widgets if order else ()))
        return replace(read, inputs=(*read.inputs, *(slot for slot in more if slot.name not in there)))

    def _inside(self, nodes: list[Node]) -> Iterator[tuple[str, Link]]:
        said = self.said.get("links")
        for number, one in enumerate(said if isinstance(said, list) else ()):
            match one:
                case [int() as origin, slot, int() as target, place, *_] if max(origin, target) < len(nodes):
                    yield f"inside {number}", Link(str(origin), whole(slot), str(target), whole(place))

    def _with_ports(self, one: Node, there: Mapping[tuple[str, int], str], away: Set[tuple[str, int]]) -> Node:
        """A node whose inputs have their links, and, where there is none inside, one from a new port."""
        passed = one.kind in REROUTES and (one.id, 0) in away and (one.id, 0) in there
        slots = []
        for place, slot in enumerate(one.inputs):
            link = there.get((one.id, place), "")
            if not link and not passed:
                link = f"to {one.id} {place}"
                self.links[link] = Link(OUTER_IN, 0, one.id, place)
                ports = self.widgets if slot.widget else self.sockets
                ports.append(Port(f"widget {len(ports)}" if slot.widget else str(len(ports)), (link,), slot.type))
            slots.append(replace(slot, link=link))
        return replace(one, inputs=tuple(slots))

    def _outputs(self, one: Node, hidden: Set[tuple[str, int]]) -> Iterator[Port]:
        """Those that are seen: not linked inside, linked to the outside too, or as the group says."""
        config = mapping(mapping(mapping(self.said.get("config")).get(one.id)).get("output"))
        for slot, kind in enumerate(one.outputs):
            if mapping(config.get(str(slot))).get("visible", (one.id, slot) not in hidden):
                name = f"from {one.id} {slot}"
                self.links[name] = Link(one.id, slot, OUTER_OUT, 0)
                yield Port(name, (name,), kind)

    def _external(self) -> Iterator[tuple[str, int]]:
        """The outputs that are linked to the outside: a node's place, or the node, and an output."""
        said = self.said.get("external")
        for one in said if isinstance(said, list) else ():
            if isinstance(one, list) and len(one) >= 2:
                yield identity(one[0].get("index") if isinstance(one[0], dict) else one[0]), whole(one[1])
