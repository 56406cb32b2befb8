"""A file of ComfyUI's, whatever it is, as a graph in API format: an API or a UI workflow, or a picture that has one."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from handler.api.dialects.comfy import faults
from handler.core.untrusted import Malformed, parse

Origin = Literal["API format", "UI format", "the API format in a picture", "the UI format in a picture"]


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

    `classes` is what a ComfyUI's `/object_info` says: classes that are not in our table are converted by it.
    """
    try:
        found = parse(data)
    except Malformed as error:
        raise faults.no("invalid_prompt", "The file has no graph", f"{error}.") from None
    graph = found.get("prompt", found) if isinstance(found, dict) else found
    if not isinstance(graph, dict):
        raise faults.no("invalid_prompt", "The file has no graph", "It is JSON, but no object.")
    return Opened(graph, "API format")
