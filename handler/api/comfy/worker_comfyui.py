"""worker-comfyui's contract, which its many clients on RunPod know: a workflow with its images in, its pictures out.

    {"workflow": GRAPH, "images": [{"name": "cat.png", "image": BASE64}]}
    {"images": [{"filename": "ComfyUI_00001_.png", "type": "base64" or "s3_url", "data": ...}]}

An error is a sentence, with `details`; what went wrong beside pictures is in `errors`. As version 5 has it:
github.com/runpod-workers/worker-comfyui. Each job has a ComfyUI of its own, whose files are in memory.
"""

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from handler.api import codec
from handler.api.again import LEAN
from handler.api.comfy.drawing import place
from handler.api.comfy.job import Job
from handler.api.comfy.listeners import Listener, Message
from handler.api.comfy.memory import Memory
from handler.api.comfy.planning import FAILED
from handler.api.comfy.service import Comfy
from handler.api.comfy.shelf import named
from handler.api.dialects.comfy.plan import Plan
from handler.api.dispatch import Api
from handler.api.fetching import filled
from handler.api.pieces import File
from handler.api.reply import Reply, answered
from handler.core.attachments import one
from handler.core.deadline import Deadline
from handler.core.errors import GraphRefused, KindlingError
from handler.core.recipe import Picture
from handler.core.request import Format

if TYPE_CHECKING:
    from handler.api.dialects.comfy.opening import Opened

CLIENT = "job"
IMAGES = "'images' must be a list of objects with 'name' and 'image' keys"
OnStep = Callable[[int, int], object]  # done, of
Ended = tuple[Job, Plan, tuple[Picture, ...], KindlingError | None]  # a job, what it lets go of, and what it failed of


@dataclass(frozen=True, slots=True)
class Made:
    """A picture of an output: what it is called, its file, and where it is too."""

    filename: str
    data: bytes
    url: str = ""

    def told(self) -> dict[str, Any]:
        """As an answer has it."""
        kind, data = ("s3_url", self.url) if self.url else ("base64", File(self.data))
        return {"filename": self.filename, "type": kind, "data": data}


class Steps(Listener):
    """Hears of a job's steps, and passes on how many there were of how many."""

    behind = True  # which spares it previews

    def __init__(self, on_step: OnStep) -> None:
        super().__init__(CLIENT)
        self._on_step = on_step

    def put(self, said: Message) -> None:
        """See `Listener`; of all that is told, only the steps are of use."""
        told: dict[str, Any] = json.loads(said) if isinstance(said, str) else {}
        if told.get("type") == "progress":
            self._on_step(told["data"]["value"], told["data"]["max"])


async def draw_workflow(api: Api, given: Mapping[str, Any], on_step: OnStep, deadline: Deadline | None = None) -> Reply:
    """Answer one job, whose input `given` has a `workflow`. Never raises, but for cancellation."""
    reply = await answered(_drawn(api, given, on_step, deadline or Deadline.within(api.engine.settings.deadline_s)))
    error = reply.content.get("error")
    return replace(reply, content={"error": error["message"]}) if isinstance(error, dict) else reply


async def _drawn(api: Api, given: Mapping[str, Any], on_step: OnStep, deadline: Deadline) -> Reply:
    if not _are_images(images := given.get("images") or []):
        return Reply(400, {"error": IMAGES})
    most = int(api.engine.settings.max_edit_mb * 1e6)
    sent = (await filled({"images": [each["image"] for each in images]}, api.fetches, most, deadline))["images"]
    files, wrong = await deadline.hold(asyncio.to_thread(_files, [each["name"] for each in images], sent))
    if wrong:
        return Reply(400, {"error": "Failed to upload one or more input images", "details": wrong})
    try:
        graph = await deadline.hold(asyncio.to_thread(_opened, given["workflow"]))
        comfy = Comfy(api, Memory(files))
        job, plan, pictures, error = await _ended(comfy, graph, on_step, deadline)
    except GraphRefused as no:
        return Reply(no.status, {"error": _refusal(no)})
    errors = [*_wrong(plan.node_errors), *(_failures(job) if error else ())]
    found = [Made(image["filename"], comfy.archive.load(*place(image))) for image in _kept(job)]
    if api.store and found:
        found, lost = await _stored(api, pictures[0], found, deadline)
        errors += lost
    fatal = error.fatal if error else False
    if not found and error:
        return Reply(error.status, {"error": "Job processing failed", "details": errors}, fatal=fatal)
    rest = {"errors": errors, "notes": [*graph.notes, *plan.notes]}
    content = partial(_content, rest={name: told for name, told in rest.items() if told})
    return Reply(200, content(found), fatal=fatal, smaller=partial(_smaller, content, found))


def _are_images(images: Any) -> bool:
    return isinstance(images, list) and all(
        isinstance(each, dict) and each.keys() >= {"name", "image"} for each in images
    )


def _files(names: Sequence[Any], images: Sequence[Any]) -> tuple[dict[str, bytes], list[str]]:
    """The images by their names on the shelf, and what is wrong with others. For a thread: there may be many bytes."""
    files, wrong = dict[str, bytes](), list[str]()
    for given, image in zip(names, images, strict=True):
        name = given if isinstance(given, str) else json.dumps(given)
        subfolder, _, last = name.rpartition("/")
        try:
            files[named("input", subfolder, last)] = one(image)
        except KindlingError as error:
            wrong.append(f"Error uploading {name:.80}: {error.message}")
        except ValueError as error:
            wrong.append(f"Error decoding base64 for {name:.80}: {error}")
    return files, wrong


def _opened(workflow: Any) -> "Opened":
    """For a thread: it may be large."""
    from handler.api.dialects.comfy.opening import opened  # late: most workers never see a graph

    text = workflow if isinstance(workflow, str) else json.dumps(workflow)
    return opened(text.encode(errors="surrogatepass"))  # half a character is refused there


async def _ended(comfy: Comfy, graph: "Opened", on_step: OnStep, deadline: Deadline) -> Ended:
    """Draw it. Raises what refuses it."""
    over: asyncio.Future[Ended] = asyncio.get_running_loop().create_future()

    def end(job: Job, error: KindlingError | None) -> None:
        if not over.done():  # else nobody waits any more
            over.set_result((job, job.plan, tuple(job.pictures), error))

    comfy.listeners.add(Steps(on_step))
    extra = {"extra_data": {"extra_pnginfo": {"workflow": graph.workflow}}} if graph.workflow else {}
    try:
        await comfy.post({"prompt": graph.graph, "client_id": CLIENT, **extra}, deadline, end)
        return await over
    finally:
        for job in comfy.jobs():
            comfy.cancel(job)


def _kept(job: Job) -> list[dict[str, str]]:
    """Where the pictures of its outputs are, those that would be streamed among them, but none that is temporary."""
    outputs = [image for output in job.outputs.values() for image in output["images"] if image["type"] != "temp"]
    return outputs + [image for images in job.streamed.values() for image in images]


def _refusal(error: GraphRefused) -> str:
    """Why a workflow is not drawn, node by node where that is known."""
    said, wrong = error.answer["error"], _wrong(error.answer["node_errors"])
    head = "Workflow validation failed" if said["type"] == FAILED else said["message"]
    if wrong:
        return "\n".join((f"{head}:", *(f"• {each}" for each in wrong)))
    return f"{head.rstrip('.')}. {said['details']}".strip()


def _wrong(node_errors: Mapping[str, Any]) -> list[str]:
    """What is wrong with the nodes of outputs that are not drawn."""
    return [
        f"Node {node} ({entry['class_type']}): {each['message']}: {each['details']}"
        for node, entry in node_errors.items()
        for each in entry["errors"]
    ]


def _failures(job: Job) -> list[str]:
    """What a job failed of, as it was told."""
    return [
        f"Workflow execution error: Node Type: {said['node_type']}, Node ID: {said['node_id']}, "
        f"Message: {said['exception_message']}"
        for kind, said in job.told
        if kind == "execution_error"
    ]


async def _stored(api: Api, drawn: Picture, found: list[Made], deadline: Deadline) -> tuple[list[Made], list[str]]:
    """`found` with the URLs where they are now too; and why some are not. `drawn` is any picture of this worker's."""
    assert api.store
    keep = api.store.keep
    kept = await asyncio.gather(*(keep(replace(drawn, data=each.data, format="png"), deadline) for each in found))
    pairs = [*zip(found, kept, strict=True)]
    lost = [f"Error uploading {each.filename} to S3: {one.undelivered}" for each, one in pairs if one.undelivered]
    return [replace(each, url=one.url) for each, one in pairs], lost


def _content(found: Sequence[Made], rest: Mapping[str, Any]) -> dict[str, Any]:
    status = {} if found else {"status": "success_no_images"}
    return {"images": [each.told() for each in found], **rest, **status}


def _smaller(content: Callable[[Sequence[Made]], dict[str, Any]], found: Sequence[Made], form: Format) -> Any:
    """The answer with those pictures that it has itself as JPEG or WebP. For a thread."""
    return content([each if each.url else _recoded(each, form) for each in found])


def _recoded(made: Made, form: Format) -> Made:
    filename = str(PurePosixPath(made.filename).with_suffix(f".{form}"))
    return Made(filename, codec.recode(made.data, form, LEAN))
