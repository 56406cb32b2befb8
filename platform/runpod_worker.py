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

MAX_RESULT = 20_000_000  # bytes
config: dict[str, Any] = {}


@functools.cache
def lane() -> Lane:
    """This process's lane, booting since the first call."""
    started = Lane(Settings.from_env())
    started.start()
    return started


def boot() -> None:
    """RunPod's fitness check: a worker that cannot start is reported unhealthy and never takes a job."""
    lane().wait_booted()


async def handle(job: dict[str, Any]) -> dict[str, Any]:
    """Answer one job. RunPod cancels this coroutine when the job is cancelled or out of time."""

    def on_step(done: int, of: int) -> None:
        if 0 < done < of:  # each update is posted by a thread of its own: the last one could overtake the result
            runpod.serverless.progress_update(job, {"step": done, "of": of})

    reply = await Api(lane()).call(*route(job["input"]), on_step)
    if reply.fatal:
        config["refresh_worker"] = True  # read after each job: the loop ends and RunPod replaces the worker
    error = reply.body.get("error") or too_large(reply.body)
    return {"error": json.dumps(error)} if error else reply.body  # the SDK wants errors to be strings


def route(given: Any) -> tuple[str, Any]:
    """A job's input as a path and a payload."""
    if isinstance(given, dict) and "openai_route" in given:
        return str(given["openai_route"]), given.get("openai_input")
    return "/generate", given


def too_large(body: dict[str, Any]) -> dict[str, Any] | None:
    """The error for a result that RunPod would drop without telling the caller."""
    size = len(json.dumps(body))
    message = f"The answer has {size} bytes, RunPod carries {MAX_RESULT}: ask for webp or for fewer pictures."
    return {"code": "result_too_large", "message": message} if size > MAX_RESULT else None


if __name__ == "__main__":  # the heartbeat is a process of its own, which may import this file again
    runpod.serverless.register_fitness_check(boot)
    if "RUNPOD_WEBHOOK_GET_JOB" not in os.environ:
        lane()  # no fitness checks run on a developer's machine; a job that comes early waits in the lane
    config["handler"] = handle
    runpod.serverless.start(config)
    lane().stop()  # a cancelled picture may still be at its last step
