"""`POST /explain`: what a file of ComfyUI's means to this worker, before anything is drawn."""

import asyncio
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.routing import BaseRoute, Route

from handler.api.comfy.service import Comfy
from handler.api.decoding import perhaps
from handler.api.dialects.comfy.plan import Load, Served
from handler.model.hardware import expected
from handler.server import bodies
from handler.server.comfy.routes import answering
from handler.server.mounted import base
from handler.server.patience import until

PATH = "/explain"


def routes() -> list[BaseRoute]:
    """Without a prefix and with /api, as ComfyUI's are."""
    return [Route(start + PATH, answering({"POST": post_explain}), methods=["POST"]) for start in ("", "/api")]


async def post_explain(request: Request) -> Any:
    """The report, judged on the worker that serves here. The body is the file as it is."""
    comfy: Comfy = request.app.state.comfy
    deadline = until(request)
    data = await bodies.read(request, *bodies.GRAPHS)
    served = await comfy.served(deadline)
    load = partial(comfy.archive.held, asyncio.get_running_loop(), deadline)
    url = base(request.scope, comfy.api.engine.settings)
    one: asyncio.Semaphore = request.app.state.explaining
    await deadline.hold(one.acquire())
    try:
        return await perhaps(partial(_told, comfy, data, served, load, url), deadline)
    finally:
        one.release()


def _told(comfy: Comfy, data: bytes, served: Served, load: Load, url: str) -> dict[str, Any]:
    from handler.api.comfy.explaining import explain  # late: most workers never see a graph
    from handler.api.comfy.foretelling import Machine
    from handler.api.comfy.grounds import Ground
    from handler.api.dialects.comfy.opening import opened

    engine = comfy.api.engine
    worker = engine.worker
    machine = Machine(worker.hardware, worker.receipt) if worker else Machine(expected(engine.settings))
    ground = Ground(engine.settings, engine.spec, machine, load, served.files, running=True, url=url)
    file = opened(data)
    report = explain(file, ground).told()
    return report | {"graph": file.graph, **comfy.api.workflows.draft(file.graph, served)}
