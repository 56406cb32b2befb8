"""What leads to an input: an output of a node that executes, or a value, whatever stands between on the page.

Reroutes and the like are passed, bypassed nodes by an input of the same type, and the walls of subgraphs, as the
page's `graphToPrompt` does (Comfy-Org/ComfyUI_frontend, `ExecutableNodeDTO.resolveInput` and `resolveOutput`).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from handler.api.dialects.comfy.ui.document import ANY, OUTER_IN, Link, Node, text
from handler.api.dialects.comfy.ui.kinds import GETTERS, PAGES, PRIMITIVE, REROUTES, SETTERS, SHOWN
from handler.api.dialects.comfy.ui.unfolding import BYPASSED, MUTED, Scope, Unfolded


@dataclass(frozen=True, slots=True)
class Output:
    """An output of a node, as API format links to it."""

    node: str
    slot: int


@dataclass(frozen=True, slots=True)
class Literal:
    """A value in place of a link; `typed` into a node for it, as it would be into the widget itself."""

    value: Any
    typed: bool = False


@dataclass(frozen=True, slots=True)
class Gone:
    """It comes from a muted node: the page leaves the input out."""


@dataclass(frozen=True, slots=True)
class Inlet:
    """An input, whose link is followed next."""

    scope: Scope
    node: Node
    place: int


@dataclass(frozen=True, slots=True)
class Outlet:
    """An output, which is followed through its node next."""

    scope: Scope
    node: Node
    slot: int


Source = Output | Literal | Gone | None
GONE: Final = Gone()


class Values(Protocol):
    """What stands in place of links."""

    def promoted(self, scope: Scope, port: int) -> Literal | None:
        """What is at an input of a subgraph, where no link leads to that of its host."""

    def primitive(self, scope: Scope, node: Node) -> Literal | None:
        """What a PrimitiveNode gives."""


@dataclass(frozen=True, slots=True)
class Following:
    """Follows the links of one file."""

    unfolded: Unfolded
    values: Values
    setters: dict[tuple[str, ...], dict[Any, Node]] = field(default_factory=dict)  # by the way to their graph

    def source(self, scope: Scope, node: Node, place: int) -> Source:
        """What the input at `place` gets; None if nothing leads to it, or only a circle."""
        self.unfolded.go_on()
        kind = node.inputs[place].type
        at: Inlet | Outlet | Source = Inlet(scope, node, place)
        seen = set()
        while isinstance(at, Inlet | Outlet):
            where = (type(at), at.scope.path, at.node.id, at.place if isinstance(at, Inlet) else at.slot)
            if where in seen:
                return None
            seen.add(where)
            at = self._before(at) if isinstance(at, Inlet) else self._through(at, kind)
        return at

    def _before(self, at: Inlet) -> Inlet | Outlet | Source:
        link = at.scope.graph.links.get(at.node.inputs[at.place].link) if 0 <= at.place < len(at.node.inputs) else None
        return self._origin(at.scope, link) if link else None

    def _origin(self, scope: Scope, link: Link) -> Inlet | Outlet | Source:
        if link.origin == OUTER_IN and scope.host:
            return self._outside(scope, link.slot)
        origin = scope.graph.nodes.get(link.origin)
        return Outlet(scope, origin, link.slot) if origin else None

    def _outside(self, scope: Scope, port: int) -> Inlet | Outlet | Source:
        """From a subgraph's own input to that of its host."""
        host, outer = scope.host, scope.outer
        if not host or not outer or not 0 <= port < len(scope.graph.inputs):
            return None
        name = scope.graph.inputs[port].name
        same = port < len(host.inputs) and host.inputs[port].name == name  # as it is in most files
        place = port if same else place_of(host, name)
        if place is not None and host.inputs[place].link in outer.graph.links:
            return Inlet(outer, host, place)
        return self.values.promoted(scope, port)

    def _through(self, at: Outlet, kind: str) -> Inlet | Outlet | Source:
        scope, node = at.scope, at.node
        if node.kind == PRIMITIVE:  # of what no server knows the page never asks whether it is muted
            return self.values.primitive(scope, node)
        if node.mode == MUTED and node.kind not in PAGES:
            return GONE
        if node.mode == BYPASSED:
            place = passing(node, at.slot, kind)
            return None if place is None else Inlet(scope, node, place)
        if inner := self.unfolded.inside(scope, node):
            return self._inside(inner, at.slot)
        if node.kind in REROUTES:
            return Inlet(scope, node, at.slot if at.slot < len(node.inputs) else 0)
        if node.kind in GETTERS:
            return self._set(scope, _name(node))
        if node.kind in SETTERS:
            return Inlet(scope, node, 0)
        return None if node.kind in SHOWN else Output(scope.named(node), at.slot)

    def _set(self, scope: Scope, name: str) -> Inlet | None:
        """What was set under a name: in this graph, or around it."""
        at: Scope | None = scope
        while at is not None and name:
            if at.path not in self.setters:
                nodes = [one for one in at.graph.nodes.values() if one.kind in SETTERS and one.inputs]
                self.setters[at.path] = {_name(one): one for one in nodes}
            if name in self.setters[at.path]:
                return Inlet(at, self.setters[at.path][name], 0)
            at = at.outer
        return None

    def _inside(self, inner: Scope, slot: int) -> Inlet | Outlet | Source:
        """From a host's output to what leads to it inside."""
        ports = inner.graph.outputs
        names = ports[slot].links if 0 <= slot < len(ports) else ()
        link = next((inner.graph.links[name] for name in names if name in inner.graph.links), None)
        return self._origin(inner, link) if link else None


def place_of(host: Node, name: str) -> int | None:
    """Which of a host's inputs has this name."""
    return next((place for place, slot in enumerate(host.inputs) if slot.name == name), None)


def passing(node: Node, slot: int, kind: str) -> int | None:
    """Which input a bypassed node passes on as its output `slot`, to an input of type `kind`."""
    inputs = [one.type for one in node.inputs]
    output = node.outputs[slot] if 0 <= slot < len(node.outputs) else ANY
    if not inputs:
        return None
    if kind == ANY:
        return slot if slot < len(inputs) else 0
    if 0 <= slot < len(inputs) and connects(inputs[slot], output) and connects(inputs[slot], kind):
        return slot
    if kind in inputs:
        return inputs.index(kind)
    return next((place for place, one in enumerate(inputs) if connects(one, output) and connects(one, kind)), None)


def connects(one: str, other: str) -> bool:
    """Whether the page lets two types be linked, which may each be several."""
    left, right = ({part.strip().lower() for part in each.split(",")} for each in (one, other))
    return ANY in left | right or bool(left & right)


def _name(node: Node) -> str:
    return text(node.values[0]) if not isinstance(node.values, Mapping) and node.values else ""
