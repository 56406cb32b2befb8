"""How this worker is, for who watches over it."""

from collections.abc import Awaitable, Callable
from dataclasses import asdict
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from handler.engine.engine import Engine
from handler.engine.intake import EngineState
from handler.server.metrics import machine

PING_STATUS = {"starting": 204, "ready": 200, "draining": 503, "stopped": 503, "failed": 503}
LIVE = b'{"status":"live"}'
PROBES: dict[str, Callable[[EngineState], tuple[int, bytes]]] = {  # a status and a body, which need no key
    "/ping": lambda state: (PING_STATUS[state], b""),  # RunPod's
    "/health": lambda state: (200 if state == "ready" else 503, b""),  # SGLang's, and others'
    "/health/live": lambda state: (200, LIVE),  # the process answers
}


def probe(path: str) -> Callable[[Request], Awaitable[Response]]:
    """What answers `path`, one of `PROBES`."""

    async def answer(request: Request) -> Response:
        status, body = PROBES[path](request.app.state.engine.state)
        return Response(body, status, media_type="application/json" if body else None)

    return answer


async def ready(request: Request) -> Response:
    """Whether the model is loaded, what the engine does, the cold-start ledger, and what all this costs."""
    engine: Engine = request.app.state.engine
    return JSONResponse(_state(engine), 200 if engine.state == "ready" else 503)


def _state(engine: Engine) -> dict[str, Any]:
    several = engine.workers.items()
    each = {"workers": [_worker(*one) for one in several]} if len(several) > 1 else {}
    return each | {
        "status": engine.state,
        "model": engine.spec.id,
        "drawing": engine.drawing,
        "waiting": engine.waiting,
        "cold_start": asdict(engine.ledger),
        "spend": engine.meter.state(),
    }


def _worker(name: str, engine: Engine) -> dict[str, Any]:
    """Of one of several."""
    told = engine.ledger
    own = {"worker": name, "status": engine.state, "reason": engine.error.message if engine.error else ""}
    return own | {"drawing": engine.drawing, "device": told.device, "phase": told.phase, "restarts": engine.restarts}


def told(engine: Engine) -> dict[str, Any]:
    """The same as `ready` tells and more, for people who look on. Asks the GPU, so not on an event loop."""
    return _state(engine) | {
        "reason": engine.error.message if engine.error else "",
        "elapsed_s": engine.ledger.total_s or round(engine.clock.elapsed, 3),
        "queue": engine.settings.queue,
        "machine": machine(engine),
    }
