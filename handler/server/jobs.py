"""Jobs over HTTP: a request to draw that says so becomes one; they are asked for, cancelled and listened to."""

import asyncio
from dataclasses import dataclass, replace
from typing import Any

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import Response

from handler.api.dialects.routes import dialect_of
from handler.api.jobs.job import BAD, Found, Job
from handler.api.jobs.service import Jobs
from handler.api.outgoing import Target
from handler.api.reply import Reply, answered
from handler.core.deadline import Deadline
from handler.core.errors import FileMissing, InvalidType, InvalidValue
from handler.server.access import JOB, JSON, response
from handler.server.idempotency import REPEATED, Key, Repeats
from handler.server.mounted import base
from handler.server.patience import patience
from handler.server.record import Seen
from handler.server.sse import stream

PREFER, RESPOND_ASYNC = "prefer", "respond-async"  # RFC 7240
YES = {True: True, False: False, None: False, "true": True, "false": False}  # forms have texts, some of them True


@dataclass(frozen=True, slots=True)
class Later:
    """That a request shall be a job, and who is told when it has ended."""

    webhook: Target | None = None

    @classmethod
    def taken(cls, request: Request, payload: Any) -> "Later | None":
        """What the head and the payload say of that, which then says it no more; None if the answer is awaited."""
        said, url = (payload.pop(name, None) if isinstance(payload, dict) else None for name in ("async", "webhook"))
        said = said.lower() if isinstance(said, str) else said
        if (isinstance(said, list | dict | int | float) and not isinstance(said, bool)) or said not in YES:
            raise InvalidType("async: Input should be true or false.", "async")
        later = YES[said] or _prefers(request.headers)
        if url is not None and not later:
            raise InvalidValue("webhook: only a job has one; send async true as well.", "webhook")
        jobs: Jobs = request.app.state.jobs
        return cls(jobs.webhooks.target(url) if url is not None else None) if later else None


def _prefers(headers: Headers) -> bool:
    parts = ",".join(headers.getlist(PREFER)).split(",")
    return any(part.partition(";")[0].strip().lower() == RESPOND_ASYNC for part in parts)


async def posted(request: Request, payload: Any, later: Later, key: Key | None, asked: bytes) -> Reply:
    """The request as a job that was accepted; under an idempotency key the one before, unless that failed or went."""
    state, seen, path = request.app.state, request.state.seen, request.url.path
    jobs, repeats = state.jobs, state.repeats
    assert isinstance(jobs, Jobs)
    assert isinstance(repeats, Repeats)
    settings, where = jobs.api.engine.settings, base(request.scope, jobs.api.engine.settings)

    last = Seen(seen.id, seen.route + JOB, seen.start, seen.admitted, begun=seen.begun, prompt=seen.prompt)

    def ended(job: Job) -> None:
        """A job is over: it is counted, traced and logged as one request to a route of its own."""
        state.room.leave(last)
        last.note(job.reply or Reply(500, {}))
        state.ended(request.scope, last)

    async def start(_: Deadline) -> Reply:
        deadline = Deadline.within(min(patience(request.headers), settings.deadline_s), seen.start)
        state.room.hand(seen, last)  # its images wait with it
        try:
            job = await jobs.post(path, payload, deadline, where, later.webhook, ended)
        except BaseException:
            state.room.leave(last)
            raise
        shown = job.shown(where) | {"result": None}
        return Reply(202, shown, {"location": shown["urls"]["get"], "preference-applied": RESPOND_ASYNC})

    async def accepted() -> Reply:
        asking = asked + RESPOND_ASYNC.encode()
        job_s = settings.deadline_s + settings.kept_s  # by then it has ended, and is kept no more
        return await repeats.call(key, asking, lambda until: answered(start(until)), seen.deadline, job_s)

    reply = await accepted()
    if key is None or not REPEATED.items() <= reply.headers.items() or reply.status >= 400:
        return reply
    if (again := await _as_it_is(reply, jobs, where)) is None:
        repeats.forget(key, reply)
    return again or await accepted()


async def _as_it_is(reply: Reply, jobs: Jobs, where: str) -> Reply | None:
    """An accepted job's answer as the job is by now; None if that is gone, or has ended badly."""
    found = await answered(jobs.found(reply.content["id"]))
    if isinstance(found, Reply):
        return None if found.status == FileMissing.status else found
    shown = found.shown(where) | {"result": None}
    return None if found.head["status"] in BAD else replace(reply, content=shown)


async def get_job(request: Request) -> Response:
    """A job, as far as it is; once it has ended well, with its answer."""
    jobs: Jobs = request.app.state.jobs
    return await _shown(request, await answered(jobs.found(request.path_params["job_id"])))


async def cancel_job(request: Request) -> Response:
    """Stop a job; what it is then."""
    jobs: Jobs = request.app.state.jobs
    return await _shown(request, await answered(jobs.cancel(request.path_params["job_id"])))


async def hear_job(request: Request) -> Response:
    """A job's events, as if its answer were streamed: the latest at first, and then those to come."""
    jobs: Jobs = request.app.state.jobs
    job_id = request.path_params["job_id"]
    found = await answered(jobs.found(job_id))
    if isinstance(found, Reply):
        return response(request.scope, found)
    dialect = dialect_of(found.head["route"])
    assert dialect  # or it were no job
    heard = await stream(lambda hear: answered(jobs.follow(job_id, hear)), dialect.completed, always=True)
    assert not isinstance(heard, Reply)
    return heard


async def _shown(request: Request, found: Found | Reply) -> Response:
    jobs: Jobs = request.app.state.jobs
    if isinstance(found, Reply):
        return response(request.scope, found)
    json = await asyncio.to_thread(found.json, base(request.scope, jobs.api.engine.settings))  # may be 100 MB
    return Response(json, media_type=JSON)
