"""The ASGI app: routes, health, body limits. What a route means is `api.py`'s business."""

import asyncio
import math
import re
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from dataclasses import asdict
from functools import partial
from typing import Any, TypeVar

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from handler.api import DIALECTS, MODELS_ROUTE, RECEIPT_ROUTE, RETIRED, Api, OnPartial, Reply, answered, refusal
from handler.errors import (
    BodyTooLarge,
    Cancelled,
    Internal,
    InvalidJson,
    InvalidValue,
    KindlingError,
    MethodNotAllowed,
    RequestError,
    RouteNotFound,
    SettingsError,
    UnsupportedMedia,
)
from handler.lane import Lane
from handler.server import forms
from handler.server.guard import guarded
from handler.server.metrics import Metrics
from handler.server.observe import Observed, Seen, response
from handler.server.openapi import document
from handler.server.repeats import Repeats, key_of
from handler.server.stream import stream
from handler.server.traces import tracing
from handler.untrusted import Malformed, parse

T = TypeVar("T")
JSON = ("application/json", "application/x-www-form-urlencoded", "")  # the second is curl's and urllib's, unless told
FORMS = ("/v1/images/edits",)
DEADLINE, SECONDS = "x-deadline-s", re.compile(r"\d{1,9}(\.\d{1,9})?")
PING_STATUS = {"starting": 204, "ready": 200, "draining": 503, "stopped": 503, "failed": 503}


def create_app(lane: Lane, public: bool) -> Observed:
    """The app over `lane`, which it starts and stops. `public`: reachable by others, so keys are required."""
    settings = lane.settings
    if public and not settings.api_keys and not settings.allow_open:
        raise SettingsError(
            "This address can be reached by others: set KINDLING_API_KEYS, or KINDLING_ALLOW_OPEN=true to serve "
            "everyone.",
            "KINDLING_API_KEYS",
        )
    routes = [
        *(Route(path, draw, methods=["POST"]) for path in DIALECTS),
        *(Route(path, read, methods=["POST"]) for path in RETIRED),
        Route(MODELS_ROUTE, read),
        Route(MODELS_ROUTE + "/{id:path}", read),
        Route(RECEIPT_ROUTE, read),
        Route("/ping", ping),
        Route("/health/live", live),
        Route("/health/ready", ready),
        Route("/metrics", metrics),
        Route("/openapi.json", describe),
    ]
    handlers = {HTTPException: _http_error, Exception: _crashed}
    app = Starlette(routes=routes, lifespan=_lifespan, exception_handlers=handlers)
    app.router.redirect_slashes = False
    app.state.repeats = Repeats()
    app.state.lane, app.state.metrics, app.state.traces = lane, Metrics(lane), tracing(lane.spec.id)
    return Observed(guarded(app, settings), routes, app.state.metrics, app.state.traces)


@asynccontextmanager
async def _lifespan(app: Starlette) -> AsyncIterator[None]:
    app.state.lane.start()
    yield
    await asyncio.to_thread(app.state.lane.stop)
    if app.state.traces:
        await asyncio.to_thread(app.state.traces.close)


async def draw(request: Request) -> Response:
    """Any route of `DIALECTS`; as events if the body says so."""
    found = await answered(_drawn(Api(request.app.state.lane, request.app.state.metrics.picture), request))
    return found if isinstance(found, Response) else response(request.scope, found)


async def read(request: Request) -> Response:
    """The routes that only tell."""
    return response(request.scope, await Api(request.app.state.lane).call(request.url.path))


async def ping(request: Request) -> Response:
    """RunPod's health check: 204 while starting, 200 ready, 503 failed or stopping."""
    return Response(status_code=PING_STATUS[request.app.state.lane.state])


async def live(request: Request) -> Response:
    """The process answers."""
    return JSONResponse({"status": "live"})


async def ready(request: Request) -> Response:
    """Whether the model is loaded, what the lane does, the cold-start ledger, and what all this costs."""
    lane: Lane = request.app.state.lane
    body = {
        "status": lane.state,
        "model": lane.spec.id,
        "drawing": lane.drawing,
        "waiting": lane.waiting,
        "cold_start": asdict(lane.ledger),
        "spend": lane.meter.state(),
    }
    return JSONResponse(body, 200 if lane.state == "ready" else 503)


async def metrics(request: Request) -> Response:
    """For Prometheus. In a thread, for a GPU may take its time to answer."""
    return Response(await asyncio.to_thread(request.app.state.metrics.text), media_type=CONTENT_TYPE_LATEST)


async def describe(request: Request) -> Response:
    """OpenAPI's description of all this."""
    return JSONResponse(document(request.app.state.lane))


async def _drawn(api: Api, request: Request) -> Reply | Response:
    key = key_of(request.headers)
    if key is None:  # else its picture may be there already
        api.lane.check()  # before anything is read: a crowd that has to be refused must not slow the others down
    body = await _body(request, api.lane.settings.max_body_mb)
    path, headers = request.url.path, request.headers
    form = _media(headers) == forms.MEDIA
    payload = await forms.read(headers, body) if form else decode(body)
    seen: Seen = request.state.seen
    seen.read(payload)
    streams = isinstance(payload, dict) and payload.get("stream") is True
    within_s = _patience(headers, asks_again=streams or key is not None)

    async def call(on_partial: OnPartial | None = None) -> Reply:
        start = partial(api.call, path, payload, on_partial=on_partial, within_s=within_s)
        said = repr(payload).encode() if form and key else body  # with another boundary a form is still the same
        return seen.note(await request.app.state.repeats.call(key, path.encode() + said, start))

    if not streams:
        return await _while_connected(request, call())
    seen.note(refusal(Cancelled("The client went away.")))  # unless the call comes to its end
    return await _while_connected(request, stream(call, DIALECTS[path].completed))


def _patience(headers: Headers, asks_again: bool) -> float:
    """How many seconds the caller gives us: its word, else when OpenAI's client hangs up if it has heard nothing.

    Where that hears something meanwhile, or `asks_again` for the same job, its patience is not the end.
    """
    said, hangs_up = headers.get(DEADLINE), headers.get("x-stainless-read-timeout", "")
    if said is None:
        return float(hangs_up) if SECONDS.fullmatch(hangs_up) and not asks_again else math.inf
    if not SECONDS.fullmatch(said) or not float(said):
        raise InvalidValue(f"{DEADLINE} should be seconds, such as 30 or 2.5.", DEADLINE)
    return float(said)


async def _body(request: Request, limit_mb: float) -> bytes:
    """The request's body, refused as soon as it is known to be too large, or to be neither JSON nor a form."""
    _check_media(request.headers, JSON if request.url.path not in FORMS else (*JSON, forms.MEDIA))
    limit = int(limit_mb * 1e6)
    error = BodyTooLarge(f"The body may be at most {limit_mb:g} MB.")
    if int(request.headers.get("content-length", "0")) > limit:
        raise error
    body = bytearray()
    try:
        async for chunk in request.stream():
            body += chunk
            if len(body) > limit:
                raise error
    except ClientDisconnect:
        raise Cancelled("The client went away.") from None
    return bytes(body)


def _check_media(headers: Headers, allowed: tuple[str, ...]) -> None:
    coding = headers.get("content-encoding") or "identity"
    if coding.lower() != "identity":
        raise UnsupportedMedia(f"Content-Encoding '{coding:.40}' is not understood here; send the body as it is.")
    if _media(headers) not in allowed:
        other = f", or as {forms.MEDIA}" if forms.MEDIA in allowed else ""
        raise UnsupportedMedia(f"Send the body as JSON, with the header 'Content-Type: application/json'{other}.")


def _media(headers: Headers) -> str:
    return headers.get("content-type", "").partition(";")[0].strip().lower()


def decode(body: bytes) -> Any:
    """Strict JSON: no NaN or Infinity, no key twice. 7.0 is a whole number, as it is in JSON Schema."""

    def number(text: str) -> float:
        return int(value) if (value := float(text)).is_integer() else value

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise Malformed("a key appears twice")
        return found

    try:
        return parse(body, number, unique)
    except Malformed as error:
        raise InvalidJson(f"The body is not valid JSON: {error}") from None


async def _while_connected(request: Request, work: Awaitable[T]) -> T:
    """Await `work`, but cancel it when the client goes away."""
    task = asyncio.ensure_future(work)
    gone = asyncio.create_task(_disconnected(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Cancelled("The client went away.")
        return task.result()
    finally:
        task.cancel()
        gone.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _http_error(request: Request, error: Exception) -> Response:
    """Starlette's own refusals in OpenAI's envelope."""
    assert isinstance(error, HTTPException)
    path = request.url.path
    refusals: dict[int, KindlingError] = {
        404: RouteNotFound(f"There is no route {path}."),
        405: MethodNotAllowed(f"{request.method} is not allowed on {path}."),
    }
    reply = refusal(refusals.get(error.status_code, RequestError(error.detail)))
    return response(request.scope, Reply(reply.status, reply.body, {**reply.headers, **(error.headers or {})}))


async def _crashed(request: Request, error: Exception) -> Response:
    """A bug in a route, which the server logs; or a client that left while it was answered, which was noted before."""
    if isinstance(error, ClientDisconnect):
        return Response(status_code=Cancelled.status)
    return response(request.scope, refusal(Internal("Something went wrong on our side; the log has the details.")))
