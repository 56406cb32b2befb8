"""The ASGI app: routes, health, body limits, keys. What a route means is `api.py`'s business."""

import asyncio
import hashlib
import hmac
import json
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from dataclasses import asdict
from typing import Any, TypeVar

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from handler.api import DIALECTS, MODELS_ROUTE, RECEIPT_ROUTE, Api, OnPartial, Reply, answered, refusal
from handler.errors import (
    BodyTooLarge,
    Cancelled,
    InvalidJson,
    KindlingError,
    MethodNotAllowed,
    RequestError,
    RouteNotFound,
    SettingsError,
    Unauthorized,
)
from handler.lane import Lane
from handler.server.metrics import Metrics
from handler.server.observe import Observed, Seen
from handler.server.stream import stream

T = TypeVar("T")
PING_STATUS = {"starting": 204, "ready": 200, "failed": 503, "stopped": 503}
OPEN_ROUTES = ("/ping", "/health/live")


def create_app(lane: Lane, public: bool) -> ASGIApp:
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
        Route(MODELS_ROUTE, read),
        Route(MODELS_ROUTE + "/{id:path}", read),
        Route(RECEIPT_ROUTE, read),
        Route("/ping", ping),
        Route("/health/live", live),
        Route("/health/ready", ready),
        Route("/metrics", metrics),
    ]
    app = Starlette(routes=routes, lifespan=_lifespan, exception_handlers={HTTPException: _http_error})
    app.state.lane, app.state.metrics = lane, Metrics(lane)
    return Observed(Keys(app, settings.api_keys), routes, app.state.metrics)


@asynccontextmanager
async def _lifespan(app: Starlette) -> AsyncIterator[None]:
    app.state.lane.start()
    yield
    await asyncio.to_thread(app.state.lane.stop)


async def draw(request: Request) -> Response:
    """Any route of `DIALECTS`; as events if the body says so."""
    found = await answered(_drawn(Api(request.app.state.lane), request))
    return found if isinstance(found, Response) else _response(request.scope, found)


async def read(request: Request) -> Response:
    """The routes that only tell."""
    return _response(request.scope, await Api(request.app.state.lane).call(request.url.path))


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


class Keys:
    """Refuses requests without a known bearer key, on every route but `OPEN_ROUTES`. No keys: everyone may."""

    def __init__(self, app: ASGIApp, keys: tuple[str, ...]) -> None:
        self.app = app
        self.digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OPEN_ROUTES or not self.digests or self._known(scope):
            return await self.app(scope, receive, send)
        error = Unauthorized("Send a valid key as 'Authorization: Bearer KEY'.")
        await _response(scope, refusal(error))(scope, receive, send)

    def _known(self, scope: Scope) -> bool:
        header = dict(scope["headers"]).get(b"authorization", b"")
        scheme, _, key = header.partition(b" ")
        digest = hashlib.sha256(key.strip()).digest()
        matches = [hmac.compare_digest(digest, known) for known in self.digests]
        return scheme.lower() == b"bearer" and any(matches)


async def _drawn(api: Api, request: Request) -> Reply | Response:
    path, payload = request.url.path, decode(await _body(request, api.lane.settings.max_body_mb))
    seen: Seen = request.state.seen
    seen.prompt = payload.get("prompt") if isinstance(payload, dict) else None
    if isinstance(payload, dict) and payload.get("stream") is True:
        seen.note(refusal(Cancelled("The client went away.")))  # unless the call comes to its end

        async def call(on_partial: OnPartial) -> Reply:
            return seen.note(await api.call(path, payload, on_partial=on_partial))

        return await _while_connected(request, stream(call, DIALECTS[path].completed))
    return await _while_connected(request, api.call(path, payload))


async def _body(request: Request, limit_mb: float) -> bytes:
    """The request's body, refused as soon as it is known to be too large."""
    limit = int(limit_mb * 1e6)
    error = BodyTooLarge(f"The body may be at most {limit_mb:g} MB.")
    if int(request.headers.get("content-length", "0")) > limit:
        raise error
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise error
    return bytes(body)


def decode(body: bytes) -> Any:
    """Strict JSON: no NaN or Infinity, no key twice."""

    def constant(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a key appears twice")
        return found

    try:
        return json.loads(body, parse_constant=constant, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
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
    return _response(request.scope, Reply(reply.status, reply.body, {**reply.headers, **(error.headers or {})}))


def _response(scope: Scope, reply: Reply) -> Response:
    seen: Seen = scope["state"]["seen"]
    seen.note(reply)
    return JSONResponse(reply.body, reply.status, reply.headers)
