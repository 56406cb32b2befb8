"""A graph's nodes, each visited once and after those that it needs: what their functions say, and what is wrong."""

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Never

from handler.api.dialects.comfy import faults
from handler.api.dialects.comfy.checking import Inputs, Link, checked, coerced, fault_of
from handler.api.dialects.comfy.faults import Fault
from handler.api.dialects.comfy.files import listed
from handler.api.dialects.comfy.node import Input, Node, Refused
from handler.api.dialects.comfy.plan import Load, Output, Served, class_of, title_of
from handler.api.dialects.comfy.table import INSTEAD, TABLE
from handler.core.errors import RequestError

MOST_PIXELS = 128 * 1024 * 1024  # that are made of a graph's images, all together
LONGEST_S = 10.0  # that may be spent on a graph
MOST_NOTES = 100


@dataclass(slots=True)
class Walk:
    """What is known of a graph so far: `values` of nodes that are sound, `wrong` of all others."""

    graph: Mapping[str, Any]
    served: Served
    load: Load
    values: dict[str, Any] = field(default_factory=dict)
    wrong: dict[str, list[Fault]] = field(default_factory=dict)
    shown: dict[str, Output | None] = field(default_factory=dict)  # of outputs
    came: dict[str, tuple[str, ...]] = field(default_factory=dict)  # from which nodes
    notes: dict[tuple[str, str], None] = field(default_factory=dict)  # a node and a sentence for people, in order
    pixels: int = 0
    begun: float = field(default_factory=time.monotonic)

    def settle(self, root: str) -> None:
        """Visit `root`, and before it all that it needs."""
        path: dict[str, Iterator[str]] = {root: self._visit(root)}
        while path:
            node = next(reversed(path))
            if (wanted := next(path[node], None)) is None:
                path.pop(node)
            elif wanted in path:
                if node not in self.wrong:  # one is enough to tell
                    nodes = list(path)
                    self.wrong[node] = [faults.cycle([*nodes[nodes.index(wanted) :], wanted])]
            elif wanted not in self.came:
                path[wanted] = self._visit(wanted)

    def output(self, found: Output) -> Output:
        """The same, with the nodes that lead to it."""
        before, todo = {found.node}, [found.node]
        while todo:
            fresh = [one for one in self.came[todo.pop()] if one not in before]
            before.update(fresh)
            todo += fresh
        order = tuple(one for one in self.came if one in before)
        return replace(found, order=order)

    def note(self, node: str, sentence: str) -> None:
        """Keep a sentence for people, once."""
        if len(self.notes) < MOST_NOTES:
            self.notes[node, sentence] = None

    @property
    def told(self) -> tuple[str, ...]:
        """The notes, each with the node that it is about."""
        return tuple(f"Node {node} ({class_of(self.graph[node])}): {sentence}" for node, sentence in self.notes)

    def _visit(self, node: str) -> Iterator[str]:
        """Yields what it needs to know first; then it is in `came`, and in `values` or `wrong`."""
        row = TABLE.get(class_of(self.graph.get(node)))
        if row is None:
            self.came[node] = ()
            self.wrong[node] = [self._unknown(node)]
            return
        inputs = checked(row, self._given(node), self._type, lambda wanted: listed(wanted, self.served))
        links = dict(inputs.links)
        lazy = {name: links.pop(name) for name, wanted in row.inputs.items() if wanted.lazy and name in links}
        yield from (link.node for link in links.values())
        ready = not inputs.faults and all(self._fill(inputs, row, name, link) for name, link in links.items())
        chosen = {name: lazy[name] for name in (self._chosen(row, inputs) if ready else ()) if name in lazy}
        yield from (link.node for link in chosen.values())
        self.came[node] = tuple(dict.fromkeys(link.node for link in (links | chosen).values()))
        wrong = inputs.faults + self.wrong.pop(node, [])
        if ready and not wrong and all(self._fill(inputs, row, name, link) for name, link in chosen.items()):
            self._run(node, row, inputs)
        else:
            self.wrong[node] = inputs.faults + [one for one in wrong if one not in inputs.faults]

    def _given(self, node: str) -> Mapping[str, Any]:
        given = self.graph[node].get("inputs")
        return given if isinstance(given, dict) else {}

    def _type(self, link: Link) -> str | None:
        """Of an output; LookupError if there is none."""
        row = TABLE.get(class_of(self.graph[link.node]))
        return row.outputs[link.slot] if row else None

    def _fill(self, inputs: Inputs, row: Node, name: str, link: Link) -> bool:
        """Take what a link brings, checked again where it is a word or a number; False if nothing comes."""
        if link.node not in self.values:
            return False
        value = self.values[link.node][link.slot]
        wanted = row.inputs.get(name)
        if wanted and value is not None:
            value = self._read(inputs, name, wanted, value)
        elif wanted and wanted.required and wanted.type != "*":
            told = f"{name} is linked to output {link.slot} of node {link.node:.80}, to which nothing leads"
            inputs.faults.append(faults.bad_link(name, wanted, [link.node, link.slot], told))
        inputs.values[name] = value
        return not inputs.faults

    def _read(self, inputs: Inputs, name: str, wanted: Input, value: Any) -> Any:
        simple = not isinstance(wanted.type, str) or wanted.type in ("INT", "FLOAT", "STRING", "BOOLEAN")
        if not simple:
            return value
        try:
            value = coerced(wanted, value)
        except (ValueError, TypeError, OverflowError) as error:
            inputs.faults.append(faults.unreadable(name, wanted, value, str(error)[:200]))
            return value
        if wrong := fault_of(name, wanted, value, listed(wanted, self.served)):
            inputs.faults.append(wrong)
        return value

    def _chosen(self, row: Node, inputs: Inputs) -> tuple[str, ...]:
        for name, wanted in row.inputs.items():
            inputs.values.setdefault(name, wanted.default)
        return row.chooses(**inputs.values) if row.chooses else ()

    def _run(self, node: str, row: Node, inputs: Inputs) -> None:
        values = {name: inputs.values.get(name, wanted.default) for name, wanted in row.inputs.items()}
        if row.rest:
            values[row.rest] = {name: value for name, value in inputs.values.items() if name not in row.inputs}
        here = Here(self, node, row.name)
        try:
            here.spend(0)  # of time: some nodes compare names with all that there are
            found = row.run(here, **values)
        except Refused as error:
            self.wrong[node] = [faults.refused(error.kind, error.name, error.sentence)]
        except RequestError as error:
            self.wrong[node] = [faults.refused("custom_validation_failed", "", error.message)]
        else:
            if row.output:  # which passes on what it shows
                self.shown[node] = found
                found = tuple(next(iter(values.values()), None) for _ in row.outputs)
            self.values[node] = (found,) if len(row.outputs) == 1 and not row.output else found

    def _unknown(self, node: str) -> Fault:
        kind, title = class_of(self.graph.get(node)), title_of(self.graph.get(node))
        return faults.unknown(node, kind, title, INSTEAD.get(kind, ""))


@dataclass(frozen=True, slots=True)
class Here:
    """Where a node's function stands."""

    walk: Walk
    node: str
    kind: str

    @property
    def served(self) -> Served:
        """What the worker serves."""
        return self.walk.served

    @property
    def load(self) -> Load:
        """Reads a file."""
        return self.walk.load

    def note(self, sentence: str) -> None:
        """Tell people what is ignored or only approximate."""
        self.walk.note(self.node, sentence)

    def spend(self, pixels: int) -> None:
        """Refuse what would make, all in all, too many pixels, or take too long."""
        self.walk.pixels += pixels
        if self.walk.pixels > MOST_PIXELS:
            self.refuse(f"the graph makes more than {MOST_PIXELS // 10**6} million pixels before it draws any.")
        if time.monotonic() - self.walk.begun > LONGEST_S:
            self.refuse(f"reading the graph takes longer than {LONGEST_S:g} s; send a smaller one, or smaller images.")

    def refuse(self, sentence: str, name: str = "") -> Never:
        """Refuse the node."""
        raise Refused(sentence, name)
