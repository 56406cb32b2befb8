"""From UI format to API format, as ComfyUI's page makes it: the nodes that execute, with their values and links."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from handler.api.dialects.comfy import faults
from handler.api.dialects.comfy.ui.document import Node, document
from handler.api.dialects.comfy.ui.everywhere import Everywhere
from handler.api.dialects.comfy.ui.following import Following, Gone, Literal, Output, Source
from handler.api.dialects.comfy.ui.groups import with_groups
from handler.api.dialects.comfy.ui.hosting import Hosting
from handler.api.dialects.comfy.ui.kinds import PAGES
from handler.api.dialects.comfy.ui.orders import Order, order
from handler.api.dialects.comfy.ui.prompts import chosen
from handler.api.dialects.comfy.ui.unfolding import BYPASSED, MUTED, Scope, unfolded
from handler.api.dialects.comfy.ui.widgets import FREE, Named, named

MOST_NOTES = 100
LONGEST = 16 << 20  # characters of a graph's inputs: what a subgraph has counts wherever it is used


@dataclass(frozen=True, slots=True)
class Converted:
    """A graph in API format, and sentences for people on what was left out or had to be guessed."""

    graph: dict[str, Any]
    notes: tuple[str, ...]


def converted(found: Mapping[str, Any], classes: Mapping[str, Any] | None = None) -> Converted:
    """`found`, a UI-format workflow, by our table and `classes`, what an `/object_info` says.

    GraphRefused where it has no node that executes, or too many.
    """
    return Conversion(found, classes or {}).run()


@dataclass(slots=True)
class Conversion:
    """One file's."""

    found: Mapping[str, Any]
    classes: Mapping[str, Any]
    notes: list[str] = field(default_factory=list)
    orders: dict[str, Order | None] = field(default_factory=dict)
    length: int = 0

    def run(self) -> Converted:
        """Convert it."""
        flat = unfolded(with_groups(document(self.found), self.found, self.order))
        hosting = Hosting(flat, self._own)
        following = Following(flat, hosting)
        executed = [(scope, node) for scope, node in flat.nodes if executes(node) and not flat.inside(scope, node)]
        graph = {scope.named(node): self._node(scope, node, hosting, following) for scope, node in executed}
        if not graph:
            raise faults.no("prompt_no_outputs", "The workflow has no node that executes.")
        Everywhere(flat, following, self.notes).link(graph, self.found)
        for body in graph.values():
            body["inputs"] = {name: value for name, value in body["inputs"].items() if not _dangles(value, graph)}
        return Converted(graph, tuple(self._told(flat.nodes)))

    def order(self, kind: str) -> Order | None:
        """A class's widgets, if it is known."""
        if kind not in self.orders:
            self.orders[kind] = order(kind, self.classes)
        return self.orders[kind]

    def _own(self, node: Node) -> Named:
        return named(node, self.order(node.kind))

    def _node(self, scope: Scope, node: Node, hosting: Hosting, following: Following) -> dict[str, Any]:
        following.unfolded.go_on()
        values = hosting.values(scope, node)
        self.notes += (f"Node {scope.named(node)} ({node.kind}): {sentence}" for sentence in values.notes)
        inputs = {name: _boxed(value) for name, value in values.values.items()}
        known = self.order(node.kind)
        for place, slot in enumerate(node.inputs):
            source, free = _as_typed(following.source(scope, node, place), slot.name, known)
            if free and (note := f"Node {scope.named(node)} ({node.kind}): {slot.name} {FREE}") not in self.notes:
                self.notes.append(note)
            _put(inputs, slot.name, source)
        self._weigh(inputs)
        title = node.title or (known.title if known else node.kind)
        return {"inputs": inputs, "class_type": node.kind, "_meta": {"title": title}}

    def _weigh(self, inputs: Mapping[str, Any]) -> None:
        """GraphRefused once the graph is too long."""
        for name, value in inputs.items():
            self.length += len(name) + len(json.dumps(value))
            if self.length > LONGEST:
                raise faults.no("invalid_prompt", f"The workflow is longer than {LONGEST >> 20} MB in API format.")

    def _told(self, nodes: tuple[tuple[Scope, Node], ...]) -> Iterator[str]:
        """What is not there any more, and what was noted."""
        silent = Counter(node.mode for _, node in nodes if node.mode in (MUTED, BYPASSED) and node.kind not in PAGES)
        for mode, word in ((MUTED, "muted"), (BYPASSED, "bypassed")):
            if count := silent[mode]:
                yield f"{count} {word} {'node is' if count == 1 else 'nodes are'} left out, as on the page."
        yield from self.notes[:MOST_NOTES]


def executes(node: Node) -> bool:
    """Whether API format has it."""
    return bool(node.kind) and node.mode not in (MUTED, BYPASSED) and node.kind not in PAGES


def _as_typed(source: Source, name: str, known: Order | None) -> tuple[Source, bool]:
    """A text that a PrimitiveNode gives, as the page sends it from the widget that it leads to; whether it chose."""
    dynamic = known is not None and any(widget.dynamic for widget in known.widgets if widget.name == name)
    if dynamic and isinstance(source, Literal) and source.typed and isinstance(source.value, str):
        value, free = chosen(source.value)
        return Literal(value), free
    return source, False


def _put(inputs: dict[str, Any], name: str, source: Source) -> None:
    match source:
        case Output(node, slot):
            inputs[name] = [node, slot]
        case Literal(value):
            inputs[name] = _boxed(value)
        case Gone():
            inputs.pop(name, None)


def _boxed(value: Any) -> Any:
    """A list would be read as a link."""
    return {"__value__": value} if isinstance(value, list) else value


def _dangles(value: Any, graph: Mapping[str, Any]) -> bool:
    """Whether it is a link to a node that is not there."""
    return isinstance(value, list) and value[0] not in graph
