"""The links of cg-use-everywhere, which exist only in the page: what is not linked gets what goes everywhere."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from handler.api.dialects.comfy.ui.document import Node
from handler.api.dialects.comfy.ui.following import Following, Output
from handler.api.dialects.comfy.ui.kinds import EVERYWHERE
from handler.api.dialects.comfy.ui.unfolding import BYPASSED, MUTED, Scope, Unfolded


@dataclass(frozen=True, slots=True)
class Everywhere:
    """Of one file. Only what is plain is done: one source for a type, in the file's own graph."""

    unfolded: Unfolded
    following: Following
    notes: list[str]

    def link(self, graph: Mapping[str, Any], executed: list[tuple[Scope, Node]]) -> None:
        """Link what is not linked in `graph`, and say so."""
        sources = dict(self._sources())
        done = 0
        for scope, node in executed if sources else ():
            inputs = graph[scope.named(node)]["inputs"]
            for slot in node.inputs:
                found = sources.get(slot.type)
                if found and found.node != scope.named(node) and not (slot.link or slot.widget or slot.name in inputs):
                    inputs[slot.name] = [found.node, found.slot]
                    done += 1
        if sources:
            self.notes.append(f"{done} inputs are linked by their type, as the file's 'everywhere' nodes say.")

    def _sources(self) -> Iterator[tuple[str, Output]]:
        """For each type that one thing goes everywhere as, that."""
        found: dict[str, list[Output]] = {}
        for scope, node in self.unfolded.nodes:
            if node.kind in EVERYWHERE and node.mode not in (MUTED, BYPASSED):
                for place, _ in enumerate(node.inputs):
                    source = self.following.source(scope, node, place)
                    if isinstance(source, Output):
                        found.setdefault(self._type(scope, node, place), []).append(source)
        for kind, sources in found.items():
            if len(sources) == 1:
                yield kind, sources[0]
            else:
                self.notes.append(f"Several nodes send a {kind} everywhere; where each goes is not known: link them.")

    def _type(self, scope: Scope, node: Node, place: int) -> str:
        """Of what leads there, for these inputs take any."""
        link = scope.graph.links.get(node.inputs[place].link)
        origin = scope.graph.nodes.get(link.origin) if link else None
        types = origin.outputs if origin else ()
        return types[link.slot] if link and 0 <= link.slot < len(types) else node.inputs[place].type
