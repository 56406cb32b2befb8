"""What each route takes and answers: `OPERATIONS` has a row for each of our own, `operations` all."""

from collections.abc import Iterator, Mapping
from dataclasses import replace

from handler.api.dispatch import TOKENS
from handler.core.errors import Cancelled, FetchFailed, KindlingError
from handler.server import multipart
from handler.server.accept import MEDIA, TOLD
from handler.server.idempotency import HEADER, REPEATED
from handler.server.openapi import comfy, deployments, jobs, workflows
from handler.server.openapi.operation import ALWAYS, JSON, Answer, Operation
from handler.server.openapi.schema import TEXT, Schema, ref
from handler.server.patience import DEADLINE, HANGS_UP

NEVER_ANSWERED = (Cancelled, FetchFailed)  # nobody is there; not while serving
EVENTS, METRICS = "text/event-stream", "text/plain"
# Where Accept wants the picture itself. What may be anything would be all that TypeScript knows of the answer.
PICTURES: dict[str, Schema] = {media: TEXT | {"format": "binary"} for media in MEDIA.values()}
ASKED = ("x-request-id", "traceparent", HEADER, DEADLINE, HANGS_UP, "prefer")  # of every route that draws


def every(kind: type[KindlingError]) -> Iterator[type[KindlingError]]:
    """All kinds that an answer can be."""
    for each in kind.__subclasses__():
        if each not in NEVER_ANSWERED:
            yield each
        yield from every(each)


DRAWING = tuple(sorted({each.status for each in every(KindlingError)} - {401, 403}))


def _drawing(summary: str, body: Mapping[str, Schema], answer: str, event: str) -> Operation:
    """A route that draws, and streams where it is asked to: the data of each event is an `event`."""
    content = {JSON: ref(answer), EVENTS: ref(event), **PICTURES}
    told = "The pictures; with stream true, events; one picture as it is, where Accept wants that."
    drawn = Answer(told, content, (*REPEATED, TOKENS, *TOLD, "x-accel-buffering"))
    return Operation("post", summary, {200: drawn, 202: jobs.ACCEPTED}, body, DRAWING, ASKED)


def _hub(*parameters: str) -> Operation:
    """A route of Hugging Face's client."""
    content = {**PICTURES, JSON: ref("NativeImages"), EVENTS: ref("NativeEvent")}
    told = "The picture as it is, or JSON where Accept wants that; with stream true in its parameters, events."
    drawn = Answer(told, content, (*REPEATED, TOKENS, *TOLD, "x-accel-buffering"))
    answers = {200: drawn, 202: jobs.ACCEPTED}
    summary, body = "Draw one picture, as Hugging Face's InferenceClient asks", {JSON: ref("HubRequest")}
    return Operation("post", summary, answers, body, DRAWING, (*ASKED, *parameters))


def _fal(*parameters: str) -> Operation:
    """The route of fal's clients."""
    content = {JSON: ref("FalImages"), EVENTS: ref("FalEvent")}
    drawn = Answer("The pictures by their addresses; with stream true, events.", content, (*REPEATED, TOKENS))
    answers, summary = {200: drawn, 202: jobs.ACCEPTED}, "Draw, as fal's clients ask"
    return Operation("post", summary, answers, {JSON: ref("FalRequest")}, DRAWING, (*ASKED, *parameters))


def _reading(summary: str, answer: str) -> Operation:
    return Operation("get", summary, {200: Answer("As it is now.", {JSON: ref(answer)})})


def _waited(summary: str, content: Mapping[str, Schema], *errors: int) -> Operation:
    """What only tells, of a volume or a GPU that may not answer; who asks says how long that is waited for."""
    refusals, asked = (*ALWAYS, 400, *errors, 504), ("x-request-id", "traceparent", DEADLINE)
    return Operation("get", summary, {200: Answer("As it is now.", content)}, errors=refusals, parameters=asked)


BROUGHT = "Draw a workflow that comes with the request, by its fields, and keep nothing"
MODELS, FAL = "/models/{folder}", "/fal/{id}"
READY = {JSON: ref("Ready")}
OPERATIONS: dict[str, Operation] = {
    "/v1/images/generations": _drawing(
        "Draw, as OpenAI's Images API has it",
        {JSON: ref("GenerationRequest")},
        *("Images", "GenerationEvent"),
    ),
    "/v1/images/edits": _drawing(
        "Edit images, as OpenAI's Images API has it",
        {JSON: ref("EditRequest"), multipart.MEDIA: ref("EditForm")},
        *("Images", "EditEvent"),
    ),
    "/v1/images/variations": Operation("post", "Retired by OpenAI", {}, errors=(*ALWAYS, 404), retired=True),
    "/generate": _drawing(
        "Draw, and tell all about it",
        {JSON: ref("NativeRequest")},
        *("NativeImages", "NativeEvent"),
    ),
    "/v1/models": _reading("The model that this worker serves", "Models"),
    "/v1/models/{id}": Operation(
        "get",
        "One name of the model, and what requests may ask of it",
        {200: Answer("It is served.", {JSON: ref("ModelTold")})},
        errors=(*ALWAYS, 404),
        parameters=("id", "x-request-id", "traceparent"),
    ),
    "/v1/model_info": _reading("The served model, as SGLang's clients ask for it", "ModelInfo"),
    "/v1/receipt": _reading("What this worker runs, and what was measured of that", "ReceiptAnswer"),
    "/": Operation(
        "get", "What stands here, for people", {200: Answer("A text; a browser gets the playground.", {METRICS: TEXT})}
    ),
    "/ping": Operation(
        "get",
        "Health, as RunPod asks for it",
        {200: Answer("Ready."), 204: Answer("Starting."), 503: Answer("Failed, or stopping.")},
    ),
    "/health": Operation(
        "get", "Health, as SGLang's clients ask for it", {200: Answer("Ready."), 503: Answer("Not ready.")}
    ),
    "/health/live": _reading("The process answers", "Live"),
    "/health/ready": Operation(
        "get",
        "Whether the model is loaded, how its cold start went, and what all this costs",
        {200: Answer("Ready.", READY), 503: Answer("Not ready.", READY)},
    ),
    "/v1/status": _waited("The same and more, for people who look on: 200 whatever it is", {JSON: ref("Status")}),
    "/metrics": _waited("For Prometheus, in its text format", {METRICS: TEXT}),
    "/openapi.json": _waited("This description: OpenAPI 3.1", {JSON: {"type": "object", "required": ["openapi"]}}, 503),
}


def operations() -> dict[str, tuple[Operation, ...]]:
    """All, by their routes."""
    found = (
        {path: (row,) for path, row in OPERATIONS.items()} | jobs.OPERATIONS | comfy.OPERATIONS | deployments.OPERATIONS
    )
    drawn = called("Draw a kept workflow, by its fields", workflows.ANY, "name")
    return found | {
        "/": (*found["/"], _hub()),
        MODELS: (*found[MODELS], _hub("folder")),
        FAL: (_fal("id"),),
        workflows.LIST: (*workflows.LISTED, called(BROUGHT, ref("WorkflowBrought"))),
        workflows.ONE: (*workflows.ROWS, drawn),
    }


def called(summary: str, body: Schema, *parameters: str) -> Operation:
    """A route that draws a workflow."""
    row = _drawing(summary, {JSON: body}, "WorkflowImages", "WorkflowEvent")
    return replace(row, parameters=(*row.parameters, *parameters))
