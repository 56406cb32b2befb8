"""A graph explained before anything is drawn: node by node, its files, what will be drawn, and what that takes.

It is judged on the worker that it asks for: on the one that serves here where that draws as much of it.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from handler.api.comfy import asking, foretelling
from handler.api.comfy.grounds import Ground, as_set, weighed
from handler.api.comfy.holding import fetching, files_told
from handler.api.comfy.passes import steps
from handler.api.comfy.report import FileTold, Memory, NodeState, NodeTold, Report, WorkerTold
from handler.api.comfy.wording import pictures
from handler.api.dialects.comfy.graph import outputs_of
from handler.api.dialects.comfy.judging import Judgement, sentence, wrong
from handler.api.dialects.comfy.meanings import meaning, shortened
from handler.api.dialects.comfy.opening import Opened
from handler.api.dialects.comfy.plan import Output, class_of, title_of
from handler.api.dialects.comfy.wanted import Named, Serving
from handler.core.errors import KindlingError
from handler.worker.outlook import Outlook

TITLE, SENTENCE = 60, 600  # characters of what is shown of others' words
FIRST = 5  # nodes at fault that the verdict names; all of them are listed
UNGUIDED = "with cfg 1 there is no guidance, so that the negative prompt changes nothing."
REFUSED = "It is refused, so that there is nothing to send."


def explain(opened: Opened, ground: Ground) -> Report:
    """All that can be said of it. GraphRefused, in one line, if it is no graph, or goes round in a circle."""
    return reported(opened, ground, *weighed(opened.graph, ground))


def reported(opened: Opened, ground: Ground, files: list[Named], found: Judgement) -> Report:
    """The report on what was found."""
    graph = opened.graph
    drawn = found.plan.outputs if found.plan else ()
    requests = list(dict.fromkeys((step.request, step.before) for output in drawn for step in steps(output)))
    told = files_told(files, found.worker, ground.holding, [request for request, _ in requests])
    seen = ground.machine.outlook(as_set(ground.settings, found.worker), found.worker.spec)
    memory = _memory(ground, seen)
    commands, remarks = _commands(graph, drawn, ground, [one for one in files if one.folder == "input"])
    return Report(
        verdict=found.verdict,
        why=tuple(_why(found)),
        missing=tuple(dict.fromkeys(_missing(ground, found, told, memory))),
        origin=opened.origin,
        model=_model(found.worker, places=not ground.running),
        nodes=tuple(_node(node, found) for node in _ordered(found)),
        files=told,
        pictures=tuple(pictures(drawn)),
        memory=memory,
        time=foretelling.time(ground.machine, seen, [request for request, _ in requests]) if drawn else None,
        curl=commands,
        curl_notes=remarks,
        notes=opened.notes,
    )


def _model(worker: Serving, places: bool) -> WorkerTold:
    spec, asks = worker.spec, worker.spec.license
    because = shortened(worker.because, SENTENCE)
    return WorkerTold(
        spec.id, worker.settings(places), because, worker.guess, asks.name, asks.commercial, asks.obligation
    )


def _ordered(found: Judgement) -> Iterator[str]:
    """A graph's nodes in ComfyUI's order of execution, and then those that no output needs."""
    graph = found.walk.graph
    yield from (node for node in found.walk.came if node in graph)
    yield from (node for node in graph if node not in found.walk.came)


def _node(node: str, found: Judgement) -> NodeTold:
    walk, body = found.walk, found.walk.graph[node]
    notes = tuple(shortened(said, SENTENCE) for about, said in walk.notes if about == node) + _unguided(body)
    faults = tuple(shortened(sentence(one), SENTENCE) for one in walk.wrong.get(node, ()))
    kind, title = (shortened(text, TITLE) for text in (class_of(body), title_of(body)))
    return NodeTold(shortened(node, TITLE), kind, title, _state(node, found), meaning(body), notes, faults)


def _unguided(body: Mapping[str, Any]) -> tuple[str, ...]:
    """What cfg 1 leaves without a meaning."""
    inputs = body.get("inputs")
    given = inputs if isinstance(inputs, dict) else {}
    return (UNGUIDED,) if given.get("cfg") == 1 and "negative" in given else ()


def _state(node: str, found: Judgement) -> NodeState:
    walk = found.walk
    if walk.wrong.get(node):
        return "refused"
    if node in walk.values:
        return "read"
    return "waits" if node in walk.came else "unused"


def _why(found: Judgement) -> Iterator[str]:
    """What the verdict rests on: the sentence of the whole graph, or those of its nodes."""
    if found.refusal:
        yield shortened(found.refusal, SENTENCE)
    if found.plan and (left := [node for node in outputs_of(found.walk.graph) if node not in found.walk.values]):
        yield f"No picture for node{'s' * (len(left) > 1)} {shortened(', '.join(left), SENTENCE)}:"
    faults = {node: each[0] for node, each in wrong(found.walk).items()}
    for node, fault in list(faults.items())[:FIRST]:
        kind = class_of(found.walk.graph.get(node))
        yield f"Node {shortened(node, TITLE)} ({shortened(kind, TITLE)}): {shortened(sentence(fault), SENTENCE)}"
    if len(faults) > FIRST:
        yield f"And {len(faults) - FIRST} more nodes; all are listed."


def _missing(ground: Ground, found: Judgement, files: tuple[FileTold, ...], memory: Memory | None) -> Iterator[str]:
    """What has to be done before it can be drawn here."""
    worker = found.worker
    if ground.fixed and (worker.spec, worker.weights) != (ground.spec, ground.settings.weights):
        now, then = (" ".join(one.settings(not ground.running)) for one in (ground.served, worker))
        yield f"start a worker with {then}, not {now}"
    if not ground.running and not ground.holding.fetched(worker.spec):
        yield fetching(worker.spec)
    yield from (one.served_by for one in files if one.state == "missing")
    if memory and not memory.fits:
        yield f"take a larger machine: {memory.arithmetic}"


def _memory(ground: Ground, seen: Outlook) -> Memory | None:
    """None where the model's files do not say how large they are."""
    try:
        return foretelling.memory(ground.machine, seen)
    except KindlingError:
        return None


def _commands(
    graph: Mapping[str, Any], drawn: tuple[Output, ...], ground: Ground, images: list[Named]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What sends it, and why one of these is not there."""
    if not drawn:
        return (), (REFUSED,)
    keyed = bool(ground.settings.api_keys)
    uploads = [asking.upload(name, ground.url, keyed) for name in dict.fromkeys(one.name for one in images)]
    request, why_not = asking.native(drawn)
    prompt = asking.prompt(graph, ground.url, keyed)
    native = asking.generate(request, ground.url, keyed) if request else ""
    long = f"The graph is too long for a command; send it to {ground.url}/prompt as the field 'prompt'."
    remarks = [
        *([] if prompt else [long]),
        *([f"No request to /generate draws the same: {why_not}"] if why_not else []),
    ]
    return tuple(one for one in (*uploads, prompt, native) if one), tuple(remarks)
