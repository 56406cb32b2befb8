"""The OpenAPI description of one worker: what it serves, with what this model takes. `OPERATIONS` has a row a route."""

from collections.abc import Iterator, Mapping
from http import HTTPStatus
from typing import Any
from urllib.parse import quote

from handler.api import served
from handler.api.dispatch import TOKENS
from handler.core.errors import Cancelled, FetchFailed, KindlingError
from handler.core.version import __version__
from handler.engine.engine import Engine
from handler.server import multipart
from handler.server.auth import DEFAULTS, OPEN_ROUTES
from handler.server.idempotency import HEADER, KEY, REPEATED
from handler.server.openapi import comfy
from handler.server.openapi.named import named
from handler.server.openapi.operation import ALWAYS, JSON, Answer, Operation
from handler.server.openapi.requests import requests
from handler.server.openapi.responses import ANSWERS, types
from handler.server.openapi.schema import TEXT, Schema, ref

ABOUT = (
    "Errors have OpenAI's envelope. Every answer has an x-request-id, and HEAD is answered where GET is. "
    "Limits are those of the model that this worker serves. ComfyUI's routes are below /api too."
)
NEVER_ANSWERED = (Cancelled, FetchFailed)  # nobody is there; not while serving
VOLUME = (504,)  # where it is looked at, and does not answer
FILES = {name: {"contentType": "image/png, image/jpeg, image/webp, image/avif"} for name in ("image", "mask")}
EVENTS, METRICS = "text/event-stream", "text/plain"

HEADERS: dict[str, Schema] = {
    "x-request-id": {"required": True, "schema": TEXT, "description": "Yours, or a new one."},
    "retry-after": {"schema": {"type": "integer", "minimum": 1}, "description": "Seconds, where trying again helps."},
    "x-should-retry": {"schema": {"enum": ["false"]}, "description": "Where trying again does not help."},
    "idempotent-replayed": {"schema": {"enum": ["true"]}, "description": "Where it was drawn before."},
    TOKENS: {
        "schema": TEXT | {"pattern": "^[0-9]+/[0-9]+$"},
        "description": "How many tokens of the prompts were read, of how many; a stream says so in its last event.",
    },
    "allow": {"required": True, "schema": TEXT},
    "content-disposition": {"required": True, "schema": TEXT, "description": "What a browser may open, or not."},
    "www-authenticate": {"required": True, "schema": TEXT},
    "x-accel-buffering": {"schema": {"enum": ["no"]}, "description": "Of a stream, which nginx should not hold back."},
    **{name: {"required": True, "schema": {"enum": [value]}} for name, value in DEFAULTS.items()},
}
EVERYWHERE = ("x-request-id", *DEFAULTS)
RETRY = ("retry-after", "x-should-retry")
HEADERS_OF = {401: ("www-authenticate",), 405: ("allow",)}  # and `RETRY` where trying again is a question
SECONDS = r"0*[1-9][0-9]*(\.[0-9]+)?|0+\.0*[1-9][0-9]*"  # more than none
DEADLINE, HANGS_UP = "x-deadline-s", "x-stainless-read-timeout"
PARAMETERS: dict[str, Schema] = {
    "id": {"in": "path", "required": True, "description": "As /v1/models names it."},
    "x-request-id": {
        "schema": TEXT,
        "description": "Comes back with the answer, and stands in the log: up to 128 visible characters.",
    },
    HEADER: {
        "schema": TEXT | {"pattern": f"^{KEY.pattern}$"},
        "description": "Your own name for this request: sent again under it, it is not drawn again.",
    },
    DEADLINE: {
        "schema": TEXT | {"pattern": f"^({SECONDS})$"},
        "description": "Seconds after which the pictures are of no use: 504 then, and nothing is drawn any more. They "
        "count from the first byte of the request, and are never more than KINDLING_DEADLINE_S.",
    },
    HANGS_UP: {
        "schema": TEXT,
        "description": "OpenAI's client says here after how many seconds it hangs up. Without a stream or an "
        "idempotency-key that is a deadline too, from when all of the request is there; the answer comes a twentieth "
        "of it, and at least 50 ms, before.",
    },
    **comfy.PARAMETERS,
    "traceparent": {"schema": TEXT, "description": "The caller's span, where the worker sends traces (W3C)."},
}
PLAIN = str.maketrans("/.", "__", "{}")


def every(kind: type[KindlingError]) -> Iterator[type[KindlingError]]:
    """All kinds that an answer can be."""
    for each in kind.__subclasses__():
        if each not in NEVER_ANSWERED:
            yield each
        yield from every(each)


DRAWING = tuple(sorted({each.status for each in every(KindlingError)} - {401, 403}))


def _drawing(summary: str, body: Mapping[str, Schema], answer: str, event: str) -> Operation:
    """A route that draws, and streams where it is asked to: the data of each event is an `event`."""
    content = {JSON: ref(answer), EVENTS: ref(event)}
    drawn = Answer("The pictures; with stream true, events.", content, (*REPEATED, TOKENS, "x-accel-buffering"))
    parameters = ("x-request-id", "traceparent", HEADER, DEADLINE, HANGS_UP)
    return Operation("post", summary, {200: drawn}, body, DRAWING, parameters)


def _reading(summary: str, answer: str) -> Operation:
    return Operation("get", summary, {200: Answer("As it is now.", {JSON: ref(answer)})})


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
        "One name of the model",
        {200: Answer("It is served.", {JSON: ref("Model")})},
        errors=(*ALWAYS, 404),
        parameters=("id", "x-request-id", "traceparent"),
    ),
    "/v1/model_info": _reading("The served model, as SGLang's clients ask for it", "ModelInfo"),
    "/v1/receipt": _reading("What this worker runs, and what was measured of that", "ReceiptAnswer"),
    "/": Operation("get", "What stands here, for people", {200: Answer("A text.", {METRICS: TEXT})}),
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
    "/metrics": Operation("get", "For Prometheus", {200: Answer("Its text format.", {METRICS: TEXT})}),
    "/openapi.json": Operation(
        "get",
        "This description",
        {200: Answer("OpenAPI 3.1.", {JSON: {"type": "object", "required": ["openapi"]}})},
        errors=(*ALWAYS, *VOLUME),
    ),
}


def operations() -> dict[str, tuple[Operation, ...]]:
    """All, by their routes."""
    return {path: (row,) for path, row in OPERATIONS.items()} | comfy.OPERATIONS


def document(engine: Engine, root: str = "") -> dict[str, Any]:
    """The description of the worker that `engine` serves, below the path `root`."""
    spec, keyed = engine.spec, bool(engine.settings.api_keys)
    scheme = {"securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}} if keyed else {}
    names = served.names(spec, engine.settings)
    refusals = {HTTPStatus(status).name: _refusal(status) for status in (401, 403, *DRAWING)}
    shapes = named({**requests(spec, engine.settings), **types(), **ANSWERS, **comfy.SHAPES})
    components = {"schemas": shapes, "headers": HEADERS, "responses": refusals}
    found = {
        "openapi": "3.1.0",
        "info": {"title": f"Kindling: {spec.id}", "version": __version__, "description": ABOUT},
        "paths": {
            path: {row.method: _operation(path, row, keyed, names) for row in rows}
            for path, rows in operations().items()
        },
        "components": components | scheme,
    }
    below = {"servers": [{"url": quote(root)}]} if root else {}
    return found | below | ({"security": [{"key": []}]} if keyed else {})


def _operation(path: str, row: Operation, keyed: bool, names: tuple[str, ...]) -> Schema:
    is_open = path in OPEN_ROUTES
    errors = [*row.errors] if is_open else [*row.errors, 401 if keyed else 403]
    found: Schema = {
        "summary": row.summary,
        "operationId": f"{row.method}{path}".translate(PLAIN),
        "parameters": [_parameter(name, names) for name in row.parameters],
        "responses": {str(status): _answer(answer) for status, answer in row.answers.items()}
        | {str(status): {"$ref": f"#/components/responses/{HTTPStatus(status).name}"} for status in sorted(errors)},
        "deprecated": row.retired,
    }
    if row.body:
        found["requestBody"] = {"required": not row.optional, "content": _content(row.body)}
    return found | ({"security": []} if is_open else {})


def _parameter(name: str, names: tuple[str, ...]) -> Schema:
    return {"name": name, "in": "header"} | ({"schema": {"enum": names}} if name == "id" else {}) | PARAMETERS[name]


def _answer(answer: Answer) -> Schema:
    found = {"description": answer.description, "headers": _headers(*EVERYWHERE, *answer.headers)}
    return found | ({"content": _content(answer.content)} if answer.content else {})


def _content(schemas: Mapping[str, Schema]) -> Schema:
    return {
        kind: {"schema": schema} | ({"encoding": FILES} if kind == multipart.MEDIA else {})
        for kind, schema in schemas.items()
    }


def _refusal(status: int) -> Schema:
    """How every error of this status is told."""
    codes = sorted({error.code for error in every(KindlingError) if error.status == status})
    return {
        "description": f"{HTTPStatus(status).phrase}: {', '.join(codes)}.",
        "headers": _headers(*EVERYWHERE, *HEADERS_OF.get(status, RETRY if status >= 429 else ())),
        "content": {JSON: {"schema": ref("Error")}},
    }


def _headers(*names: str) -> Schema:
    return {name: {"$ref": f"#/components/headers/{name}"} for name in names}
