"""The ASGI app: routes and health. What a route means is the business of `api/dispatch.py`."""

import asyncio
import logging
import re
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import BaseRoute, Route

from handler.api.comfy.service import Comfy
from handler.api.dialects import fal, huggingface
from handler.api.dialects.routes import DIALECTS, dialect_of
from handler.api.dispatch import MODEL_INFO_ROUTE, MODELS_ROUTE, RECEIPT_ROUTE, RETIRED, Api
from handler.api.jobs.job import JOBS_ROUTE
from handler.api.jobs.service import Jobs
from handler.api.links import LINKS_ROUTE, Links
from handler.api.loras import looked
from handler.api.reply import Reply, answered, error_reply
from handler.api.showing import OnPartial
from handler.core.deadline import Deadline, before
from handler.core.errors import (
    Cancelled,
    Internal,
    KindlingError,
    MethodNotAllowed,
    RequestError,
    RouteNotFound,
    SettingsError,
)
from handler.core.settings import Settings
from handler.engine.engine import Engine
from handler.server import accept, bodies, multipart
from handler.server.access import JSON, Answering, Around, Observed, response
from handler.server.auth import guarded, wants_page
from handler.server.comfy import editor
from handler.server.comfy.desk import Desk
from handler.server.comfy.explaining import routes as explain_routes
from handler.server.comfy.routes import routes as comfy_routes
from handler.server.deployments import routes as deployment_routes
from handler.server.health import PROBES, probe, ready
from handler.server.idempotency import Repeats, fingerprint, key_of
from handler.server.jobs import Later, cancel_job, get_job, hear_job, posted
from handler.server.keys import weak
from handler.server.lifespan import lifespan
from handler.server.links import content
from handler.server.metrics import Metrics
from handler.server.mounted import base
from handler.server.openapi.document import Description
from handler.server.patience import HANGS_UP, SECONDS, until
from handler.server.playground import page
from handler.server.record import Seen
from handler.server.room import Room
from handler.server.signposts import PAGE, WELCOME, lost
from handler.server.sse import stream, wanted
from handler.server.traces import tracing
from handler.server.watching import metrics, status
from handler.server.workflows import routes as workflow_routes

T = TypeVar("T")


def create_app(
    engine: Engine, public: bool = True, api: Callable[..., Api] = Api, around: Around = Answering
) -> Observed:
    """The app over `engine`, to be served or mounted. `public`: others reach it, so it wants keys or allow_open.

    `api` makes its `Api`, as that does itself. `around` is for what its server may cancel.
    """
    settings = engine.settings
    if public and not settings.api_keys and not settings.allow_open:
        raise SettingsError(
            "This address can be reached by others: set KINDLING_API_KEYS, or KINDLING_ALLOW_OPEN=true to serve "
            "everyone.",
            "KINDLING_API_KEYS",
        )
    if settings.admin_keys and not settings.api_keys:
        told = "KINDLING_ADMIN_KEYS guard nothing while everybody may ask: set KINDLING_API_KEYS, too."
        raise SettingsError(told, "KINDLING_API_KEYS")
    if told := weak(settings):
        logging.getLogger("kindling").warning("%s", told)
    routes = _routes(settings)
    app = Starlette(routes=routes, lifespan=lifespan, exception_handlers=HANDLERS)
    app.router.redirect_slashes = False
    app.state.repeats = Repeats(engine.late)
    app.state.engine, app.state.metrics, app.state.traces = engine, Metrics(engine), tracing(engine.spec.id)
    app.state.api = api(engine, app.state.metrics.picture, app.state.metrics.uploaded, Links(settings))
    app.state.comfy, app.state.jobs = Comfy(app.state.api), Jobs(app.state.api)
    app.state.room, app.state.description = Room(settings), Description(engine, app.state.api.names())
    app.state.explaining = asyncio.Semaphore(1)  # at a time: one may take seconds of a processor that drawing needs
    gate = guarded(around(app), settings)
    observed = Observed(
        gate, routes, app.state.metrics, app.state.traces, app.state.comfy, app.state.jobs, app.state.room
    )
    app.state.ended = observed.ended
    return observed


def _routes(settings: Settings) -> list[BaseRoute]:
    """All: our own, and ComfyUI's."""
    return [
        *(Route(path, draw, methods=["POST"]) for path in DIALECTS),
        *(Route(path, read, methods=["POST"]) for path in RETIRED),
        Route(MODELS_ROUTE, read),
        Route(MODELS_ROUTE + "/{id:path}", read),
        Route(RECEIPT_ROUTE, read),
        Route(MODEL_INFO_ROUTE, read),
        Route(LINKS_ROUTE, content),
        Route(JOBS_ROUTE + "/{job_id}", get_job),
        Route(JOBS_ROUTE + "/{job_id}/cancel", cancel_job, methods=["POST"]),
        Route(JOBS_ROUTE + "/{job_id}/events", hear_job),
        Route("/", home, methods=["GET", "POST"]),
        *(Route(path, probe(path)) for path in PROBES),
        Route("/health/ready", ready),
        Route("/v1/status", status),
        Route("/metrics", metrics),
        Route("/openapi.json", describe),
        *workflow_routes(draw),
        *deployment_routes(),
        *comfy_routes(Desk().routes() if settings.comfy_ui else {}),
        Route("/models/{folder:path}", draw, methods=["POST"]),  # behind ComfyUI's, which only reads
        Route("/fal/{id:path}", draw, methods=["POST"]),
        *explain_routes(),
        *page.routes(),
        *(editor.routes(editor.page()) if settings.comfy_ui else ()),
    ]


async def draw(request: Request) -> Response:
    """Any route that draws; as events if the body says so, as a picture if the head does."""
    found = await answered(_drawn(request.app.state.api, request))
    return found if isinstance(found, Response) else response(request.scope, found)


async def read(request: Request) -> Response:
    """The routes that only tell."""
    return response(request.scope, await request.app.state.api.call(request.url.path))


async def home(request: Request) -> Response:
    """Who serves here, for people; the playground for a browser; a picture for Hugging Face's client."""
    if request.method == "POST":
        return await draw(request)
    if wants_page(request.scope):
        return page.index(request)
    engine: Engine = request.app.state.engine
    editor = PAGE if engine.settings.comfy_ui else ""
    return PlainTextResponse(WELCOME.format(model=engine.spec.id, editor=editor), headers={"vary": "accept"})


async def describe(request: Request) -> Response:
    """OpenAPI's description of all this, which looks at the volume."""
    found = await answered(_description(request))
    return response(request.scope, found) if isinstance(found, Reply) else Response(found, media_type=JSON)


async def _description(request: Request) -> bytes:
    state, deadline = request.app.state, until(request)
    kept = await state.api.workflows.listed(deadline)
    return await looked(partial(state.description.text, request.scope["app_root_path"], kept), deadline)


async def _drawn(api: Api, request: Request) -> Reply | Response:
    seen: Seen = request.state.seen
    path, headers, settings = request.url.path, request.headers, api.engine.settings
    repeats: Repeats = request.app.state.repeats
    key = key_of(headers)
    deadline = until(request)
    if not repeats.knows(key):  # else its picture may be there already
        api.require_open(deadline)  # before anything is read: whom it refuses must not slow the others down
        seen.leave = api.engine.queue.places.take()
    body = await bodies.read(request)
    is_form = bodies.media(headers) == multipart.MEDIA
    understand = partial(multipart.read, headers) if is_form else bodies.decode
    payload = await bodies.understood(understand, body, deadline)
    form = {**payload} if is_form and isinstance(payload, dict) else None  # with all that it says of a job
    seen.read(payload)
    later = Later.taken(request, payload)
    dialect = dialect_of(path)
    assert dialect  # or there were no such route
    hub = "parameters" if dialect is huggingface else ""  # where its choices are
    streams = wanted(payload, hub)
    forms = () if streams or later or dialect is fal else accept.forms(",".join(headers.getlist("accept")), bool(hub))
    payload = accept.asked(payload, forms, hub)
    if not (streams or later) and key is None and re.fullmatch(SECONDS, hangs_up := headers.get(HANGS_UP, "")):
        deadline.no_later(before(float(hangs_up)))  # OpenAI's client does, having heard nothing, and asks for another
    asked = await asyncio.to_thread(fingerprint, path, body, form, *forms) if key else b""
    if later:
        return await _while_connected(request, posted(request, payload, later, key, asked))

    async def call(on_partial: OnPartial | None = None) -> Reply:
        def start(deadline: Deadline) -> Awaitable[Reply]:
            where = base(request.scope, settings)
            return api.call(path, payload, on_partial=on_partial, deadline=deadline, base=where, alone=bool(forms))

        return seen.note(await repeats.call(key, asked, start, deadline))

    if not streams:
        reply = await _while_connected(request, call())
        return accept.bare(reply) if forms and reply.status == 200 else reply
    seen.note(error_reply(Cancelled("The client went away.")))  # unless the call comes to its end
    return await _while_connected(request, stream(call, dialect.completed))


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
    root, path = request.scope["app_root_path"], request.url.path
    refusals: dict[int, KindlingError] = {
        404: RouteNotFound(lost(path, [route.path for route in request.app.routes], root)),
        405: MethodNotAllowed(f"{request.method} is not allowed on {root + path:.80}."),
    }
    reply = error_reply(refusals.get(error.status_code, RequestError(error.detail)))
    return response(request.scope, Reply(reply.status, reply.body, {**reply.headers, **(error.headers or {})}))


async def _crashed(request: Request, error: Exception) -> Response:
    """A bug in a route, which the server logs; or a client that left while it was answered, which was noted before."""
    if isinstance(error, ClientDisconnect):
        return Response(status_code=Cancelled.status)
    return response(request.scope, error_reply(Internal("Something went wrong on our side; the log has the details.")))


HANDLERS = {HTTPException: _http_error, Exception: _crashed}
