"""The OpenAPI description of one worker: what it serves, with what this model takes."""

import json
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any
from urllib.parse import quote

from handler.api.dispatch import TOKENS
from handler.api.links import LINKS_ROUTE
from handler.api.workflows.mapping import MODEL
from handler.core.errors import KindlingError
from handler.core.version import __version__
from handler.engine.engine import Engine
from handler.server import multipart
from handler.server.auth import DEFAULTS, OPEN_ROUTES
from handler.server.idempotency import HEADER, KEY
from handler.server.keys import ADMIN
from handler.server.openapi import comfy, deployments, jobs, workflows
from handler.server.openapi.named import named
from handler.server.openapi.operation import JSON, Answer, Operation
from handler.server.openapi.operations import DRAWING, called, every, operations
from handler.server.openapi.requests import requests
from handler.server.openapi.responses import ANSWERS, types
from handler.server.openapi.schema import TEXT, Schema, ref, whole
from handler.server.patience import DEADLINE, HANGS_UP, SECONDS
from handler.volume.adapters import names

ABOUT = (
    "Errors have OpenAI's envelope. Every answer has an x-request-id, and HEAD is answered where GET is. "
    "Limits are those of the model that is served, of several those of the first: /v1/models/NAME has each one's. "
    "ComfyUI's routes are below /api too."
)
FILES = {
    name: {"contentType": "image/png, image/jpeg, image/webp, image/avif, image/heic"} for name in ("image", "mask")
}

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
    "x-seed": {"schema": TEXT, "description": "Of a picture that is sent as it is: send it again for the same one."},
    "x-model": {"schema": TEXT, "description": "Which model drew a picture that is sent as it is."},
    "x-inference-ms": {"schema": TEXT, "description": "How long that took."},
    "www-authenticate": {"required": True, "schema": TEXT},
    **jobs.HEADERS,
    "x-accel-buffering": {"schema": {"enum": ["no"]}, "description": "Of a stream, which nginx should not hold back."},
    **{name: {"required": True, "schema": {"enum": [value]}} for name, value in DEFAULTS.items()},
}
EVERYWHERE = ("x-request-id", *DEFAULTS)
RETRY = ("retry-after", "x-should-retry")
HEADERS_OF = {401: ("www-authenticate",), 405: ("allow",)}  # and `RETRY` where trying again is a question
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
    **deployments.PARAMETERS,
    **workflows.PARAMETERS,
    **jobs.PARAMETERS,
    "traceparent": {"schema": TEXT, "description": "The caller's span, where the worker sends traces (W3C)."},
}
PLAIN = str.maketrans("/.", "__", "{}")


class Description:
    """`document` as JSON, made anew where what it depends on has changed: that takes a tenth of a second."""

    def __init__(self, engine: Engine, models: Sequence[str]) -> None:
        self._engine, self._models = engine, models
        self._made = (b"", b"")

    def text(self, root: str, kept: Sequence[Mapping[str, Any]]) -> bytes:
        """For a thread: it looks at the volume."""
        known = json.dumps([root, kept, names(self._engine.settings.volume)]).encode()
        if (made := self._made)[0] != known:  # another thread may make another meanwhile
            self._made = made = (
                known,
                json.dumps(document(self._engine, self._models, root, kept), separators=(",", ":")).encode(),
            )
        return made[1]


def document(
    engine: Engine, models: Sequence[str], root: str = "", kept: Sequence[Mapping[str, Any]] = ()
) -> dict[str, Any]:
    """The description of what `engine` serves by the names of `models`, below the path `root`; `kept` are workflows."""
    spec, keyed = engine.spec, bool(engine.settings.api_keys)
    scheme = {"securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}} if keyed else {}
    models = (*models, *(f"{MODEL}{one['name']}" for one in kept if one["drawable"]))
    refusals = {HTTPStatus(status).name: _refusal(status) for status in (401, 403, *DRAWING)}
    types_ = types()
    explained = {"Explained": whole(types_["Report"]["properties"] | workflows.EXPLAINED)}
    shapes = named(
        {
            **requests(spec, engine.settings, models),
            **types_,
            **ANSWERS,
            **workflows.ANSWERS,
            **comfy.SHAPES,
            **deployments.SHAPES,
            **explained,
        }
        | workflows.bodies(kept, spec, engine.settings)
    )
    own = {
        f"{workflows.LIST}/{one['name']}": (*workflows.rows(one["name"]), called(*workflows.described(one)))
        for one in kept
        if one["drawable"]
    }
    components = {"schemas": shapes, "headers": HEADERS, "responses": refusals}
    found = {
        "openapi": "3.1.0",
        "info": {"title": f"Kindling: {spec.id}", "version": __version__, "description": ABOUT},
        "paths": {
            path: {row.method: _operation(path, row, keyed, models) for row in rows}
            for path, rows in (operations() | own).items()
        },
        "components": components | scheme,
    }
    below = {"servers": [{"url": quote(root)}]} if root else {}
    return found | below | ({"security": [{"key": []}]} if keyed else {})


def _operation(path: str, row: Operation, keyed: bool, models: tuple[str, ...]) -> Schema:
    is_open = path in OPEN_ROUTES or (keyed and path == LINKS_ROUTE)
    guards = [] if is_open else [403] if not keyed else [401, 403] if path in ADMIN else [401]
    errors = {*row.errors, *guards}
    found: Schema = {
        "summary": row.summary,
        "operationId": f"{row.method}{path}".translate(PLAIN),
        "parameters": [_parameter(name, models) for name in row.parameters],
        "responses": {str(status): _answer(answer) for status, answer in row.answers.items()}
        | {str(status): {"$ref": f"#/components/responses/{HTTPStatus(status).name}"} for status in sorted(errors)},
        "deprecated": row.retired,
    }
    if row.body:
        found["requestBody"] = {"required": not row.optional, "content": _content(row.body)}
    return found | ({"security": []} if is_open else {})


def _parameter(name: str, models: tuple[str, ...]) -> Schema:
    return {"name": name, "in": "header"} | ({"schema": {"enum": models}} if name == "id" else {}) | PARAMETERS[name]


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
    """Of what a header is in most answers, and what it is in some, the latter."""
    return {name.removesuffix("-private"): {"$ref": f"#/components/headers/{name}"} for name in names}
