"""The values inside subgraphs, which the nodes that stand for these, their hosts, may say anew.

A host keeps them by place: of its `proxyWidgets`, each a node inside and a widget of it, or else of those inputs that
lead to widgets inside. What it does not say is what the widget inside has.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from handler.api.dialects.comfy.ui.document import Graph, Node, Port, Slot, identity
from handler.api.dialects.comfy.ui.following import Literal
from handler.api.dialects.comfy.ui.kinds import PRIMITIVE
from handler.api.dialects.comfy.ui.orders import SEEDS
from handler.api.dialects.comfy.ui.unfolding import Scope, Unfolded
from handler.api.dialects.comfy.ui.widgets import CONTROLS, Named

OWN = "-1"  # in a proxy: not a node inside, but the host's input of that name


@dataclass(frozen=True, slots=True)
class Said:
    """What a host says: of its inputs by name, and of widgets inside by their node's id, then their name."""

    ports: dict[str, Any] = field(default_factory=dict)
    widgets: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass(slots=True)
class Hosting:
    """All of a file's. `own` reads a node's values, as the file has them where it is defined."""

    unfolded: Unfolded
    own: Callable[[Node], Named]
    _said: dict[tuple[str, ...], Said] = field(default_factory=dict)

    def values(self, scope: Scope, node: Node) -> Named:
        """A node's, with what its host says of them."""
        found = self.own(node)
        told = self.said(scope).widgets.get(node.id, {})
        fresh = {name: value for name, value in told.items() if name in found.values}
        return Named({**found.values, **fresh}, notes=found.notes)

    def primitive(self, scope: Scope, node: Node) -> Literal | None:
        """What a PrimitiveNode gives to all inputs that it leads to."""
        told = self.said(scope).widgets.get(node.id, {})
        values = [*told.values()] or ([] if isinstance(node.values, Mapping) else list(node.values))
        return Literal(values[0], typed=True) if values else None

    def promoted(self, scope: Scope, port: int) -> Literal | None:
        """What is at an input of a subgraph, where no link leads to that of its host."""
        self.unfolded.go_on()
        while 0 <= port < len(scope.graph.inputs):
            known, said = scope.graph.inputs[port], self.said(scope).ports
            if known.name in said:
                return Literal(said[known.name])
            target = next(self._targets(scope.graph, known), None)
            if target is None:
                return None
            node, slot = target
            inner = self.unfolded.inside(scope, node)
            if inner is None:
                values = self.values(scope, node).values
                return Literal(values[slot.widget]) if slot.widget in values else None
            scope, port = inner, _place(inner.graph, slot.name)
        return None

    def said(self, scope: Scope) -> Said:
        """What the host of a subgraph says."""
        if scope.host is None or scope.outer is None:
            return Said()
        if scope.path not in self._said:
            self._said[scope.path] = self._read(scope, scope.host, scope.outer)
        return self._said[scope.path]

    def _read(self, scope: Scope, host: Node, outer: Scope) -> Said:
        found, led = Said(), self._led(scope.graph)
        values = host.named or host.values
        if isinstance(values, Mapping):
            found.ports.update(values)
        elif proxies := host.properties.get("proxyWidgets"):
            for proxy, value in zip(proxies if isinstance(proxies, list) else (), values, strict=False):
                if value is not None and isinstance(proxy, list) and len(proxy) >= 2 and isinstance(proxy[1], str):
                    _tell(found, led, identity(proxy[0]), proxy[1], value)
        else:
            found.ports.update(self._placed(scope, values))
        for name, value in self.said(outer).widgets.get(host.id, {}).items():
            _tell(found, led, OWN, name, value)
        return found

    def _led(self, graph: Graph) -> Mapping[tuple[str, str], str]:
        """The input that leads to a widget, by that one's node and name; and each input by `OWN` and its name."""
        found = {(OWN, port.name): port.name for port in graph.inputs}
        for port in graph.inputs:
            self.unfolded.go_on()
            for node, slot in self._targets(graph, port):
                for name in (slot.name, slot.widget):
                    found.setdefault((node.id, name), port.name)
        return found

    def _placed(self, scope: Scope, values: tuple[Any, ...]) -> Iterator[tuple[str, Any]]:
        """By place, where the value that says how a seed changes may have one too."""
        ports = [port for port in scope.graph.inputs if self._promotes(scope, port)]
        surplus, seed, rest = len(values) > len(ports), False, iter(values)
        for port in ports:
            value = next(rest, None)
            if (surplus or seed) and isinstance(value, str) and value in CONTROLS:
                value = next(rest, None)
            if value is not None:
                yield port.name, value
            seed = any(slot.widget in SEEDS for _, slot in self._targets(scope.graph, port))

    def _promotes(self, scope: Scope, port: Port) -> bool:
        """Whether an input leads to a widget."""
        self.unfolded.go_on()
        for node, slot in self._targets(scope.graph, port):
            if slot.widget or node.kind == PRIMITIVE:
                return True
            inner = self.unfolded.inside(scope, node)
            if inner and (place := _place(inner.graph, slot.name)) >= 0:
                return self._promotes(inner, inner.graph.inputs[place])
        return False

    def _targets(self, graph: Graph, port: Port) -> Iterator[tuple[Node, Slot]]:
        """The inputs inside to which one of a subgraph leads."""
        for name in port.links:
            self.unfolded.go_on()
            link = graph.links.get(name)
            node = graph.nodes.get(link.target) if link else None
            if link and node and 0 <= link.place < len(node.inputs) and node.inputs[link.place].link == name:
                yield node, node.inputs[link.place]
            elif node:  # some files have other places in their links
                yield from ((node, slot) for slot in node.inputs if slot.link == name)


def _tell(found: Said, led: Mapping[tuple[str, str], str], inner: str, name: str, value: Any) -> None:
    """Keep what is said of a widget where it is looked for: at the input that leads to it, if there is one."""
    name = name.rpartition(": ")[2]  # before that, old pages wrote the ids of nested nodes
    if port := led.get((inner, name)):
        found.ports[port] = value
    else:
        found.widgets.setdefault(inner, {})[name] = value


def _place(graph: Graph, name: str) -> int:
    return next((place for place, port in enumerate(graph.inputs) if port.name == name), -1)
