"""ComfyUI's prompts at one worker: accepted, drawn in the order of the engine's queue, told of, and kept."""

import asyncio
import hashlib
import json
import secrets
import threading
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from handler.api.comfy.accepting import id_of, in_api_format
from handler.api.comfy.archive import Archive, mailbox, tried
from handler.api.comfy.drawing import Drawing
from handler.api.comfy.job import Gave, Job, now_ms, public
from handler.api.comfy.listeners import Listeners, message
from handler.api.comfy.passes import steps
from handler.api.comfy.planning import planned
from handler.api.comfy.refusals import refused, told, understood
from handler.api.comfy.served import Catalogue
from handler.api.comfy.shelf import Shelf
from handler.api.decoding import perhaps
from handler.api.dialects.comfy.plan import Folder, Load, Plan, Served
from handler.api.dispatch import Api
from handler.core.deadline import Deadline
from handler.core.errors import Cancelled, KindlingError, QueueFull
from handler.engine.queue import crowded

REPEATABLE = 64  # prompts whose outputs are reported again when they come again
HELD = 32 << 20  # bytes, as JSON, of ended prompts at hand
OnEnd = Callable[[Job, KindlingError | None], object]


class Comfy:
    """All of ComfyUI's that one worker does, with its files on `shelf`, or where `Archive` chooses. For one event loop.

    `active` are the prompts that wait or are drawn, by id.
    """

    def __init__(self, api: Api, shelf: Shelf | None = None) -> None:
        kept, settings = api.workflows, api.engine.settings
        self.api, self.listeners = api, Listeners()
        self.archive = Archive(settings, shelf) if shelf else kept.archive
        self._catalogue = Catalogue(settings, api.engine.spec, self.archive) if shelf else kept.catalogue
        self.active: dict[str, Job] = {}
        self._done: OrderedDict[str, Job] = OrderedDict()
        self._equal: OrderedDict[str, Gave] = OrderedDict()
        self._number, self._tasks = 0, set[asyncio.Task[None]]()
        # For what it has to say, at the start and not with the first prompt.
        threading.Thread(target=lambda: self.archive.shelf, name="comfy", daemon=True).start()

    @property
    def busy(self) -> bool:
        """Whether a prompt was accepted and has not ended."""
        return bool(self.active)

    def hurry(self) -> None:
        """Let all prompts end with what is there."""
        for job in self.active.values():
            job.deadline.hurry()

    def remaining(self) -> dict[str, Any]:
        """How many prompts have not ended."""
        return {"exec_info": {"queue_remaining": len(self.active)}}

    async def post(self, payload: Any, deadline: Deadline, on_end: OnEnd = lambda job, error: None) -> dict[str, Any]:
        """Accept a prompt that shall have ended by `deadline`; ComfyUI's answer. Raises what refuses it.

        `on_end` gets it when it has, with what it failed of.
        """
        payload, notes = await in_api_format(payload, deadline)
        graph, prompt_id = payload["prompt"], id_of(payload)
        if known := self._known(prompt_id, graph):
            return _accepted(known)
        served = await self.served(deadline)
        load = partial(self.archive.held, asyncio.get_running_loop(), deadline)
        plan, key, size = await perhaps(partial(self._read, payload, served, load), deadline)
        if known := self._known(prompt_id, graph):  # it came twice at once
            return _accepted(known)
        self._require_room(deadline)
        plan = replace(plan, notes=(*notes, *plan.notes))
        extra, client = public(payload.get("extra_data")), payload.get("client_id")
        client = client or extra.get("client_id")
        job = Job(prompt_id, self._numbered(payload), graph, extra, plan, key, deadline, size=size)
        job.targets = [output.node for output in plan.outputs]
        if isinstance(client, str) and client:
            job.client, job.extra = client, extra | {"client_id": client}
        self.active[prompt_id] = job
        self._tell_status()
        try:
            await self._keep(job)
        finally:  # though who asked is gone meanwhile: nobody may wait for one that is never drawn
            self.begin(self._run(job, on_end))
        return _accepted(job)

    def begin(self, work: Coroutine[Any, Any, None]) -> None:
        """Do it while nobody waits for it."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def tidy(self) -> None:
        """Remove what is too old or too much."""
        await tried(self.archive.at(lambda _: self.archive.tidy()), None, "old files could not be removed")

    def find(self, prompt_id: str) -> Job | None:
        """A prompt that this worker has, or had not long ago."""
        return self.active.get(prompt_id) or self._done.get(prompt_id)

    def jobs(self) -> list[Job]:
        """All of those."""
        return [*self._done.values(), *self.active.values()]

    def forget(self, *ids: str) -> None:
        """Of prompts that have ended."""
        for prompt_id in ids:
            self._done.pop(prompt_id, None)

    async def served(self, deadline: Deadline) -> Served:
        """What prompts may name."""
        return await self.archive.at(lambda _: self._catalogue.served(), deadline)

    def cancel(self, job: Job) -> None:
        """Stop a prompt, be it waiting or drawn."""
        job.unwanted = True
        if job.task:
            job.task.cancel()

    def _read(self, payload: Mapping[str, Any], served: Served, load: Load) -> tuple[Plan, str, int]:
        """What it asks for, what it is equal to, and how many bytes of JSON it is. On another thread."""
        files = dict[tuple[str, ...], bytes]()

        def seen(name: str, subfolder: str, folder: Folder) -> bytes:
            data = load(name, subfolder, folder)
            files[name, subfolder, folder] = hashlib.sha256(data).digest()
            return data

        plan = planned(payload, served, seen, self.api.engine.spec, self.api.engine.settings.step_cache)
        return (
            plan,
            _key(payload["prompt"], plan, files),
            len(json.dumps([payload["prompt"], payload.get("extra_data")])),
        )

    def _known(self, prompt_id: str, graph: Mapping[str, Any]) -> Job | None:
        """The same prompt, if it waits already."""
        known = self.active.get(prompt_id)
        if known and known.graph != graph:
            raise refused("invalid_prompt_id", "This prompt_id is taken", "Another prompt with this id is waiting.")
        return known

    def _require_room(self, deadline: Deadline) -> None:
        self.api.require_open(deadline)
        waiting = sum(job.state == "pending" for job in self.active.values())
        if waiting >= self.api.engine.settings.queue:
            raise QueueFull(crowded(waiting))

    def _numbered(self, payload: Mapping[str, Any]) -> float:
        """Where in the queue ComfyUI would put it; here it only comes back."""
        self._number += 1
        given = payload.get("number")
        if isinstance(given, int | float):
            return given
        return -self._number if payload.get("front") else self._number

    async def _run(self, job: Job, on_end: OnEnd) -> None:
        """Draw a prompt, and tell and keep how that went. Never raises."""
        error: KindlingError | None = None
        drawing, job.task = Drawing(job, self.api, self.archive, self.listeners), asyncio.current_task()
        try:
            if job.unwanted:
                raise asyncio.CancelledError
            await self._draw(job, drawing)
            job.state = "completed"
            said = job.note("execution_success")
        except asyncio.CancelledError:
            error = Cancelled("The prompt was interrupted.")
            job.state = "cancelled"
            said = job.note("execution_interrupted", **drawing.where()) if job.started else ""
        except Exception as failed:
            error = understood(failed)
            drawing.begin()
            job.state = "failed"
            said = job.note("execution_error", **drawing.where(), **told(error))
        await self._end(job, said)
        on_end(job, error)
        job.let_go()
        await self.tidy()

    async def _draw(self, job: Job, drawing: Drawing) -> None:
        """As an equal prompt before it, if its files are still there."""
        for other in [*self.active.values()]:
            if other is job:
                break
            if other.key == job.key:
                await job.deadline.hold(other.over.wait())
        if (equal := self._equal.get(job.key)) and await drawing.repeat(equal):
            return
        await drawing.run()
        self._equal[job.key] = job.gave
        while len(self._equal) > REPEATABLE:
            self._equal.popitem(last=False)

    async def _end(self, job: Job, said: str) -> None:
        """Who is told that a prompt has ended finds it in the history, here and elsewhere."""
        job.ended, job.task = now_ms(), None
        await self._keep(job)
        del self.active[job.id]
        self._done[job.id] = job
        while len(self._done) > REPEATABLE or sum(done.size for done in self._done.values()) > HELD:
            self._done.popitem(last=False)  # the archive has it, where there is room
        if job.client and said:
            self.listeners.tell(job.client, said)
        self._tell_status()
        if job.client:
            self.listeners.tell(job.client, message("executing", {"node": None, "prompt_id": job.id}))
        job.over.set()

    async def _keep(self, job: Job) -> None:
        """Its record, for other workers, and a sign for the one where its websocket may be."""
        record = job.record()

        def keep(_: object) -> None:
            if job.client and job.client not in self.listeners:  # also one that has left, maybe for another worker
                self.archive.shelf.put(f"{mailbox(job.client)}/{job.id}", b"")
            self.archive.keep(job.id, record)

        await tried(self.archive.at(keep), None, "job could not be kept where other workers see it")

    def _tell_status(self) -> None:
        self.listeners.tell(None, message("status", {"status": self.remaining()}))


def _accepted(job: Job) -> dict[str, Any]:
    notes = {"notes": list(job.plan.notes)} if job.plan.notes else {}
    return {"prompt_id": job.id, "number": job.number, "node_errors": dict(job.plan.node_errors)} | notes


def _key(graph: Mapping[str, Any], plan: Plan, files: Mapping[tuple[str, ...], bytes]) -> str:
    """What is equal in prompts that give the same pictures; of what is drawn at random, no two are.

    `files` are the hashes of those that it read, which may be others under the same names by now.
    """
    seeds = [step.request.seed for output in plan.outputs for step in steps(output)]
    if None in seeds:
        return secrets.token_hex(16)
    nodes = {name: [node["class_type"], node.get("inputs")] for name, node in graph.items()}
    said = [nodes, [output.node for output in plan.outputs], seeds]  # of a seed below 0 the one that was drawn
    found = hashlib.sha256(json.dumps(said, sort_keys=True).encode())
    for where in sorted(files):
        found.update(repr(where).encode() + files[where])
    return found.hexdigest()
