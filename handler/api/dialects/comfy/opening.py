"""A file of ComfyUI's, whatever it is, as a graph in API format: an API or a UI workflow, or a picture that has one."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Literal

from handler.api.dialects.comfy import faults
from handler.api.dialects.comfy.checking import placeholder
from handler.api.dialects.comfy.pictured import is_picture, texts
from handler.api.dialects.comfy.placeholders import placeholders
from handler.api.dialects.comfy.ui.conversion import converted
from handler.api.dialects.comfy.ui.document import is_document
from handler.core.errors import GraphRefused
from handler.core.untrusted import Malformed, parse, printed

Origin = Literal["API format", "UI format", "the API format in a picture", "the UI format in a picture"]
LONGEST = 64 << 20  # bytes of a file
LONGEST_JSON = 16 << 20  # and of its JSON
LONGEST_NOTE = 600  # characters
MOST_UNFILLED = 20  # placeholders that are told of
WRAPPERS = ("prompt", "workflow", "output", "input", "extra_data", "extra_pnginfo")  # what payloads keep a graph in


@dataclass(frozen=True, slots=True)
class Opened:
    """`graph` in API format, as `/prompt` takes it; where it is from; the page's own workflow, if the file has it.

    `notes` are sentences for people: what the conversion left out, or had to guess.
    """

    graph: Mapping[str, Any]
    origin: Origin
    workflow: Mapping[str, Any] | None = None
    notes: tuple[str, ...] = ()


def opened(data: bytes, classes: Mapping[str, Any] | None = None) -> Opened:
    """Read a file. GraphRefused, with one line, if it has no graph.

    `classes` is what a ComfyUI's `/object_info` says, by which workflows in UI format are converted before our own
    table: it knows classes that are not in that.
    """
    if len(data) > LONGEST:
        raise refused(f"It is longer than {LONGEST >> 20} MB")
    found = (_of_picture if is_picture(data) else _of_json)(data, classes or {})
    notes = (*found.notes, *islice(_unfilled(found.graph), MOST_UNFILLED))
    return replace(found, notes=tuple(printed(one)[:LONGEST_NOTE] for one in notes))


def refused(why: str) -> GraphRefused:
    """A file that has none."""
    return faults.no("invalid_prompt", "The file has no graph", f"{printed(why)[:500]}.")


def _of_json(data: bytes, classes: Mapping[str, Any]) -> Opened:
    api, ui = _graphs(_parsed(data))
    if api is not None:
        return Opened(_nodes(api), "API format", ui)
    if ui is not None:
        done = converted(ui, classes)
        return Opened(done.graph, "UI format", ui, done.notes)
    raise refused("It is JSON, but no workflow")


def _of_picture(data: bytes, classes: Mapping[str, Any]) -> Opened:
    """The API format is what was drawn; the UI format is what a page shows of it."""
    found, notes = texts(data), []
    graphs: dict[str, Any] = {}
    for name, text in found.items():
        try:
            graphs[name] = _graphs(_parsed(text))
        except GraphRefused as error:
            notes.append(f"The picture's '{name}' cannot be read. {error.message}")
    api = next((api for api, _ in graphs.values() if api is not None), None)
    ui = next((ui for _, ui in graphs.values() if ui is not None), None)
    if api is not None:
        return Opened(_nodes(api), "the API format in a picture", ui, tuple(notes))
    if ui is not None:
        done = converted(ui, classes)
        return Opened(done.graph, "the UI format in a picture", ui, (*notes, *done.notes))
    raise refused(notes[0].rstrip(".") if notes else "The picture carries none; it may have been saved anew since")


def _parsed(data: bytes) -> Any:
    if len(data) > LONGEST_JSON:
        raise refused(f"Its JSON is longer than {LONGEST_JSON >> 20} MB")
    try:
        return parse(data, constant=lambda name: None)  # NaN, which ComfyUI writes and no JSON has
    except Malformed as error:
        raise refused(f"It is no JSON: {error}{placeholders(data)}") from None


def _graphs(found: Any, depth: int = 0) -> tuple[Mapping[str, Any] | None, Mapping[str, Any] | None]:
    """The API and the UI format in a JSON value, which may wrap them as requests and the page's export do."""
    if isinstance(found, list) and len(found) > 2:  # a prompt of the history
        found = found[2]
    if not isinstance(found, dict) or depth > 3:
        return None, None
    if is_document(found):
        return None, found
    if any(isinstance(one, dict) and "class_type" in one for one in found.values()):
        return found, None
    inner = [_graphs(found[name], depth + 1) for name in WRAPPERS if name in found]
    return next((api for api, _ in inner if api is not None), None), next((ui for _, ui in inner if ui), None)


def _nodes(api: Mapping[str, Any]) -> Mapping[str, Any]:
    """Without what some apps keep beside the nodes."""
    return {
        name: one for name, one in api.items() if isinstance(one, dict) and ("class_type" in one or "inputs" in one)
    }


def _unfilled(graph: Mapping[str, Any]) -> Iterator[str]:
    """Places of an app's template that nobody has filled in, though what is there may be drawn."""
    for node, body in graph.items():
        inputs = body.get("inputs")
        for name, value in inputs.items() if isinstance(inputs, dict) else ():
            if told := placeholder(value):
                yield f"Node {node}: {name}: {told}"
