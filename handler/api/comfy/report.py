"""What `explain` says of a graph: frozen, and as JSON has it."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

Verdict = Literal["runs", "runs in part", "refused"]
# Of a node: it is read; it is at fault; it waits for one that is; no output needs it.
NodeState = Literal["read", "refused", "waits", "unused"]
# Of a file: the model has it; it is there; it has yet to be brought; nothing serves it.
FileState = Literal["the model's own", "here", "missing", "not offered"]


@dataclass(frozen=True, slots=True)
class NodeTold:
    """One node: what it means here, what is ignored or only near, and what cannot be, each in a sentence."""

    id: str
    kind: str
    title: str
    state: NodeState
    meaning: str
    notes: tuple[str, ...] = ()
    faults: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class FileTold:
    """One file that the graph names: by which nodes, in which of ComfyUI's folders; `served_by` says what serves it."""

    name: str
    folder: str
    nodes: tuple[str, ...]
    state: FileState
    served_by: str


@dataclass(frozen=True, slots=True)
class WorkerTold:
    """The worker that the graph is judged on: a row, and the settings that start it. `guess`: `because` is no proof."""

    id: str
    settings: tuple[str, ...]
    because: str
    guess: bool
    license: str
    commercial: bool
    obligation: str


@dataclass(frozen=True, slots=True)
class Pass:
    """One time that something is sampled: in words, and what the request says."""

    words: str
    request: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Pictures:
    """What one request, or a row of them, gives: which outputs get it, how many pictures, in how many passes.

    `changes` are made to the pixels of each picture after it is drawn.
    """

    outputs: tuple[str, ...]
    count: int
    passes: tuple[Pass, ...]
    changes: int = 0


@dataclass(frozen=True, slots=True)
class Memory:
    """GB on the device and of the host, whether that fits, the arithmetic, and what it rests on; what is slow of it."""

    device: str
    fits: bool
    device_gb: float
    host_gb: float
    arithmetic: str
    rests_on: str
    warning: str = ""


@dataclass(frozen=True, slots=True)
class Time:
    """Seconds for all pictures, and for the start of a worker; None where nobody has measured it. `rests_on` says how
    that is known. Dollars are for all pictures."""

    pictures_s: float | None
    start_s: float | None
    dollars: float | None
    rests_on: str


@dataclass(frozen=True, slots=True)
class Report:
    """All of it. `missing` is what has to be done before it can be drawn here; `why` the verdict, in sentences."""

    verdict: Verdict
    why: tuple[str, ...]
    missing: tuple[str, ...]
    origin: str
    model: WorkerTold
    nodes: tuple[NodeTold, ...]
    files: tuple[FileTold, ...]
    pictures: tuple[Pictures, ...]
    memory: Memory | None
    time: Time | None
    curl: tuple[str, ...]
    curl_notes: tuple[str, ...]
    notes: tuple[str, ...]

    def told(self) -> dict[str, Any]:
        """As JSON takes it; `ready` says whether it could be drawn now."""
        return {"ready": self.ready, **asdict(self)}

    @property
    def ready(self) -> bool:
        """Whether it could be drawn here and now."""
        return self.verdict != "refused" and not self.missing
