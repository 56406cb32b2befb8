"""The routes of kept workflows: listed, kept, shown, forgotten. One is drawn as any other route draws."""

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from handler.api.dispatch import Api
from handler.api.reply import Reply, answered
from handler.api.workflows.service import ROUTE
from handler.server import bodies
from handler.server.access import WORKFLOW, response
from handler.server.patience import until

Handler = Callable[[Request], Awaitable[Response]]


def routes(draw: Handler) -> list[BaseRoute]:
    """Both; `draw` answers what draws."""
    either: dict[str, Handler] = {"GET": listed, "HEAD": listed, "POST": draw}
    methods: dict[str, Handler] = {"GET": show, "HEAD": show, "PUT": put, "DELETE": remove, "POST": draw}

    async def all_(request: Request) -> Response:
        return await either[request.method](request)

    async def one(request: Request) -> Response:
        return await methods[request.method](request)

    return [Route(ROUTE, all_, methods=[*either]), Route(WORKFLOW, one, methods=[*methods])]


async def listed(request: Request) -> Response:
    """All, with their fields, and whether this worker can draw them."""
    return await _answer(request, lambda api: api.workflows.listed(until(request)), lambda found: {"workflows": found})


async def show(request: Request) -> Response:
    """One, with its graph."""
    return await _answer(request, lambda api: api.workflows.one(_name(request), until(request)))


async def put(request: Request) -> Response:
    """Keep the file that is sent."""
    found = await answered(_kept(request))
    if isinstance(found, Reply):
        return response(request.scope, found)
    told, fresh = found
    return JSONResponse(told, 201 if fresh else 200)


async def remove(request: Request) -> Response:
    """Forget one."""
    found = await answered(_removed(request))
    return response(request.scope, found) if isinstance(found, Reply) else Response(status_code=204)


async def _removed(request: Request) -> None:
    await _api(request).workflows.remove(_name(request), until(request))


async def _kept(request: Request) -> tuple[dict[str, Any], bool]:
    api = _api(request)
    return await api.workflows.put(_name(request), await bodies.read(request, *bodies.GRAPHS), until(request))


async def _answer(
    request: Request, look: Callable[[Api], Awaitable[Any]], shape: Callable[[Any], Any] = lambda found: found
) -> Response:
    async def work() -> Any:
        return await look(_api(request))

    found = await answered(work())
    if isinstance(found, Reply):
        return response(request.scope, found)
    return await asyncio.to_thread(partial(JSONResponse, shape(found)))


def _api(request: Request) -> Api:
    found: Api = request.app.state.api
    return found


def _name(request: Request) -> str:
    name: str = request.path_params["name"]
    return name
