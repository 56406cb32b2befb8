"""Kindling behind a RunPod queue: `python -u platform/runpod_worker.py`.

A job's input is the native fields, {"openai_route": "/v1/...", "openai_input": {...}}, or worker-comfyui's {"workflow":
{...}, "images": [...]}. This file knows how RunPod carries jobs; what an input means, and how a picture is drawn, it
does not know.
"""

import asyncio
import functools
import gc
import json
import logging
import os
import re
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import runpod

from handler import Api, Engine, Reply, Settings, dedicated, draw_workflow, parse_json

# Bytes of a result. RunPod keeps more for /runsync, whose job ids say so; what it finds too large it drops silently.
MAX_RESULT, MAX_SYNC_RESULT = 10_000_000, 20_000_000
MAX_CHUNK = 1_000_000  # of one item of /stream, which is where partial pictures are read
LOSSY = ("webp", "jpeg")
INVALID = {"type": "invalid_request_error", "code": "invalid_value"}
BAD_FORMAT = {"message": "if_too_large should be 'webp' or 'jpeg'.", "param": "if_too_large", **INVALID}
NO_INPUT = {
    "message": "Please provide input: an object with native fields, such as {'prompt': ...}, with a 'workflow' and its "
    "'images', or {'openai_route': '/v1/images/generations', 'openai_input': {...}}.",
    "param": "input",
    **INVALID,
}
WAITING = "no ComfyUI runs behind this worker, so that there is none to wait for"
COMFY_VARIABLES = {  # worker-comfyui's that change nothing here: what a name begins with, and why
    "COMFY_API_": WAITING,
    "COMFY_POLLING_": WAITING,
    "WEBSOCKET_": WAITING,
    "COMFY_LOG_LEVEL": "KINDLING_LOG_LEVEL says how much is logged",
    "COMFY_ORG_API_KEY": "nodes of Comfy.org's API are not drawn here",
    "NETWORK_VOLUME_DEBUG": "python -m handler doctor looks at the volume",
    "SERVE_API_LOCALLY": "--rp_serve_api serves RunPod's routes, and python -m handler serve all others",
}
log = logging.getLogger("kindling.runpod")
config: dict[str, Any] = {}


@functools.cache
def engine() -> Engine:
    """This process's engine, booting since the first call."""
    on_gpu = {"KINDLING_DEVICE": os.environ.get("KINDLING_DEVICE") or "cuda"}  # never the CPU of a rented GPU
    started = Engine(Settings.from_env({**os.environ, **on_gpu}))
    started.start()
    return started


@functools.cache
def api() -> Api:
    """What answers this process's jobs."""
    return Api(engine())


def boot() -> None:
    """RunPod's fitness check: a worker that cannot start is reported unhealthy and never takes a job."""
    dedicated()
    at_once()
    streams()
    for note in notes(os.environ):
        log.warning(note)
    engine().wait_booted()
    gc.freeze()  # what a worker has now it keeps: no collection looks through it while a job waits


def at_once(current: int = 1) -> int:
    """How many jobs RunPod may hand us, by the name that RunPod's vLLM worker gives it.

    The second waits in the engine, which spares the second that the SDK sleeps between jobs; but it waits there even
    while another worker is idle, its time is running out, and it is lost with this worker's GPU. So the default is 1.
    """
    given, most = os.environ.get("MAX_CONCURRENCY") or "1", engine().settings.queue
    if not re.fullmatch("[0-9]{1,9}", given) or not 1 <= int(given) <= most:
        raise ValueError(f"MAX_CONCURRENCY should be 1 to {most} (KINDLING_QUEUE), not {given[:80]!r}.")
    return int(given)


def streams() -> str:
    """Whether jobs are answered by `stream`; the SDK wants to know before it knows any job, and its answers differ."""
    if (said := os.environ.get("STREAM") or "0") not in HANDLERS:
        raise ValueError(f"STREAM should be 0 or 1, not {said!r}.")
    return said


async def stream(job: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
    """Answer one job piece by piece: the partial pictures that it asks for, then what `handle` answers."""
    loop, partials = asyncio.get_running_loop(), asyncio.Queue[dict[str, Any] | None]()
    answer = asyncio.create_task(handle(job, lambda event: loop.call_soon_threadsafe(partials.put_nowait, event)))
    answer.add_done_callback(lambda _: partials.put_nowait(None))
    try:
        while event := await partials.get():
            yield event
        yield await answer
    finally:
        answer.cancel()


async def handle(job: dict[str, Any], on_partial: Callable[[dict[str, Any]], object] | None = None) -> dict[str, Any]:
    """Answer one job. RunPod cancels this coroutine when the job is cancelled or out of time."""
    if (given := understood(job.get("input"))) is None:
        return {"error": json.dumps(NO_INPUT)}
    path, payload = route(given)
    options = payload if isinstance(payload, dict) else {}
    lossy = options.pop("if_too_large", None)
    if lossy not in (None, *LOSSY):
        return {"error": json.dumps(BAD_FORMAT)}

    def on_step(done: int, of: int, _: object = None) -> None:
        if 0 < done < of:  # each update is posted by a thread of its own: the last one could overtake the result
            runpod.serverless.progress_update(job, {"step": done, "of": of})

    comfy = given.get("workflow") is not None
    reply = await (draw_workflow(api(), given, on_step) if comfy else api().call(path, payload, on_step, on_partial))
    if reply.fatal:
        config["refresh_worker"] = True  # read after each job: the loop ends and RunPod replaces the worker
    reply, most = lean(reply), carried(job["id"], bool(options.get("partial_images")))
    if lossy and reply.smaller and too_large(reply, most):
        reply = lean(replace(reply, content=await asyncio.to_thread(reply.smaller, lossy)))
    if reply.stored and too_large(reply, most):
        reply = lean(replace(reply, content=await reply.stored()))
    large = too_large(reply, most)
    body = {"error": large} if large else await asyncio.to_thread(lambda: reply.body)
    error = body.get("error", "")  # which the SDK wants to be a string
    return body | {"error": error if isinstance(error, str) else json.dumps(error)} if error else body


def understood(given: Any) -> dict[str, Any] | None:
    """A job's input as an object, which may come as text; None if it is none."""
    try:
        found = parse_json(given) if isinstance(given, str) else given
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def route(given: dict[str, Any]) -> tuple[str, Any]:
    """A job's input as a path and a payload."""
    if given.get("openai_route") is not None:  # null counts as not sent
        return f"/{given['openai_route']}".replace("//", "/", 1), given.get("openai_input")
    return "/generate", given


def notes(environ: Mapping[str, str]) -> Iterator[str]:
    """A sentence for each variable of worker-comfyui that is set and changes nothing."""
    for name in sorted(environ):
        why = next((COMFY_VARIABLES[start] for start in COMFY_VARIABLES if name.startswith(start)), None)
        if why and environ[name]:
            yield f"{name} changes nothing here: {why}."


def lean(reply: Reply) -> Reply:
    """An answer without `image`, which a native one has in `images` too: RunPod carries few bytes."""
    return replace(reply, content={name: value for name, value in reply.content.items() if name != "image"})


def carried(job: str, streamed: bool) -> int:
    """How many bytes of an answer reach whoever gave this job."""
    if streamed:
        return MAX_CHUNK
    return MAX_SYNC_RESULT if job.startswith("sync-") else MAX_RESULT


def too_large(reply: Reply, most: int) -> dict[str, Any] | None:
    """The error for a result that RunPod would drop without telling the caller."""
    body, size = reply.content, reply.size
    code, message = "result_too_large", f"The answer has {size} bytes, RunPod carries {most} here: "
    if "delivery" in body:
        code, message = "delivery_failed", f"{body['delivery']} {message}"
    message += "ask for webp or jpeg, or for fewer pictures."
    return {"code": code, "message": message} if size > most else None


HANDLERS: dict[str, Any] = {"0": handle, "1": stream}


if __name__ == "__main__":  # the heartbeat is a process of its own, which may import this file again
    if os.environ.keys().isdisjoint(("RUNPOD_LOG_LEVEL", "RUNPOD_DEBUG_LEVEL")):
        runpod.RunPodLogger().set_level("INFO")  # left alone, the SDK logs every job and its answer: prompts and URLs
    runpod.serverless.register_fitness_check(boot)
    if "RUNPOD_WEBHOOK_GET_JOB" not in os.environ:
        streams()
        engine()  # no fitness checks run on a developer's machine; a job that comes early waits in the engine
    # Of a word that means neither the fitness check tells: not before, or RunPod would not hear why.
    config |= {"handler": HANDLERS.get(os.environ.get("STREAM") or "0", handle), "concurrency_modifier": at_once}
    config["refresh_worker"] = (
        os.environ.get("REFRESH_WORKER", "").lower() == "true"
    )  # worker-comfyui's: after each job
    config["return_aggregate_stream"] = True  # what was streamed is, as a list, the answer to /run and /runsync
    runpod.serverless.start(config)
    engine().stop()  # a cancelled picture may still be at its last step
    if engine().alive:  # it hangs in native code, which Python's own way out would wait for
        os._exit(1)
