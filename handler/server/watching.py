"""What people and Prometheus are told of this worker. A GPU is asked for it, which may take its time, or for ever."""

from collections.abc import Callable
from functools import partial
from typing import TypeVar

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from handler.api.hands import Hands
from handler.api.loras import looked
from handler.api.reply import Reply, answered
from handler.server.access import response
from handler.server.health import told
from handler.server.patience import until

T = TypeVar("T")
SLOW = "The GPU did not say in time how it is. GET /health tells whether the worker answers at all."
LOOK_S = 10.0  # as long as Prometheus waits
_hands = Hands(2, 2, "status")  # others' threads are not kept by it


async def status(request: Request) -> Response:
    """All of `told`, whatever it is."""
    found = await answered(watched(partial(told, request.app.state.engine), request))
    return response(request.scope, found) if isinstance(found, Reply) else JSONResponse(found)


async def metrics(request: Request) -> Response:
    """For Prometheus."""
    found = await answered(watched(request.app.state.metrics.text, request))
    if isinstance(found, Reply):
        return response(request.scope, found)
    return Response(found, media_type=CONTENT_TYPE_LATEST)


async def watched(look: Callable[[], T], request: Request) -> T:
    """What `look`, which asks the GPU, gives in `LOOK_S` or the request's own time; else DeadlineExceeded."""
    deadline = until(request)
    deadline.no_later(LOOK_S)
    return await looked(look, deadline, _hands, SLOW)
