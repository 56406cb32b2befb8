"""One prompt that was accepted: what it asks for, how far it is, and what is kept of it in ComfyUI's shapes."""

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from handler.api.comfy.listeners import message
from handler.api.dialects.comfy.plan import Plan
from handler.core.deadline import Deadline
from handler.core.recipe import Picture

State = Literal["pending", "in_progress", "completed", "failed", "cancelled"]
LIVE: tuple[State, ...] = ("pending", "in_progress")
SECRET = ("api_key_comfy_org", "auth_token_comfy_org", "comfy_usage_source")  # of extra_data, which is kept and shown
ENTRY = ("prompt", "outputs", "status", "meta")  # of a record, what ComfyUI's history shows
Record = dict[str, Any]


class Gave(NamedTuple):
    """By output node, what a prompt gave, and the pictures that it only sent."""

    outputs: dict[str, Any]
    streamed: dict[str, Any]


@dataclass(slots=True, eq=False)
class Job:
    """A prompt. `key` is equal in prompts that ask for the same. It is drawn by `task`, unless it is `unwanted`.

    `targets` are the output nodes, `outputs` what each gave, `streamed` the pictures of those that only send them;
    `told` are the messages that its history keeps. `size` is how many bytes of JSON it came as.
    """

    id: str
    number: float
    graph: Mapping[str, Any]
    extra: Mapping[str, Any]
    plan: Plan
    key: str
    deadline: Deadline
    client: str = ""
    targets: list[str] = field(default_factory=list)
    state: State = "pending"
    created: int = field(default_factory=lambda: now_ms())
    started: int | None = None
    ended: int | None = None
    told: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    outputs: dict[str, Any] = field(default_factory=dict)
    streamed: dict[str, Any] = field(default_factory=dict)
    executed: list[str] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    over: asyncio.Event = field(default_factory=asyncio.Event)
    task: "asyncio.Task[None] | None" = None
    unwanted: bool = False
    size: int = 0

    @property
    def gave(self) -> Gave:
        """What an equal prompt would give again."""
        return Gave(self.outputs, self.streamed)

    def let_go(self) -> None:
        """Of what takes memory, once it has ended."""
        self.pictures.clear()
        self.plan = Plan(())

    @property
    def item(self) -> list[Any]:
        """As the queue and the history show a prompt."""
        return [self.number, self.id, self.graph, self.extra, self.targets]

    def note(self, kind: str, **data: Any) -> str:
        """Keep a message for the history; the message."""
        said = {"prompt_id": self.id, **data, "timestamp": now_ms()}
        self.told.append((kind, said))
        return message(kind, said)

    def record(self) -> Record:
        """What other workers, and later ones, find of it."""
        status = {
            "status_str": "success" if self.state == "completed" else "error",
            "completed": self.state == "completed",
            "messages": [list(each) for each in self.told],
        }
        return {
            "state": self.state,
            "client": self.client,
            "created": self.created,
            "started": self.started,
            "ended": self.ended,
            "until": self.created + round(self.deadline.left_s * 1000) if self.state in LIVE else None,
            "prompt": self.item,
            "outputs": self.outputs,
            "streamed": self.streamed,
            "status": status if self.told and self.state not in LIVE else None,
            "meta": {node: identity(node) for node in self.outputs},
        }


def identity(node: str) -> dict[str, Any]:
    """Which node an output is of: there are none in others here."""
    return {"node_id": node, "display_node": node, "parent_node": None, "real_node_id": node}


def public(extra: Any) -> dict[str, Any]:
    """A prompt's extra_data without what should not be kept."""
    return {name: value for name, value in extra.items() if name not in SECRET} if isinstance(extra, dict) else {}


def entry(record: Record) -> dict[str, Any] | None:
    """A record in the history's shape; None if it has no place there yet, or was taken from the queue."""
    return {name: record[name] for name in ENTRY} if record["status"] else None


def summary(record: Record, whole: bool = False) -> dict[str, Any]:
    """A record as /api/jobs lists it; if `whole`, as it shows that one."""
    number, prompt_id, graph, extra, _ = record["prompt"]
    images = [(node, image) for node, output in record["outputs"].items() for image in output["images"]]
    error = next(
        (data for kind, data in (record["status"] or {}).get("messages", ()) if kind == "execution_error"), None
    )
    found = {
        "id": prompt_id,
        "status": record["state"],
        "priority": number,
        "create_time": record["created"],
        "execution_start_time": record["started"],
        "execution_end_time": record["ended"],
        "outputs_count": len(images),
        "preview_output": {**images[0][1], "nodeId": images[0][0], "mediaType": "images"} if images else None,
        "execution_error": error,
    }
    more = {"outputs": record["outputs"], "workflow": {"prompt": graph, "extra_data": extra}}
    return found | more | {"execution_status": record["status"]} if whole else found


def now_ms() -> int:
    """Milliseconds since 1970."""
    return int(time.time() * 1000)
