"""From a graph to a `Plan`: every output that can be drawn becomes a request, by structure, never by a node's id.

A graph is walked from its outputs, without recursion, each node once, and a lazy switch is followed on the side that it
chooses: what no output needs is not looked at. No node is executed: its function in the table says what it would mean.
"""

from collections.abc import Iterator, Mapping
from typing import Any, Never

from handler.api.dialects.comfy import faults
from handler.api.dialects.comfy.plan import Load, Plan, Served, class_of, title_of
from handler.api.dialects.comfy.table import INSTEAD, TABLE
from handler.api.dialects.comfy.walk import Walk
from handler.core.quoting import QUOTED

MOST_NODES = 10_000
MOST_OUTPUTS = 100


def read(graph: Mapping[str, Any], served: Served, load: Load) -> Plan:
    """What `graph`, in API format, asks for; GraphRefused if that is nothing that can be drawn."""
    require_graph(graph)
    require_outputs(graph)
    return planned(walked(graph, served, load))


def walked(graph: Mapping[str, Any], served: Served, load: Load) -> Walk:
    """A walk to all outputs of a graph."""
    walk = Walk(graph, served, load)
    for node in outputs_of(graph):
        walk.settle(node)
    return walk


def planned(walk: Walk) -> Plan:
    """What a walk found; GraphRefused if no output can be drawn."""
    outputs = outputs_of(walk.graph)
    drawn = tuple(walk.output(found) for node in outputs if (found := walk.shown.get(node)))
    wrong = _node_errors(walk, [node for node in outputs if node not in walk.values])
    if not drawn:
        _refuse(wrong)
    for node in outputs:
        if node in walk.values and walk.shown[node] is None:
            walk.note(node, "it shows no picture that is drawn here, so that it gives nothing.")
    return Plan(drawn, wrong, walk.told)


def require_graph(graph: Any) -> None:
    """GraphRefused if it is no graph in API format, or too large."""
    if not isinstance(graph, Mapping) or not graph:
        raise faults.no("no_prompt", "No prompt provided", "No prompt provided")
    if isinstance(graph.get("nodes"), list):
        raise faults.no("invalid_prompt", "This is a workflow in ComfyUI's UI format, which has to be converted first.")
    if len(graph) > MOST_NODES:
        raise faults.no("invalid_prompt", f"The graph has {len(graph)} nodes; at most {MOST_NODES} are read.")
    for node, body in graph.items():
        if max(map(len, _names(node, body))) > QUOTED:
            told = f"A node's id, its class and the names of its inputs have at most {QUOTED} characters."
            raise faults.no("invalid_prompt", told, f"Node ID '#{node:.80}'")
        if not isinstance(body, dict) or not isinstance(body.get("class_type"), str):
            told = "Cannot execute because a node is missing the class_type property."
            raise faults.no("missing_node_type", told, f"Node ID '#{node}'", node_id=node)


def _names(node: str, body: Any) -> Iterator[str]:
    """Of a node: what may be said of it again."""
    yield node
    kind, inputs = (body.get("class_type"), body.get("inputs")) if isinstance(body, dict) else ("", {})
    yield kind if isinstance(kind, str) else ""
    yield from inputs if isinstance(inputs, dict) else ()


def require_outputs(graph: Mapping[str, Any]) -> list[str]:
    """The ids of a graph's output nodes; GraphRefused if it has none that is known, or too many."""
    outputs = outputs_of(graph)
    if not outputs:
        raise _none_that_show(graph)
    if len(outputs) > MOST_OUTPUTS:
        raise faults.no("invalid_prompt", f"The graph has {len(outputs)} outputs; at most {MOST_OUTPUTS} are drawn.")
    return outputs


def outputs_of(graph: Mapping[str, Any]) -> list[str]:
    """The ids of a graph's output nodes."""
    return [node for node in graph if (row := TABLE.get(class_of(graph[node]))) and row.output]


def _none_that_show(graph: Mapping[str, Any]) -> Exception:
    """No output at all; it may be that an unknown class was meant to be one."""
    unknown = next((node for node in graph if class_of(graph[node]) not in TABLE), None)
    if unknown is None:
        return faults.no("prompt_no_outputs", "Prompt has no outputs")
    kind = class_of(graph[unknown])
    one = faults.unknown(unknown, kind, title_of(graph[unknown]), INSTEAD.get(kind, ""))
    return faults.no("missing_node_type", one["message"], one["details"], **one["extra_info"])


def _node_errors(walk: Walk, failed: list[str]) -> dict[str, Any]:
    """ComfyUI's `node_errors`: what is wrong with each node that leads to an output which fails."""
    found: dict[str, Any] = {}
    for output in failed:
        seen, todo = {output}, [output]
        while todo:
            node = todo.pop()
            if walk.wrong.get(node):
                entry = {
                    "errors": walk.wrong[node],
                    "dependent_outputs": [],
                    "class_type": class_of(walk.graph.get(node)),
                }
                found.setdefault(node, entry)["dependent_outputs"].append(output)
            fresh = [one for one in walk.came.get(node, ()) if one not in seen]
            seen.update(fresh)
            todo += fresh
    return found


def _refuse(wrong: Mapping[str, Any]) -> Never:
    """No output can be drawn: say why."""
    if not wrong:
        told = "Nothing is drawn, for no output comes from a sampler"
        raise faults.no("prompt_outputs_failed_validation", told, "Kindling draws pictures; it is no tool for others.")
    alone = [entry["errors"][0] for entry in wrong.values()]
    missing = next((one for one in alone if one["type"] == "missing_node_type"), None)
    if missing:
        raise faults.no("missing_node_type", missing["message"], missing["details"], wrong, **missing["extra_info"])
    details = "\n".join(f"{one['message']}: {one['details']}" for one in alone)
    raise faults.no("prompt_outputs_failed_validation", "Prompt outputs failed validation", details, wrong)
