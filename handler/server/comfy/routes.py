"""ComfyUI's routes, each also below /api: what they read of a request, and how they answer. What they mean is the
business of `handler/api/comfy/`."""

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route, WebSocketRoute

from handler.api.comfy import history
from handler.api.comfy.job import Job, summary
from handler.api.comfy.refusals import reply
from handler.api.comfy.served import choices, classes
from handler.api.comfy.service import Comfy
from handler.api.comfy.stats import features, system
from handler.api.dialects.comfy.plan import Served
from handler.core.errors import FileMissing, InvalidType, InvalidValue, KindlingError
from handler.core.tracebacks import let_go
from handler.server import bodies
from handler.server.access import JOBS, response
from handler.server.comfy import files
from handler.server.comfy.socket import listen
from handler.server.patience import until
from handler.server.record import Seen
from handler.server.watching import watched

Handler = Callable[[Request], Awaitable[Any]]


def routes(more: Mapping[str, Mapping[str, Handler]]) -> list[BaseRoute]:
    """All of them, and `more`, without a prefix and with /api."""
    found: list[BaseRoute] = []
    for prefix in ("", "/api"):
        for path, methods in {**ROUTES, **more}.items():
            if prefix or not path.startswith("/api/"):
                found.append(Route(prefix + path.removeprefix("/api"), answering(methods), methods=[*methods]))
        found.append(WebSocketRoute(prefix + "/ws", listen))
    return found


def answering(methods: Mapping[str, Handler]) -> Callable[[Request], Awaitable[Response]]:
    """One route: its methods' handlers, whose errors are told as ComfyUI tells them."""

    async def answer(request: Request) -> Response:
        try:
            found = await methods["GET" if request.method == "HEAD" else request.method](request)
        except KindlingError as error:
            let_go(error)
            return response(request.scope, reply(error))
        if isinstance(found, Response):
            return found
        data = await asyncio.to_thread(json.dumps, found)  # a history may be long
        return Response(data, media_type="application/json")

    return answer


async def _body(request: Request) -> dict[str, Any]:
    """What is sent as JSON; an object. Where nothing is, an empty one."""
    data = await bodies.read(request, "text/plain")  # as fetch and aiohttp call a text
    found = await bodies.understood(bodies.decode_loosely, data or b"{}", until(request))
    if not isinstance(found, dict):
        raise InvalidType("The body should be a JSON object.")
    return found


def _comfy(request: Request) -> Comfy:
    found: Comfy = request.app.state.comfy
    return found


async def post_prompt(request: Request) -> Any:
    """Accept a prompt. What comes after this answer is told by websocket, and found in the history."""
    comfy, seen, deadline = _comfy(request), request.state.seen, until(request)
    comfy.api.require_open(deadline)  # before anything is read
    seen.leave = comfy.api.engine.queue.places.take()
    return await comfy.post(await _body(request), deadline, partial(_ended, request, seen))


def _ended(request: Request, seen: Seen, job: Job, error: KindlingError | None) -> None:
    """A prompt is over: it is counted, traced and logged as one request to a route of its own."""
    status = error.status if error else 200
    later = Seen(seen.id, JOBS, seen.start, seen.admitted, begun=time.perf_counter(), status=status)
    later.reason = error.code if error else ""
    later.prompt, later.pictures = job.plan.outputs[0].request.prompt, tuple(job.pictures)
    request.app.state.ended(request.scope, later)


async def get_prompt(request: Request) -> Any:
    """How much waits."""
    return _comfy(request).remaining()


async def get_queue(request: Request) -> Any:
    """What waits and what is drawn."""
    return history.queue(_comfy(request))


async def post_queue(request: Request) -> Any:
    """Take prompts from the queue."""
    body = await _body(request)
    if body.get("clear"):
        history.take(_comfy(request), None)
    history.take(_comfy(request), _ids(body, "delete"))
    return Response()


async def get_history(request: Request) -> Any:
    """Prompts that have ended."""
    query = request.query_params
    most = _number(query, "max_items", None, 0)
    return await history.history(_comfy(request), most, _number(query, "offset", -1, -1) or 0)


async def get_one(request: Request) -> Any:
    """A prompt that has ended."""
    return await history.one(_comfy(request), request.path_params["prompt_id"])


async def post_history(request: Request) -> Any:
    """Remove what has ended."""
    body = await _body(request)
    ids = _ids(body, "delete")
    if body.get("clear"):
        await history.forget(_comfy(request), None)
    elif ids:
        await history.forget(_comfy(request), ids)
    return Response()


async def post_interrupt(request: Request) -> Any:
    """Stop what is drawn, or one prompt."""
    prompt_id = (await _body(request)).get("prompt_id")
    history.interrupt(_comfy(request), prompt_id if isinstance(prompt_id, str) and prompt_id else None)
    return Response()


async def post_free(request: Request) -> Any:
    """ComfyUI unloads its models then. A worker here has one, and keeps it warm."""
    await _body(request)
    return Response()


async def get_jobs(request: Request) -> Any:
    """A page of prompts, in whatever state."""
    query = request.query_params
    states = tuple(filter(None, query.get("status", "").split(",")))
    most = _number(query, "limit", history.PAGE, 1) or 1
    newest = query.get("sort_order", "desc") != "asc"
    page = (min(most, history.PAGE), _number(query, "offset", 0, 0) or 0)
    return await history.jobs(_comfy(request), states, *page, newest)


async def get_job(request: Request) -> Any:
    """One prompt, in whatever state."""
    record = await history.found(_comfy(request), request.path_params["prompt_id"])
    if record is None:
        raise FileMissing("There is no such job.", "job_id")
    return summary(record, whole=True)


async def cancel_job(request: Request) -> Any:
    """Stop one prompt; whether there was anything to stop."""
    return {"cancelled": history.cancelled(_comfy(request), [request.path_params["prompt_id"]])}


async def cancel_jobs(request: Request) -> Any:
    """Stop some."""
    return {"cancelled": history.cancelled(_comfy(request), _ids(await _body(request), "job_ids"))}


async def get_system(request: Request) -> Any:
    """The machine."""
    return await watched(partial(system, _comfy(request).api.engine), request)


async def get_features(request: Request) -> Any:
    """What this server can."""
    return features(_comfy(request).api.engine.settings)


async def _served(request: Request) -> Served:
    return await _comfy(request).served(until(request))


async def get_classes(request: Request) -> Any:
    """Every class of nodes that a prompt may have, or one, with its inputs."""
    found: dict[str, Any] = await asyncio.to_thread(classes, await _served(request))
    name = request.path_params.get("node_class")
    return found if name is None else {name: found[name]} if name in found else {}


async def get_models(request: Request) -> Any:
    """The folders of models, or the files of one."""
    served = await _served(request)
    folder = request.path_params.get("folder")
    if folder is None:
        return [name for name in served.files if name != "input"]
    if folder not in served.files:
        raise FileMissing(f"There is no folder {folder:.80} here.")
    return choices(folder, served)


async def get_embeddings(request: Request) -> Any:
    """The embeddings that a prompt may name."""
    served = await _served(request)
    return [name.rpartition(".")[0] or name for name in served.files.get("embeddings", ())]


def _ids(body: Mapping[str, Any], name: str) -> list[str]:
    found = body.get(name) or []
    if not isinstance(found, list):
        raise InvalidType(f"{name} should be a list of ids.", name)
    return [prompt_id for prompt_id in found if isinstance(prompt_id, str)]


def _number(query: Mapping[str, str], name: str, default: int | None, least: int) -> int | None:
    said = query.get(name)
    if said is None:
        return default
    if not said.removeprefix("-").isdecimal() or len(said) > 9 or int(said) < least:
        raise InvalidValue(f"{name} should be a whole number, at least {least}.", name)
    return int(said)


ROUTES: dict[str, dict[str, Handler]] = {
    "/prompt": {"GET": get_prompt, "POST": post_prompt},
    "/queue": {"GET": get_queue, "POST": post_queue},
    "/history": {"GET": get_history, "POST": post_history},
    "/history/{prompt_id}": {"GET": get_one},
    "/view": {"GET": files.view},
    "/upload/image": {"POST": files.upload_image},
    "/upload/mask": {"POST": files.upload_mask},
    "/interrupt": {"POST": post_interrupt},
    "/free": {"POST": post_free},
    "/system_stats": {"GET": get_system},
    "/object_info": {"GET": get_classes},
    "/object_info/{node_class}": {"GET": get_classes},
    "/models": {"GET": get_models},
    "/models/{folder}": {"GET": get_models},
    "/embeddings": {"GET": get_embeddings},
    "/features": {"GET": get_features},
    "/api/jobs": {"GET": get_jobs},
    "/api/jobs/cancel": {"POST": cancel_jobs},
    "/api/jobs/{prompt_id}": {"GET": get_job},
    "/api/jobs/{prompt_id}/cancel": {"POST": cancel_job},
}
