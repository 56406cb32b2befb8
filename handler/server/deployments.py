"""The routes of deployments: what can be chosen, and what one choice comes to."""

from collections.abc import Callable
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from handler.api.deploying import asking
from handler.api.dispatch import Api
from handler.api.loras import looked
from handler.api.reply import Reply, answered
from handler.server.access import response
from handler.server.patience import until

ONE = f"{asking.ROUTE}/{{platform}}"


def routes() -> list[BaseRoute]:
    """Both, which only tell."""
    return [Route(asking.ROUTE, choices), Route(ONE, deployment)]


async def choices(request: Request) -> Response:
    """The platforms with their GPUs, the models and the precisions."""
    return JSONResponse(asking.choices())


async def deployment(request: Request) -> Response:
    """Commands and files, with what to expect. It looks at the volume, for what was measured of the like."""
    api: Api = request.app.state.api
    fields = dict(request.query_params)
    look = partial(asking.asked, request.path_params["platform"], fields, api.engine.settings)
    found = await answered(_looked(look, request))
    return response(request.scope, found) if isinstance(found, Reply) else JSONResponse(found)


async def _looked(look: Callable[[], dict[str, Any]], request: Request) -> dict[str, Any]:
    return await looked(look, until(request))
