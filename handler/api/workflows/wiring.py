"""How a graph's nodes hang together, without recursion: what leads to an input, and where a value comes from."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeGuard

from handler.api.dialects.comfy.node import Node
from handler.api.dialects.comfy.plan import class_of
from handler.api.dialects.comfy.table import TABLE
from handler.api.workflows.fields import Place

NUMBERS = ("INT", "FLOAT")


def linked(value: Any) -> TypeGuard[list[Any]]:
    """Whether an input comes from another node."""
    match value:
        case [str() | int(), int() as slot] if not isinstance(slot, bool) and slot >= 0:
            return True
    return False


def inputs_of(graph: Mapping[str, Any], node: str) -> Mapping[str, Any]:
    """What a graph has for a node's inputs."""
    body = graph.get(node)
    found = body.get("inputs") if isinstance(body, dict) else None
    return found if isinstance(found, dict) else {}


def ordered(graph: Mapping[str, Any], roots: Sequence[str]) -> list[str]:
    """The nodes of known classes that lead to `roots`, each after those that it needs."""
    found: dict[str, None] = {}
    begun = set[str]()
    for root in roots:
        path: list[tuple[str, Iterator[str]]] = [(root, iter(_sources(graph, root)))]
        begun.add(root)
        while path:
            node, left = path[-1]
            if (source := next(left, None)) is None:
                found[node] = None
                path.pop()
            elif source not in begun:
                begun.add(source)
                path.append((source, iter(_sources(graph, source))))
    return [node for node in found if class_of(graph.get(node)) in TABLE]


def _sources(graph: Mapping[str, Any], node: str) -> list[str]:
    """What a node needs, in the order of its inputs; of a switch, what it chooses."""
    given = inputs_of(graph, node)
    row = TABLE.get(class_of(graph.get(node)))
    names = wanted(row, given) if row else []
    return [str(given[name][0]) for name in names if linked(given.get(name)) and str(given[name][0]) in graph]


def wanted(row: Node, given: Mapping[str, Any]) -> list[str]:
    """The inputs that matter; a lazy one where it is chosen, or that cannot be told."""
    names = [*row.inputs, *(name for name in given if row.rest and name not in row.inputs)]
    lazy = {name for name in row.inputs if row.inputs[name].lazy}
    plain = {name: given.get(name, row.inputs[name].default) for name in row.inputs}
    if not row.chooses or any(linked(plain[name]) for name in row.inputs if name not in lazy and row.name in SWITCHES):
        return names
    chosen = row.chooses(**plain)
    return [name for name in names if name not in lazy or name in chosen]


SWITCHES = tuple(name for name, row in TABLE.items() if row.chooses and "*" in row.outputs)


def behind(
    graph: Mapping[str, Any], node: str, names: Sequence[str], types: Sequence[str], ended: Sequence[str] = ()
) -> list[str]:
    """The nodes that lead to some inputs of one, the nearest first, by links of these types alone.

    None of the classes `ended` is among them, nor what leads to it.
    """
    found: dict[str, None] = {}
    todo = _followed(graph, node, names, types)
    while todo:
        one = todo.pop(0)
        row = TABLE.get(class_of(graph.get(one)))
        if one in found or one == node or row is None or row.name in ended:
            continue
        found[one] = None
        todo += _followed(graph, one, wanted(row, inputs_of(graph, one)), types)
    return [*found]


def _followed(graph: Mapping[str, Any], node: str, names: Sequence[str], types: Sequence[str]) -> list[str]:
    row, given = TABLE[class_of(graph[node])], inputs_of(graph, node)
    return [
        str(given[name][0])
        for name in names
        if linked(given.get(name)) and str(given[name][0]) in graph and (_type(row, name) in types)
    ]


def _type(row: Node, name: str) -> str:
    takes = row.inputs.get(name)
    return "*" if takes is None else takes.type if isinstance(takes.type, str) else "STRING"


def leaf(graph: Mapping[str, Any], node: str, name: str) -> Place | None:
    """The `Place` of the number that an input has, or that one node after another only passes on; None if none does."""
    seen = set[str]()
    while node not in seen:
        seen.add(node)
        value = inputs_of(graph, node).get(name)
        if isinstance(value, int | float) and not isinstance(value, bool):
            return Place(node, name)
        if not linked(value) or (row := TABLE.get(class_of(graph.get(str(value[0]))))) is None:
            return None
        node = str(value[0])
        passing = [one for one in wanted(row, inputs_of(graph, node)) if _passes(row, one)]
        if len(passing) != 1:
            return None
        [name] = passing
    return None


def _passes(row: Node, name: str) -> bool:
    """Whether a node may give this input as it is: it is its only number, or anything at all."""
    return _type(row, name) in (*NUMBERS, "*")
