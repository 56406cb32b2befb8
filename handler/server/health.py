"""How this worker is, for who watches over it."""

import asyncio
from dataclasses import asdict
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from handler.engine.engine import Engine
from handler.server.metrics import machine

PING_STATUS = {"starting": 204, "ready": 200, "draining": 503, "stopped": 503, "failed": 503}


async def ping(request: Request) -> Response:
    """RunPod's health check: 204 while starting, 200 ready, 503 failed or stopping."""
    return Response(status_code=PING_STATUS[request.app.state.engine.state])


async def health(request: Request) -> Response:
    """SGLang's health check, and others': 200 ready, 503 else."""
    return Response(status_code=200 if request.app.state.engine.state == "ready" else 503)


async def live(request: Request) -> Response:
    """The process answers."""
    return JSONResponse({"status": "live"})


async def ready(request: Request) -> Response:
    """Whether the model is loaded, what the engine does, the cold-start ledger, and what all this costs."""
    engine: Engine = request.app.state.engine
    return JSONResponse(_state(engine), 200 if engine.state == "ready" else 503)


async def status(request: Request) -> Response:
    """The same and more for people who look on, whatever it is. In a thread, for a GPU may take its time to answer."""
    return JSONResponse(await asyncio.to_thread(_status, request.app.state.engine))


def _state(engine: Engine) -> dict[str, Any]:
    return {
        "status": engine.state,
        "model": engine.spec.id,
        "drawing": engine.drawing,
        "waiting": engine.waiting,
        "cold_start": asdict(engine.ledger),
        "spend": engine.meter.state(),
    }


def _status(engine: Engine) -> dict[str, Any]:
    return _state(engine) | {
        "reason": engine.error.message if engine.error else "",
        "elapsed_s": engine.ledger.total_s or round(engine.clock.elapsed, 3),
        "queue": engine.settings.queue,
        "machine": machine(engine),
    }
