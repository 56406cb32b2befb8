"""Kindling behind a RunPod queue: `python -u platform/runpod_worker.py`.

A job's input is either the native fields or {"openai_route": "/v1/...", "openai_input": {...}}. This file knows
how RunPod carries jobs; what an input means, and how a picture is drawn, it does not know.
"""

import functools
import json
import os
from typing import Any

import runpod

from handler import Api, Lane, Settings

# Bytes of a result. RunPod keeps more for /runsync, whose job ids say so; what it finds too large it drops silently.
MAX_RESULT, MAX_SYNC_RESULT = 10_000_000, 20_000_000
NO_WORKFLOWS = {
    "message": "ComfyUI workflows are not understood here yet: send the native fields, such as {'prompt': ...}, or "
    "{'openai_route': '/v1/images/generations', 'openai_input': {...}}.",
    "type": "invalid_request_error",
    "param": "workflow",
    "code": "unsupported_parameter",
}
config: dict[str, Any] = {}


@functools.cache
def lane() -> Lane:
    """This process's lane, booting since the first call."""
    started = Lane(Settings.from_env())
    started.start()
    return started


def boot() -> None:
    """RunPod's fitness check: a worker that cannot start is reported unhealthy and never takes a job."""
    at_once()
    lane().wait_booted()


def at_once(current: int = 1) -> int:
    """How many jobs RunPod may hand us, by the name that RunPod's vLLM worker gives it.

    The second waits in the lane, which spares the second that the SDK sleeps between jobs; but it waits there even
    while another worker is idle, its time is running out, and it is lost with this worker's GPU. So the default is 1.
    """
    given, most = os.environ.get("MAX_CONCURRENCY", "1"), lane().settings.queue
    if not given.isdecimal() or not 1 <= int(given) <= most:
        raise ValueError(f"MAX_CONCURRENCY should be 1 to {most} (KINDLING_QUEUE), not {given!r}.")
    return int(given)


async def handle(job: dict[str, Any]) -> dict[str, Any]:
    """Answer one job. RunPod cancels this coroutine when the job is cancelled or out of time."""
    if isinstance(job["input"], dict) and "workflow" in job["input"]:
        return {"error": json.dumps(NO_WORKFLOWS)}

    def on_step(done: int, of: int) -> None:
        if 0 < done < of:  # each update is posted by a thread of its own: the last one could overtake the result
            runpod.serverless.progress_update(job, {"step": done, "of": of})

    reply = await Api(lane()).call(*route(job["input"]), on_step)
    if reply.fatal:
        config["refresh_worker"] = True  # read after each job: the loop ends and RunPod replaces the worker
    error = reply.body.get("error") or too_large(job["id"], reply.body)
    return {"error": json.dumps(error)} if error else reply.body  # the SDK wants errors to be strings


def route(given: Any) -> tuple[str, Any]:
    """A job's input as a path and a payload."""
    if isinstance(given, dict) and "openai_route" in given:
        return str(given["openai_route"]), given.get("openai_input")
    return "/generate", given


def too_large(job: str, body: dict[str, Any]) -> dict[str, Any] | None:
    """The error for a result that RunPod would drop without telling the caller."""
    size, most = len(json.dumps(body)), MAX_SYNC_RESULT if job.startswith("sync-") else MAX_RESULT
    message = f"The answer has {size} bytes, RunPod carries {most} here: ask for webp or jpeg, or for fewer pictures."
    return {"code": "result_too_large", "message": message} if size > most else None


if __name__ == "__main__":  # the heartbeat is a process of its own, which may import this file again
    runpod.serverless.register_fitness_check(boot)
    if "RUNPOD_WEBHOOK_GET_JOB" not in os.environ:
        lane()  # no fitness checks run on a developer's machine; a job that comes early waits in the lane
    config |= {"handler": handle, "concurrency_modifier": at_once}
    runpod.serverless.start(config)
    lane().stop()  # a cancelled picture may still be at its last step
