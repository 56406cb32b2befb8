"""The links of cg-use-everywhere, which exist only in the page: what is not linked gets what goes everywhere."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from handler.api.dialects.comfy.ui.document import Node, identity, mapping, records, whole
from handler.api.dialects.comfy.ui.following import Following, Output
from handler.api.dialects.comfy.ui.kinds import EVERYWHERE
from handler.api.dialects.comfy.ui.unfolding import BYPASSED, MUTED, Scope, Unfolded

Found = Iterator[tuple[str, str, Output]]  # a node, an input of it, and what goes there


@dataclass(frozen=True, slots=True)
class Everywhere:
    """Of one file. Its newer pages say which links these are; else only what is plain is done: one source for a type,
    in the file's own graph."""

    unfolded: Unfolded
    following: Following
    notes: list[str]

    def link(self, graph: Mapping[str, Any], found: Mapping[str, Any]) -> None:
        """Link what is not linked in `graph`, and say so; `found` is the file."""
        said = mapping(found.get("extra")).get("ue_links")
        links = self._told(said) if isinstance(said, list) and said else self._guessed(dict(self._sources()))
        done = 0
        for node, name, source in links:
            inputs = graph[node]["inputs"] if node in graph and source.node in graph else {name: None}
            if name not in inputs:
                inputs[name] = [source.node, source.slot]
                done += 1
        if done:
            self.notes.append(f"{done} inputs are linked as the file's 'everywhere' nodes say.")

    def _told(self, said: list[Any]) -> Found:
        nodes = {scope.named(node): node for scope, node in self.unfolded.nodes}
        for one in records(said):
            name, place = identity(one.get("downstream")), whole(one.get("downstream_slot"))
            slots = nodes[name].inputs if name in nodes else ()
            if 0 <= place < len(slots):
                source = Output(identity(one.get("upstream")), whole(one.get("upstream_slot")))
                yield name, slots[place].name, source

    def _guessed(self, sources: Mapping[str, Output]) -> Found:
        for scope, node in self.unfolded.nodes if sources else ():
            name = scope.named(node)
            for slot in node.inputs:
                source = sources.get(slot.type)
                if source and source.node != name and not slot.widget:
                    yield name, slot.name, source

    def _sources(self) -> Iterator[tuple[str, Output]]:
        """For each type that one thing goes everywhere as, that."""
        found: dict[str, list[Output]] = {}
        for scope, node in self.unfolded.nodes:
            if node.kind in EVERYWHERE and node.mode not in (MUTED, BYPASSED):
                for place, _ in enumerate(node.inputs):
                    source = self.following.source(scope, node, place)
                    if isinstance(source, Output):
                        found.setdefault(_type(scope, node, place), []).append(source)
        for kind, sources in found.items():
            if len(sources) == 1:
                yield kind, sources[0]
            else:
                self.notes.append(f"Several nodes send a {kind:.40} everywhere, and where each goes is not known.")


def _type(scope: Scope, node: Node, place: int) -> str:
    """Of what leads there, for these inputs take any."""
    link = scope.graph.links.get(node.inputs[place].link)
    origin = scope.graph.nodes.get(link.origin) if link else None
    types = origin.outputs if origin else ()
    return types[link.slot] if link and 0 <= link.slot < len(types) else node.inputs[place].type
