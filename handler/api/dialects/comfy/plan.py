"""What a graph asks for: `Plan`, a request for each output that pictures reach."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from handler.catalog.spec import ModelSpec
from handler.core.quoting import QUOTED
from handler.core.request import ImageRequest

Folder = Literal["output", "temp", "input"]
Pixels = Callable[[Any], Any]  # uint8 (height, width, 3) to the same, of any size
Load = Callable[[str, str, Folder], bytes]  # file name, subfolder, folder -> the file; FileNotFoundError
WAITING = b""  # for a picture that is yet to be drawn


@dataclass(frozen=True, slots=True)
class Served:
    """What this worker can draw with: its model, and the names of files by ComfyUI's folder, as `/models/FOLDER` says.

    The folders are checkpoints, diffusion_models, vae, text_encoders, loras, embeddings and input. `weights` and `vae`
    are the settings of these names: what is over the model's own files; `max_n` is that of how many a request may have.
    """

    spec: ModelSpec
    files: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    weights: tuple[str, ...] = ()
    vae: str = ""
    max_n: int = 4


@dataclass(frozen=True, slots=True)
class Before:
    """A picture that is drawn first: one, whose pixels, after what is done to them, are the image of the next request.

    That has `WAITING` in its place, which nothing takes for an image. `sampler` is the node that reports steps.
    """

    request: ImageRequest
    sampler: str
    after: tuple[Pixels, ...] = ()
    before: "Before | None" = None


@dataclass(frozen=True, slots=True)
class Output:
    """The pictures of one output node.

    `order` are the ids of the nodes that lead to it, in ComfyUI's order of execution, itself last; `sampler` is the one
    that reports steps. Outputs whose requests are equal are drawn once. `after` is done to the pixels of each picture.
    A `streamed` one is sent over the websocket alone, and kept in no folder. `before` is what has to be drawn first.
    """

    node: str
    folder: Folder
    prefix: str
    request: ImageRequest
    order: tuple[str, ...]
    sampler: str
    after: tuple[Pixels, ...] = ()
    streamed: bool = False
    before: Before | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """`outputs`; the ComfyUI errors of nodes that lead to other outputs, by id; notes for people."""

    outputs: tuple[Output, ...]
    node_errors: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def class_of(body: Any) -> str:
    """A node's class; empty of what is no node."""
    return body["class_type"] if isinstance(body, dict) else ""


def title_of(body: Any) -> str:
    """What a page calls a node."""
    meta = body.get("_meta") if isinstance(body, dict) else None
    title = meta.get("title") if isinstance(meta, dict) else None
    return (title if isinstance(title, str) else class_of(body))[:QUOTED]
