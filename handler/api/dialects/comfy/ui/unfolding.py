"""Every node that a file asks to execute: those of its graph, and of the subgraphs that nodes in it stand for.

A node inside a subgraph is called by the way to it, `57:8`: node 8 of what node 57 stands for.
"""

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from handler.api.dialects.comfy import faults
from handler.api.dialects.comfy.ui.document import Document, Graph, Node

MOST_NODES = 10_000
DEEPEST = 32  # subgraphs inside each other
LONGEST_S = 5.0  # that may be spent on a file
MUTED, BYPASSED = 2, 4  # modes of a node


@dataclass(frozen=True, slots=True, eq=False)
class Scope:
    """A graph where it stands: in the node `host` of another one, or, without one, as the file's own."""

    graph: Graph
    path: tuple[str, ...] = ()
    host: Node | None = None
    outer: "Scope | None" = None

    def named(self, node: Node) -> str:
        """A node's id in API format."""
        return ":".join((*self.path, node.id))


@dataclass(frozen=True, slots=True)
class Unfolded:
    """`nodes` with where each stands; `scopes` are what hosts stand for, by the way to these."""

    nodes: tuple[tuple[Scope, Node], ...]
    scopes: Mapping[tuple[str, ...], Scope] = field(default_factory=dict)
    begun: float = field(default_factory=time.monotonic)

    def inside(self, scope: Scope, node: Node) -> Scope | None:
        """What a node stands for, if it is a host."""
        return self.scopes.get((*scope.path, node.id))

    def go_on(self) -> None:
        """GraphRefused once the file has taken too long."""
        if time.monotonic() - self.begun > LONGEST_S:
            raise faults.no("invalid_prompt", f"The workflow takes longer than {LONGEST_S:g} s to convert.")


def unfolded(document: Document) -> Unfolded:
    """All of it, hosts too; GraphRefused if that is too much. What is inside a muted or bypassed host is left out."""
    nodes: list[tuple[Scope, Node]] = []
    scopes: dict[tuple[str, ...], Scope] = {}
    todo = [Scope(document.graph)]
    while todo:
        scope = todo.pop()
        nodes += ((scope, node) for node in scope.graph.nodes.values())
        for inner in _inner(document, scope):
            scopes[inner.path] = inner
            todo.append(inner)
        if len(nodes) + len(todo) > MOST_NODES:
            raise faults.no("invalid_prompt", f"The workflow has more than {MOST_NODES} nodes, which are not read.")
    return Unfolded(tuple(nodes), scopes)


def _inner(document: Document, scope: Scope) -> Iterator[Scope]:
    for node in scope.graph.nodes.values():
        found = document.subgraphs.get(node.kind)
        if found is None or node.mode in (MUTED, BYPASSED):
            continue
        if len(scope.path) == DEEPEST:
            raise faults.no("invalid_prompt", f"Subgraphs are in each other more than {DEEPEST} deep.")
        yield Scope(found, (*scope.path, node.id), node, scope)
