"""The routes of what a worker keeps for a while: pictures by URL, and jobs."""

from typing import get_args

from handler.api.jobs.job import JOBS_ROUTE, State
from handler.api.links import LINKS_ROUTE, MEDIA
from handler.core.settings import Settings
from handler.server.openapi.operation import ALWAYS, JSON, Answer, Operation
from handler.server.openapi.schema import COUNT, NULL, TEXT, Schema, only, ref, whole

HEAD = ("x-request-id", "traceparent")
PARAMETERS: dict[str, Schema] = {
    "image_id": {"in": "path", "required": True, "schema": TEXT, "description": "As the answer with its URL has it."},
    "job_id": {"in": "path", "required": True, "schema": TEXT, "description": "As the answer with 202 has it."},
    "prefer": {"schema": TEXT, "description": "respond-async: answer 202 at once, with a job; as async does."},
}
HEADERS: dict[str, Schema] = {
    "cache-control-private": {"required": True, "schema": TEXT, "description": "Private, until the URL ends."},
    "location": {"required": True, "schema": TEXT, "description": "Where to ask for the job."},
    "preference-applied": {"required": True, "schema": {"enum": ["respond-async"]}},
}
TIME = COUNT | {"description": "Seconds since 1970."}
MAYBE_TIME: Schema = {"type": ["integer", "null"]}
JOB = whole(
    {
        "id": TEXT,
        "object": only("job"),
        "status": {"enum": [*get_args(State)]},
        "route": TEXT,
        "created_at": TIME,
        "started_at": MAYBE_TIME,
        "ended_at": MAYBE_TIME,
        "progress": whole({"steps": COUNT, "of": MAYBE_TIME}),
        "error": {"anyOf": [ref("Refusal"), NULL]},
        "urls": whole({"get": TEXT, "cancel": TEXT, "events": TEXT}),
        "result": {"anyOf": [ref("Images"), ref("NativeImages"), ref("FalImages"), ref("WorkflowImages"), NULL]},
    }
)
ACCEPTED = Answer("A job, where that was asked for.", {JSON: ref("Job")}, ("location", "preference-applied"))
PICTURE = Answer(
    "The picture.", {kind: {} for kind in MEDIA.values()}, ("content-disposition", "cache-control-private")
)


SAID = (
    *("PartialImage", "Progress", "Completed"),
    *("PartialEdit", "EditProgress", "CompletedEdit"),
    *("NativeCompleted", "FalCompleted", "WorkflowCompleted"),
)
HEARD = Answer("Those to come, and the end.", {"text/event-stream": ref("JobEvent")}, ("x-accel-buffering",))
TOLD = Answer("As it is now.", {JSON: ref("Job")})


def _of_job(method: str, summary: str, answer: Answer = TOLD) -> tuple[Operation, ...]:
    return (Operation(method, summary, {200: answer}, errors=(*ALWAYS, 404, 503), parameters=(*HEAD, "job_id")),)


OPERATIONS: dict[str, tuple[Operation, ...]] = {
    LINKS_ROUTE: (
        Operation(
            "get",
            "A picture by URL, where there is no object store; whoever has the URL needs no key",
            {200: PICTURE},
            errors=(*ALWAYS, 404, 503),
            parameters=(*HEAD, "image_id"),
        ),
    ),
    JOBS_ROUTE + "/{job_id}": _of_job("get", "A job, with its answer once it has ended"),
    JOBS_ROUTE + "/{job_id}/cancel": _of_job("post", "Stop a job, be it waiting or drawn"),
    JOBS_ROUTE + "/{job_id}/events": _of_job("get", "A job's events, as of a stream", HEARD),
}


def fields(settings: Settings) -> dict[str, Schema]:
    """What requests to draw may say of being jobs."""
    later: Schema = {"type": "boolean", "default": False, "description": "Answer 202 at once, with a job to ask for."}
    webhook = TEXT | {"format": "webhook", "description": "Who is told when the job has ended; needs async."}
    return {"async": later} | ({"webhook": webhook} if settings.webhook_hosts else {})
