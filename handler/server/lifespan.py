"""How an app begins and ends that is served by itself: it starts its engine, and at the end draws what it accepted."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.applications import Starlette

from handler.core.deadline import DRAIN_S, EXIT_S
from handler.engine.engine import Engine

TICK_S = 0.1


@asynccontextmanager
async def lifespan(app: Starlette) -> AsyncIterator[None]:
    """The engine is the app's own unless somebody has started it before."""
    engine: Engine = app.state.engine
    if owned := not engine.begun:
        engine.start()
    yield
    if owned:
        await _drained(app)
    closing = [*([engine.stop] if owned else []), *([app.state.traces.close] if app.state.traces else [])]
    await asyncio.gather(*map(asyncio.to_thread, closing))


async def _drained(app: Starlette) -> None:
    """Let what was accepted be drawn, for `DRAIN_S` after the first word to leave; what comes then is refused."""
    engine, jobs, prompts = app.state.engine, app.state.jobs, app.state.comfy
    engine.drain()
    while (engine.busy or jobs.busy or prompts.busy) and engine.exit.left_s > EXIT_S - DRAIN_S:
        await asyncio.sleep(TICK_S)
