"""What drawing several pictures at once gains, measured through an engine."""

import asyncio
import threading
import time

from handler.core.recipe import MOST, Recipe
from handler.core.request import MIN_SIDE, ImageRequest
from handler.engine.batching import COUNTS, PAYS, room
from handler.engine.engine import Engine
from handler.volume.receipts import Gains

SIDES = (128, 256, 512)  # pixels; larger pictures keep any device busy one by one
ROUNDS = 2  # the better one counts: whatever disturbs makes it worse
WAIT_S = 600.0


async def gains(engine: Engine) -> Gains:
    """Pictures a second of so many at once, divided by those of one by one; up to the first size that gains nothing."""
    found: dict[str, dict[str, float]] = {}
    for side in SIDES:
        counts = [count for count in COUNTS if count <= room((side, side))]
        rounds = [{count: await _rate(engine, side, count) for count in counts} for _ in range(ROUNDS)]
        rates = {count: max(rates[count] for rates in rounds) for count in counts}
        times = {str(count): round(rates[count] / rates[1], 3) for count in counts[1:]}
        found[f"{side}x{side}"] = times
        if max(times.values()) < PAYS:
            break
    return found


async def _rate(engine: Engine, side: int, count: int) -> float:
    """Pictures a second with `count` at once. All wait already when the first begins."""
    engine.batch, gate = count, threading.Event()
    plug = asyncio.create_task(engine.submit(_recipe(engine, MIN_SIDE, 0), lambda *_: _open(gate)))
    while not (engine.drawing or plug.done()):
        await asyncio.sleep(0)
    if plug.done():
        await plug  # it could not even begin: its reason is that of all
    tasks = [asyncio.create_task(engine.submit(_recipe(engine, side, seed))) for seed in range(MOST)]
    await asyncio.sleep(0)
    gate.set()
    await plug
    begun = time.perf_counter()
    await asyncio.gather(*tasks)
    return MOST / (time.perf_counter() - begun)


def _open(gate: threading.Event) -> None:
    gate.wait(WAIT_S)


def _recipe(engine: Engine, side: int, seed: int) -> Recipe:
    request = ImageRequest(prompt="a red circle on a blue background", width=side, height=side, seed=seed)
    return engine.spec.recipe(request)
