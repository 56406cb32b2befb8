"""What is kept of jobs and their files, on a shelf that other workers may share, and waited for with patience.

    input/, output/, temp/    files, by ComfyUI's folders
    jobs/ID.json              a record of each prompt: what waits, and what has ended
    clients/HASH/ID           that a prompt's websocket is at another worker, if anywhere

Each folder is bounded by count, age and bytes; the oldest files go first.
"""

import asyncio
import hashlib
import json
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import UnionType
from typing import Any, TypeVar

from handler.api.comfy.bucket import shared
from handler.api.comfy.job import LIVE, Record, now_ms
from handler.api.comfy.naming import following, numbered
from handler.api.comfy.shelf import Passing, Shelf, named, prune
from handler.api.loras import looked
from handler.core.deadline import Deadline
from handler.core.errors import KindlingError
from handler.core.settings import Settings
from handler.core.untrusted import OURS, Malformed, parse

T = TypeVar("T")
FOLDERS = ("input", "output", "temp")
DAY = 86_400.0
BOUNDS = {  # files of a folder, seconds for which they stay, and bytes
    "input": (2_000, 30 * DAY, 8e9),
    "output": (5_000, 30 * DAY, 32e9),
    "temp": (1_000, DAY, 4e9),
    "jobs": (2_000, 30 * DAY, 2e9),
    "clients": (1_000, DAY, 1e6),
}
FIELDS: dict[str, type | UnionType] = {  # of a record; what another version wrote may be none
    "state": str,
    "client": str | None,
    "created": int,
    "started": int | None,
    "ended": int | None,
    "until": int | None,
    "prompt": list,
    "outputs": dict,
    "streamed": list | dict | int | None,
    "status": dict | None,
    "meta": dict,
}
TIDIED_S = 600.0  # between two times that it is looked whether a folder has too many
LOOK_S = 10.0  # for which a volume may hang
LISTED = 64 << 20  # bytes of records that are listed, the latest: each has its graph, maybe with images
MARKS, EACH = (b",", b":", b"[", b"{"), 48  # what makes objects of JSON, and about how many bytes each takes
GONE = "The worker that had this prompt is gone. Send it again."
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Kept:
    """A record, if it is one, as it was written at `time`, and about how many bytes it takes here."""

    time: float
    size: int
    record: Record | None


class Archive:
    """Keeps files and records on one shelf; where it is not given, it is chosen when it is asked for first."""

    def __init__(self, settings: Settings, shelf: Shelf | None = None) -> None:
        self._settings, self._shelf = settings, shelf
        self._choosing = threading.Lock()
        self._kept: dict[str, Kept] = {}  # so that none is read again for every page of the history
        self._tidied = 0.0

    @property
    def shelf(self) -> Shelf:
        """For a thread: it looks at the volume."""
        with self._choosing:
            self._shelf = self._shelf or _chosen(self._settings)
            return self._shelf

    async def at(self, act: Callable[[Shelf], T], deadline: Deadline | None = None) -> T:
        """What `act` gives, on a thread that may hang; DeadlineExceeded if it does."""
        return await looked(lambda: act(self.shelf), deadline or Deadline.within(LOOK_S))

    def save(self, folder: str, subfolder: str, start: str, data: bytes) -> dict[str, str]:
        """Keep a picture under the next number that nobody has; where it is, as ComfyUI tells it. For a thread."""
        where = named(folder, subfolder, numbered(start, 1)).rpartition("/")[0]
        number = following(start, (entry.name.rpartition("/")[2] for entry in self.shelf.entries(where)))
        while True:
            try:
                self.shelf.put(f"{where}/{numbered(start, number)}", data, anew=True)
                return {"filename": numbered(start, number), "subfolder": subfolder, "type": folder}
            except FileExistsError:
                number += 1

    def load(self, name: str, subfolder: str, folder: str) -> bytes:
        """A file; FileNotFoundError if there is none. For a thread."""
        return self.shelf.get(named(folder, subfolder, name))

    def held(self, loop: asyncio.AbstractEventLoop, deadline: Deadline, *where: str) -> bytes:
        """`load` for a thread that shall not hang, but has until `deadline`."""
        return asyncio.run_coroutine_threadsafe(self.at(lambda _: self.load(*where), deadline), loop).result()

    def has(self, name: str, subfolder: str, folder: str) -> bool:
        """Whether there is such a file. For a thread."""
        return self.shelf.has(named(folder, subfolder, name))

    def keep(self, prompt_id: str, record: Record) -> None:
        """Write a job's record. For a thread."""
        self.shelf.put(f"jobs/{prompt_id}.json", json.dumps(record).encode())

    def record(self, prompt_id: str) -> Record | None:
        """A job's record, if there is one. For a thread."""
        return self._read(prompt_id).record

    def records(self) -> dict[str, Record]:
        """The latest records by id, the oldest first. For a thread."""
        found, size = dict[str, Kept](), 0
        for entry in reversed(self.shelf.entries("jobs")):
            prompt_id = entry.name.rpartition("/")[2].removesuffix(".json")
            kept = self._kept.get(prompt_id)
            if not kept or kept.time != entry.time or not kept.record or kept.record["state"] in LIVE:
                kept = self._read(prompt_id, entry.time)
            size += kept.size
            if size > LISTED:
                break
            found[prompt_id] = kept
        self._kept = found
        records = {prompt_id: kept.record for prompt_id, kept in found.items() if kept.record}
        return dict(sorted(records.items(), key=lambda one: one[1]["created"]))

    def _read(self, prompt_id: str, time: float = 0.0) -> "Kept":
        try:
            found = parse(data := self.shelf.get(f"jobs/{prompt_id}.json"), marks=OURS)
        except (FileNotFoundError, Malformed):
            return Kept(time, 0, None)
        size = len(data) + EACH * sum(map(data.count, MARKS))
        if not isinstance(found, dict) or not all(isinstance(found.get(name, ...), FIELDS[name]) for name in FIELDS):
            return Kept(time, size, None)
        over = found["state"] in LIVE and now_ms() > found["until"]
        return Kept(time, size, _given_up(found) if over else found)

    def forget(self, *ids: str) -> None:
        """Remove records. For a thread."""
        for prompt_id in ids:
            self.shelf.remove(f"jobs/{prompt_id}.json")

    def tidy(self) -> None:
        """Remove what is too old or too much, now and then. For a thread."""
        if time.monotonic() - self._tidied < TIDIED_S and self._tidied:
            return
        self._tidied = time.monotonic()
        for folder, bounds in BOUNDS.items():
            prune(self.shelf, folder, *bounds)


def _chosen(settings: Settings) -> Shelf:
    """Where other workers see it, or one that goes with this worker, which is told once for all that is kept so."""
    found = shared(settings)
    if found is None:
        log.warning(
            "ComfyUI's prompts and pictures go with this worker: no volume can be written, and no store is set; "
            "so do jobs and pictures by URL"
        )
    return found or Passing()


async def tried(work: Any, otherwise: T, what: str) -> T:
    """Await `work`; where the volume fails or hangs, that is logged, and `otherwise` is given."""
    try:
        found: T = await work
        return found
    except (OSError, KindlingError) as error:
        log.warning("ComfyUI's %s: %s", what, getattr(error, "strerror", None) or getattr(error, "code", "it failed"))
        return otherwise


def _given_up(record: Record) -> Record:
    """A record of what nobody works at any more, for its time is over."""
    prompt_id = record["prompt"][1]
    said = {"prompt_id": prompt_id, "node_id": None, "node_type": None, "executed": [], "exception_message": GONE}
    said |= {"exception_type": "WorkerGone", "traceback": [], "current_inputs": {}, "current_outputs": []}
    message = ["execution_error", {**said, "timestamp": record["until"]}]
    status = {"status_str": "error", "completed": False, "messages": [message]}
    return record | {"state": "failed", "ended": record["until"], "status": status}


def mailbox(client: str) -> str:
    """Where it is left that a prompt is of this client, whose websocket may be at another worker."""
    return f"clients/{hashlib.sha256(client.encode()).hexdigest()[:32]}"
