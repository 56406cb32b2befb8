"""How one prompt is drawn, and what is told of it meanwhile: the same, in the same order, as ComfyUI does."""

import asyncio
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from handler.api import codec
from handler.api.comfy.archive import Archive
from handler.api.comfy.inscription import finished, texts
from handler.api.comfy.job import LIVE, Gave, Job, now_ms
from handler.api.comfy.listeners import Listeners, message, picture
from handler.api.comfy.naming import filled
from handler.api.comfy.passes import Passes, Step
from handler.api.comfy.shelf import Shelf
from handler.api.dialects.comfy.plan import Output
from handler.api.dispatch import Api
from handler.core.recipe import Picture, Preview
from handler.core.request import ImageRequest

PREVIEW_S = 0.2  # between two previews
PREVIEW_QUALITY = 80
PREFIX = "streamed/ComfyUI"  # of those, which are kept for a while: their client may listen at another worker


class Drawing:
    """Draws one job. All but the callbacks of the engine run on the event loop."""

    def __init__(self, job: Job, api: Api, archive: Archive, listeners: Listeners) -> None:
        self._job, self._api, self._archive, self._listeners = job, api, archive, listeners
        self._metadata = api.engine.settings.metadata
        self._loop = asyncio.get_running_loop()
        self._shown = 0.0
        self._begun_nodes = set[str]()
        self.node: str | None = None  # the one that is told to be executing

    async def run(self) -> None:
        """Draw what the outputs ask for, each distinct request once. Raises what drawing raises."""
        passes = Passes(self._job.deadline)
        for output in self._job.plan.outputs:
            await self._finish(output, await passes.drawn(output, partial(self._draw, output)))

    async def _draw(self, output: Output, what: Step, request: ImageRequest) -> list[Picture]:
        """The pictures of one request on the way to `output`."""
        begun = partial(self._soon, self._begun, output, what.sampler)
        step = partial(self._stepped, what.sampler)
        pictures = await self._api.draw(request, step, self._job.deadline, on_begin=begun, admitted=True)
        self._job.pictures += pictures
        return pictures

    def begin(self, cached: tuple[str, ...] = ()) -> None:
        """The job is no longer waiting; `cached` are the nodes that need not be executed."""
        job = self._job
        if job.started is None:
            job.state, job.started = "in_progress", now_ms()
            self._tell(job.note("execution_start"))
            self._tell(job.note("execution_cached", nodes=list(cached)))

    async def repeat(self, equal: Gave) -> bool:
        """Report what an equal prompt gave before; False if that is there no more."""
        images = [image for one in (*_images(equal.outputs), *equal.streamed.values()) for image in one]
        if not all(await self._archive.at(lambda _: [self._archive.has(*place(image)) for image in images])):
            return False
        self.begin(tuple(dict.fromkeys(node for output in self._job.plan.outputs for node in output.order)))
        for node, output in equal.outputs.items():
            self._executed(node, output)
        self._job.streamed = equal.streamed
        for node, streamed in equal.streamed.items():
            self._execute(node)
            for image in streamed:
                await self._stream(image)
        return True

    def where(self) -> dict[str, Any]:
        """At which node this is, for what is told of an end that is none."""
        node = self.node or self._job.plan.outputs[0].node
        return {"node_id": node, "node_type": self._job.graph[node]["class_type"], "executed": self._job.executed[:-1]}

    def _soon(self, tell: Callable[..., None], *about: Any) -> None:
        """From the engine's thread: unless it has ended meanwhile, for then all is told."""
        self._loop.call_soon_threadsafe(lambda: tell(*about) if self._job.state in LIVE else None)

    def _begun(self, output: Output, sampler: str) -> None:
        self.begin()
        for node in output.order[: output.order.index(sampler) + 1] if sampler in output.order else ():
            self._execute(node)

    def _execute(self, node: str) -> None:
        """Tell that a node is being executed, once."""
        job = self._job
        if node in self._begun_nodes:
            return
        self._begun_nodes.add(node)
        job.executed.append(node)
        self.node = node
        self._tell(message("executing", {"node": node, "display_node": node, "prompt_id": job.id}))

    def _whose(self, node: str) -> dict[str, Any]:
        names = {"node_id": node, "display_node_id": node, "parent_node_id": None, "real_node_id": node}
        return {"prompt_id": self._job.id, **names}

    def _stepped(self, sampler: str, done: int, of: int, preview: Preview) -> None:
        """On the engine's thread: a step has ended."""
        data, now = b"", time.monotonic()
        if done < of and now - self._shown >= PREVIEW_S and self._listeners.keen(self._job.client):
            data, self._shown = codec.encode(preview(), "jpeg", PREVIEW_QUALITY, None), now
        self._soon(self._step, sampler, done, of, data)

    def _step(self, sampler: str, done: int, of: int, preview: bytes) -> None:
        preview = preview if self._listeners.keen(self._job.client) else b""  # before it has this to take
        data = {"value": done, "max": of, "prompt_id": self._job.id, "node": sampler}
        self._tell(message("progress", data))
        one = {"value": done, "max": of, "state": "running" if done < of else "finished", **self._whose(sampler)}
        self._tell(message("progress_state", {"prompt_id": self._job.id, "nodes": {sampler: one}}))
        if preview:
            self._listeners.show(self._job.client, preview, self._whose(sampler))

    async def _finish(self, output: Output, pictures: list[Picture]) -> None:
        """Keep or stream the pictures of one output."""
        job = self._job
        for node in output.order:
            self._execute(node)
        images = []
        for number, one in enumerate(pictures):
            images.append(await self._archive.at(partial(self._keep, output, one, number), job.deadline))
            if output.streamed:
                await self._stream(images[-1])
        if output.streamed:
            job.streamed[output.node] = images
        else:
            self._executed(output.node, {"images": images})

    def _keep(self, output: Output, one: Picture, number: int, shelf: Shelf) -> dict[str, str]:
        """On another thread; where it is kept."""
        job = self._job
        data = finished(one.data, output.after, texts(job.graph, job.extra) if self._metadata else {})
        where = filled(PREFIX if output.streamed else output.prefix, job.graph, codec.size_of(data), number)
        return self._archive.save(output.folder, *where, data)

    async def _stream(self, image: dict[str, str]) -> None:
        """Send one that is kept to who listens."""
        if self._job.client in self._listeners:
            data = await self._archive.at(lambda _: self._archive.load(*place(image)))
            self._listeners.tell(self._job.client, picture(data, "png"))

    def _executed(self, node: str, output: dict[str, Any]) -> None:
        job = self._job
        job.outputs[node] = output
        data = {"node": node, "display_node": node, "output": output, "prompt_id": job.id}
        self._tell(message("executed", data))

    def _tell(self, said: str) -> None:
        if self._job.client:
            self._listeners.tell(self._job.client, said)


def _images(outputs: Mapping[str, Any]) -> list[list[dict[str, str]]]:
    return [output["images"] for output in outputs.values()]


def place(image: Mapping[str, str]) -> tuple[str, str, str]:
    """File name, subfolder and folder of a picture, as it is told."""
    return image["filename"], image["subfolder"], image["type"]
