"""Kept workflows at one worker: listed, kept, forgotten, and what a request to one of them asks for."""

import asyncio
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

from handler.api.comfy.archive import Archive
from handler.api.comfy.served import Catalogue
from handler.api.decoding import perhaps
from handler.api.dialects.comfy.plan import Load, Served, title_of
from handler.api.fetching import FIELDS
from handler.api.loras import LISTING_S
from handler.api.workflows.calling import Call
from handler.api.workflows.fields import FieldValues, asked
from handler.api.workflows.keeping import MOST, NAME, VERSION, Library, Workflow
from handler.api.workflows.mapping import MODEL, mapped
from handler.catalog.spec import ModelSpec
from handler.core.deadline import Deadline
from handler.core.errors import DeadlineExceeded, InvalidValue, MissingParameter, NotReady
from handler.core.settings import Settings

if TYPE_CHECKING:
    from handler.api.workflows.reading import Described

T = TypeVar("T")
ROUTE = "/workflows"
START = f"{ROUTE}/"
GRAPH = "workflow"  # the field of one that is drawn without being kept
log = logging.getLogger(__name__)


class Workflows:
    """All that one worker does with kept workflows. `archive` and `catalogue` are also those of its ComfyUI routes."""

    def __init__(self, settings: Settings, spec: ModelSpec) -> None:
        self.archive = Archive(settings)
        self.catalogue = Catalogue(settings, spec, self.archive)
        self._settings = settings
        self._library = Library(settings, self.archive)
        self._described: dict[tuple[str, str], tuple[Mapping[str, Any], Described]] = {}

    async def names(self, deadline: Deadline) -> list[str]:
        """Those that requests may name as their model; none, which is told, if the volume does not answer in time."""
        deadline.no_later(LISTING_S)
        try:
            return [f"{MODEL}{name}" for name in await self._at(self._library.names, deadline)]
        except (DeadlineExceeded, NotReady):
            log.warning("the list of models is without workflows: the volume does not answer")
            return []

    async def listed(self, deadline: Deadline) -> list[dict[str, Any]]:
        """All, as clients see them."""
        return await self._at(self.all, deadline)

    def all(self) -> list[dict[str, Any]]:
        """The same for a thread."""
        found = self._library.all()
        served = self.catalogue.served() if found else None
        return [self._told(one, served) for one in found if served]

    async def one(self, name: str, deadline: Deadline) -> dict[str, Any]:
        """One, as it is or was at a version, with its graph; raises WorkflowMissing."""

        def look() -> dict[str, Any]:
            found = self._library.get(*split(name))
            return self._told(found, self.catalogue.served()) | {"graph": found.graph}

        return await self._at(look, deadline)

    async def put(self, name: str, data: bytes, deadline: Deadline) -> tuple[dict[str, Any], bool]:
        """Keep a file of ComfyUI's under a name; as clients see it, and whether the name is new. Raises why not."""
        return await self._at(partial(self.keep, name, data), deadline)

    def keep(self, name: str, data: bytes) -> tuple[dict[str, Any], bool]:
        """The same for a thread."""
        from handler.api.workflows.reading import sent  # late: most workers never see a graph

        if not NAME.fullmatch(name):
            raise InvalidValue(MISNAMED.format(name=name), "workflow")
        workflow = sent(name, data)
        fresh = self._library.put(workflow)
        return self._told(workflow, self.catalogue.served()) | {"shared": self.archive.shelf.shared}, fresh

    async def remove(self, name: str, deadline: Deadline) -> None:
        """Forget one; raises WorkflowMissing."""
        await self._at(partial(self.forget, name), deadline)

    def forget(self, name: str) -> None:
        """The same for a thread."""
        bare, version = split(name)
        if version:
            raise InvalidValue(f"Versions go by themselves; delete '{bare}' to forget all of them.", "workflow")
        self._library.remove(bare)

    async def images(self, path: str, payload: Mapping[str, Any], deadline: Deadline) -> tuple[str, ...]:
        """The fields in which a request may have a URL of an image, of the workflow that it asks, if it does."""
        if not (workflow := await self._asked(path, payload, deadline)):
            return FIELDS

        def look() -> tuple[str, ...]:
            found = self._describe(workflow, self.catalogue.served()).fields
            return tuple(one.name for one in found if one.kind == "image")

        found = await self._at(look, deadline)
        return found if f"{path}/".startswith(START) else (*FIELDS, *found)

    async def called(
        self, path: str, dialect: ModuleType, payload: Mapping[str, Any], deadline: Deadline
    ) -> Call | None:
        """What a request asks a workflow for, by its path, its model or its graph; None if it is none to a workflow."""
        if not (workflow := await self._asked(path, payload, deadline)):
            return None
        served = await self._at(self.catalogue.served, deadline)
        load = partial(self.archive.held, asyncio.get_running_loop(), deadline)
        fields = {name: value for name, value in payload.items() if path != ROUTE or name != GRAPH}
        read = partial(asked if f"{path}/".startswith(START) else partial(mapped, dialect), payload=fields)
        call = partial(self._call, workflow, dialect, read, served, load)
        return await perhaps(call, deadline)

    async def _asked(self, path: str, payload: Mapping[str, Any], deadline: Deadline) -> Workflow | None:
        """The workflow that a request asks, or brings; None if it is none to a workflow."""
        if path == ROUTE:
            return await deadline.hold(asyncio.to_thread(brought, payload))
        named = asked_for(path, payload)
        return await self._at(partial(self._library.get, *named), deadline) if named else None

    def draft(self, graph: Mapping[str, Any], served: Served) -> dict[str, Any]:
        """The fields that `graph` would have, with its own values. For a thread."""
        found = self._describe(Workflow("", graph), served)
        values = {one.name: one.of(graph) for one in found.fields if one.kind != "image"}
        required = found.required(served.files.get("input", ()))
        return {"fields": {one.name: one.schema for one in found.fields}, "values": values, "required": required}

    def _call(
        self, workflow: Workflow, dialect: ModuleType, read: Callable[..., FieldValues], served: Served, load: Load
    ) -> Call:
        """On another thread, for images take time."""
        from handler.api.workflows.reading import wanted

        found, made = wanted(workflow, read, served, self._settings, load)
        call = Call(workflow, dialect, found, made.graph, made.outputs, made.notes, made.seed)
        if found.transport.partial_images and call.several:
            if found.values.get("n", 1) > 1:
                raise InvalidValue("partial_images are of one picture; this draws several.", "partial_images")
            alone = found.transport.model_copy(update={"partial_images": 0})  # whoever asks need not know the graph
            return replace(call, asked=replace(found, transport=alone))
        return call

    def _told(self, workflow: Workflow, served: Served) -> dict[str, Any]:
        """As clients see it. For a thread."""
        found = self._describe(workflow, served)
        outputs = [{"node": node, "title": title_of(workflow.graph[node])} for node in found.outputs]
        return {
            "name": workflow.name,
            "version": workflow.version,
            "drawable": not found.why,
            "why": found.why or None,
            "fields": {one.name: one.schema for one in found.fields},
            "required": found.required(served.files.get("input", ())),
            "outputs": outputs,
            "notes": list(found.notes),
            "fixed": workflow.fixed,
        }

    def _describe(self, workflow: Workflow, served: Served) -> "Described":
        """What it is here: of a kept one, found out anew where the worker's files are others."""
        from handler.api.workflows.reading import described

        if not workflow.name:
            return described(workflow, served, self._settings)
        files = {folder: names for folder, names in served.files.items() if folder != "input"}
        when, known = self._described.get((workflow.name, workflow.version), (None, None))
        if known is None or when != files:
            known = described(workflow, served, self._settings)
            self._described[workflow.name, workflow.version] = files, known
            while len(self._described) > 2 * MOST:
                self._described.pop(next(iter(self._described)))
        return known

    async def _at(self, act: Callable[[], T], deadline: Deadline) -> T:
        """What `act` gives on another thread, by `deadline`; of a volume that fails, NotReady."""
        try:
            return await self.archive.at(lambda _: act(), deadline)
        except OSError as error:
            raise NotReady(f"The place of workflows fails: {error.strerror}; try again.") from None


MISNAMED = "'{name:.80}' is no name for a workflow: 1 to 64 small letters, digits, - and _, a letter or digit first."


def brought(payload: Mapping[str, Any]) -> Workflow:
    """The workflow that a request brings with it. For a thread."""
    from handler.api.workflows.reading import sent  # late: most workers never see a graph

    if (graph := payload.get(GRAPH)) is None:
        raise MissingParameter(f"Missing required parameter: '{GRAPH}', a ComfyUI workflow.", GRAPH)
    return sent("", json.dumps(graph).encode())


def asked_for(path: str, payload: Mapping[str, Any]) -> tuple[str, str] | None:
    """The name and the version of the workflow that a request asks, by its path or by its model, if it does."""
    if path.startswith(START):
        return split(path.removeprefix(START))
    model = payload.get("model")
    return split(model.removeprefix(MODEL)) if isinstance(model, str) and model.startswith(MODEL) else None


def split(text: str) -> tuple[str, str]:
    """NAME or NAME@VERSION; InvalidValue if it is neither."""
    name, at, version = text.partition("@")
    if not NAME.fullmatch(name):
        raise InvalidValue(MISNAMED.format(name=name), "workflow")
    if at and not VERSION.fullmatch(version):
        raise InvalidValue(f"'{version:.80}' is no version: GET /workflows has each one's, 12 digits.", "workflow")
    return name, version
