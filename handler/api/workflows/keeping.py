"""Where kept workflows are: on the shelf that ComfyUI's prompts are on, or in a folder of the image.

    workflows/NAME.json            the one that the name means now
    versions/NAME/VERSION.json     those that it meant, the latest few, for a while

A version is a hash of the graph, so that two workers agree on it, and it is found out again whenever one is read: what
was edited by hand is another version. A record is written whole or not at all, and the name's comes last.
"""

import hashlib
import json
import logging
import re
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from handler.api.comfy.archive import DAY, Archive
from handler.api.comfy.shelf import prune
from handler.core.errors import GraphRefused, OutOfRange, Unsupported, WorkflowMissing
from handler.core.settings import Settings
from handler.core.untrusted import Malformed, parse, printed

NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
VERSION = re.compile(r"[0-9a-f]{12}")
MOST = 100  # workflows
LARGEST = 256 << 10  # bytes of a graph
FRESH_S = 5.0  # for which a file may change again without another time: an object store's has whole seconds
OLD, OLD_S = 6, 30 * DAY  # versions of one that are kept, the latest too, and for how long
SUFFIXES = (".json", ".png", ".webp", ".jpg", ".jpeg")  # of the image's folder
BROKEN = "Its record cannot be read: {why}. Send the workflow again, or delete it."
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Workflow:
    """A graph in API format under a name. `notes` are sentences for people, of its conversion.

    `fixed` is one of the image's folder. `fault` is why there is no graph.
    """

    name: str
    graph: Mapping[str, Any]
    notes: tuple[str, ...] = ()
    fixed: bool = False
    fault: str = ""

    @cached_property
    def data(self) -> bytes:
        """The record."""
        return json.dumps({"graph": self.graph, "notes": list(self.notes)}).encode()

    @cached_property
    def version(self) -> str:
        """By what is in the graph, its nodes' titles and order too; none where there is no graph."""
        told = json.dumps(self.graph, separators=(",", ":")).encode()
        return "" if self.fault else hashlib.sha256(told).hexdigest()[:12]


class Library:
    """Looks at the shelf and the folder. For threads, as many as there are."""

    def __init__(self, settings: Settings, archive: Archive) -> None:
        self._folder, self._archive = settings.workflows, archive
        self._read: dict[str, tuple[float, Workflow]] = {}  # of the shelf, with when they were written
        self._opened: dict[str, Workflow] = {}  # of the folder
        self._told = set[str]()
        self._writing = threading.Lock()

    def names(self) -> list[str]:
        """All, in alphabetical order."""
        found = (_stem(entry.name) for entry in self._archive.shelf.entries("workflows"))
        return sorted({*filter(NAME.fullmatch, found), *self._files()})

    def all(self) -> list[Workflow]:
        """The same with their graphs."""
        times = {_stem(entry.name): entry.time for entry in self._archive.shelf.entries("workflows")}
        found = [self._fixed(name, path) for name, path in self._files().items()]
        for name in {*self._read} - {*times}:  # forgotten, here or elsewhere
            self._read.pop(name, None)
        for name in sorted(name for name in times if NAME.fullmatch(name) and name not in self._files()):
            fresh, read = time.time() - times[name] < FRESH_S, self._read.get(name)
            if fresh or read is None or read[0] != times[name]:
                read = times[name], self._listed(name, times[name])
            found.append(read[1])
        return sorted(found, key=lambda one: one.name)

    def get(self, name: str, version: str = "") -> Workflow:
        """One, as it is now or was at `version`; WorkflowMissing if there is none."""
        path = self._files().get(name)
        found = self._fixed(name, path) if path else self._kept(name)
        if version and found.version != version:
            found = self._record(name, f"versions/{name}/{version}.json")
        if found.fault == MISSING or (version and found.version != version):
            at = f" at version {version}" if version else ""
            raise WorkflowMissing(
                f"There is no workflow '{name}'{at}. GET /workflows lists those there are.", "workflow"
            )
        return found

    def put(self, workflow: Workflow) -> bool:
        """Keep one under its name; whether there was none before. Raises why it cannot be."""
        if workflow.name in self._files():
            raise Unsupported(f"'{workflow.name}' comes with this worker's image; choose another name.", "workflow")
        if len(workflow.data) > LARGEST:
            raise OutOfRange(f"The graph has more than {LARGEST >> 10} kB; a larger one is not kept.", "workflow")
        shelf = self._archive.shelf
        with self._writing:
            names = self.names()
            if workflow.name not in names and len(names) >= MOST:
                raise OutOfRange(f"There are {MOST} workflows already; delete one that is not needed.", "workflow")
            shelf.put(f"versions/{workflow.name}/{workflow.version}.json", workflow.data)
            shelf.put(f"workflows/{workflow.name}.json", workflow.data)
            prune(shelf, f"versions/{workflow.name}", OLD, OLD_S)
        return workflow.name not in names

    def remove(self, name: str) -> None:
        """Forget one, with its versions; WorkflowMissing if there is none."""
        if name in self._files():
            raise Unsupported(f"'{name}' comes with this worker's image, and stays.", "workflow")
        shelf = self._archive.shelf
        with self._writing:
            there = shelf.has(f"workflows/{name}.json")
            shelf.remove(f"workflows/{name}.json")
            for entry in shelf.entries(f"versions/{name}"):
                shelf.remove(entry.name)
        if not there:
            raise WorkflowMissing(f"There is no workflow '{name}'. GET /workflows lists those there are.", "workflow")

    def _listed(self, name: str, written: float) -> Workflow:
        """One among others, which are there though its record cannot be read; another time it may."""
        self._read.pop(name, None)
        try:
            found = self._kept(name)
        except OSError as error:
            return Workflow(name, {}, fault=BROKEN.format(why=error.strerror or type(error).__name__))
        self._read[name] = written, found
        return found

    def _kept(self, name: str) -> Workflow:
        return self._record(name, f"workflows/{name}.json")

    def _record(self, name: str, place: str) -> Workflow:
        try:
            found = parse(data := self._archive.shelf.get(place)[: LARGEST + 1])
            if len(data) > LARGEST:
                raise Malformed("it is too large")
            if not isinstance(found, dict) or not isinstance(found.get("graph"), dict):
                raise Malformed("it has no graph")
        except FileNotFoundError:
            return Workflow(name, {}, fault=MISSING)
        except Malformed as error:
            return Workflow(name, {}, fault=BROKEN.format(why=printed(str(error))))
        notes = found.get("notes")
        told = [note for note in notes if isinstance(note, str)] if isinstance(notes, list) else []
        return Workflow(name, found["graph"], tuple(told))

    def _files(self) -> dict[str, Path]:
        """The image's, by name."""
        if not self._folder:
            return {}
        try:
            paths = sorted(path for path in self._folder.iterdir() if path.suffix.lower() in SUFFIXES)
        except OSError as error:
            log.warning("KINDLING_WORKFLOWS cannot be read: %s", error.strerror)
            return {}
        named = {path.stem.lower(): path for path in paths}
        for name in {name for name in named if not NAME.fullmatch(name)} - self._told:
            log.warning("%s in KINDLING_WORKFLOWS is not served: it has another name than %s", name, NAME.pattern)
            self._told.add(name)
        return {name: path for name, path in named.items() if NAME.fullmatch(name)}

    def _fixed(self, name: str, path: Path) -> Workflow:
        """One of those; none of them changes while a worker runs."""
        if name not in self._opened:
            self._opened[name] = _opened(name, path)
        return self._opened[name]


MISSING = "There is none."


def _opened(name: str, path: Path) -> Workflow:
    from handler.api.dialects.comfy.opening import opened  # late: most workers never see one

    try:
        found = opened(path.read_bytes())
    except (GraphRefused, OSError) as error:
        why = error.message if isinstance(error, GraphRefused) else error.strerror
        return Workflow(name, {}, fixed=True, fault=f"Its file cannot be read: {why}")
    return Workflow(name, found.graph, found.notes, fixed=True)


def _stem(name: str) -> str:
    return name.rpartition("/")[2].removesuffix(".json")
