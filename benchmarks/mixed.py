"""A long mix of good requests, bad ones and those whose clients go away: three modes of endurance.py."""

import argparse
import asyncio
import itertools
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import httpx

from serving import OPENAI, Server
from watched import SMALL, Watchdog, ask, settled

CLIENTS = 4
SIDES = range(64, 385, 32)  # of pictures of random sizes
CANCEL_S = 0.05  # at most, after sending: some of these wait then, some are being drawn
BAD: tuple[tuple[dict[str, Any] | bytes, int], ...] = (  # a body, and the status it deserves
    (b"", 400),
    (b"{", 400),
    (b"[]", 400),
    (b'"x"', 400),
    (b"\xff\xfe", 400),
    (b'{"prompt": "a", "prompt": "b"}', 400),
    (b'{"prompt": "a", "seed": NaN}', 400),
    (b"[" * 100_000, 400),
    (b'{"prompt": "a", "seed": ' + b"9" * 5_000 + b"}", 400),
    ({}, 400),
    ({"prompt": 7}, 400),
    ({"prompt": "a" * 32_001}, 422),
    ({"prompt": "a", "size": "17x17"}, 422),
    ({"prompt": "a", "size": "100000x8"}, 422),
    ({"prompt": "a", "size": "x"}, 400),
    ({"prompt": "a", "n": 11}, 422),
    ({"prompt": "a", "n": 0}, 422),
    ({"prompt": "a", "num_inference_steps": 10**9}, 422),
    ({"prompt": "a", "guidance_scale": 5}, 422),
    ({"prompt": "a", "scheduler": "magic"}, 422),
    ({"prompt": "a", "background": "transparent"}, 400),
    ({"prompt": "a", "model": "dall-e-3"}, 404),
    ({"prompt": "a", "images": ["http://127.0.0.1/x.png"]}, 400),
    ({"prompt": "a", "unheard_of": 1}, 400),
)


async def vanish(http: httpx.AsyncClient, seed: int, after: float) -> None:
    """Ask, and close the connection before the answer."""
    with suppress(asyncio.TimeoutError, httpx.HTTPError):
        async with asyncio.timeout(after):
            await http.post(OPENAI, json=SMALL | {"seed": seed})


async def disconnects(server: Server, watch: Watchdog, options: argparse.Namespace) -> dict[str, Any]:
    """200 at once; then the engine is empty and draws the same picture as before."""
    rng = random.Random(2)
    async with server.client() as http:
        before = (await http.post(OPENAI, json=SMALL)).json()["data"]
        async with watch.running():
            await asyncio.gather(*(vanish(http, i, rng.uniform(0, CANCEL_S)) for i in range(options.disconnects)))
            left = await settled(http)
        same = (await http.post(OPENAI, json=SMALL)).json()["data"] == before
    return {"clients": options.disconnects, "left_at_work": left, "same_picture_after": same}


async def sizes(server: Server, watch: Watchdog, options: argparse.Namespace) -> dict[str, Any]:
    """One picture after another for `--seconds`, each of a random size: what memory grows by in a minute.

    All are drawn twice before: oneDNN keeps 1024 of its convolutions' plans, and what is in use grows until then.
    """
    rng, seeds, count = random.Random(4), itertools.count(), Counter[str]()
    every = [f"{width}x{height}" for width in SIDES for height in SIDES]

    async def drawn(http: httpx.AsyncClient, size: str) -> None:
        status, _ = await ask(http, SMALL | {"size": size, "seed": next(seeds)})
        count[status] += 1

    async with server.client() as http:
        for size in rng.sample(2 * every, 2 * len(every)):
            await drawn(http, size)
        until = time.perf_counter() + options.seconds
        async with watch.running():
            while time.perf_counter() < until:
                await drawn(http, rng.choice(every))
    growth = watch.growth()
    per_minute = round(60 * growth["memory_growth_percent"] / (0.75 * options.seconds), 3)
    return {"answers": dict(count), "sizes": len(every), "memory_percent_a_minute": per_minute, **growth}


async def mixed(server: Server, watch: Watchdog, options: argparse.Namespace) -> dict[str, Any]:
    """`--requests`, `CLIENTS` at a time: half good ones, a quarter bad, a quarter cancelled."""
    rng, bad = random.Random(3), itertools.cycle(BAD)
    wrong: Counter[str] = Counter()
    count: Counter[str] = Counter()

    async def good(http: httpx.AsyncClient, seed: int) -> None:
        status, _ = await ask(http, SMALL | {"seed": seed, "output_format": rng.choice(("png", "jpeg", "webp"))})
        count[status] += 1

    async def malformed(http: httpx.AsyncClient, seed: int) -> None:
        body, deserved = next(bad)
        status, _ = await ask(http, body)
        count["bad, refused"] += status == str(deserved)
        if status != str(deserved):
            wrong[f"{str(body)[:40]}: {status}, not {deserved}"] += 1

    async def cancelled(http: httpx.AsyncClient, seed: int) -> None:
        await vanish(http, seed, rng.uniform(0, CANCEL_S))
        count["cancelled"] += 1

    kinds: tuple[Callable[[httpx.AsyncClient, int], Awaitable[None]], ...] = (good, good, malformed, cancelled)
    gate = asyncio.Semaphore(CLIENTS)

    async def one(http: httpx.AsyncClient, seed: int) -> None:
        async with gate:
            await kinds[seed % len(kinds)](http, seed)

    async with server.client() as http:
        async with watch.running():
            await asyncio.gather(*(one(http, seed) for seed in range(options.requests)))
        left = await settled(http)
    answers = {"answers": dict(count), "wrong": dict(wrong), "lost": count["lost"], "left_at_work": left}
    return answers | {"kinds_of_bad_input": len(BAD), **watch.growth()}
