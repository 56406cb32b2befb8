"""Who gets in where more ask than can wait: a mode of endurance.py.

Words, streams and edits ask for the same picture, `CLIENTS` of each, and ask again a moment after each answer. What
differs is what they send: an edit has an image of `SIDE` x `SIDE`, which is sent and decoded before it is drawn.
"""

import argparse
import asyncio
import itertools
import json
import random
import time
from collections import Counter
from io import BytesIO
from typing import Any

import aiohttp
import numpy as np
from PIL import Image

from serving import OPENAI, Server
from watched import JSON, SMALL, Watchdog

CLIENTS, SIDE = 20, 1024  # of each kind; all together more than may wait
PAUSE_S = 0.05, 0.15


def kinds() -> dict[str, tuple[str, dict[str, Any], bytes]]:
    """A route, fields and an image for each."""
    noise, file = np.random.default_rng(1).integers(0, 256, (SIDE, SIDE, 3), np.uint8), BytesIO()
    Image.fromarray(noise).save(file, "PNG")
    return {
        "words": (OPENAI, SMALL, b""),
        "stream": (OPENAI, SMALL | {"stream": True}, b""),
        "edit": ("/v1/images/edits", SMALL | {"strength": 1}, file.getvalue()),
    }


def sent(fields: dict[str, Any], image: bytes) -> dict[str, Any]:
    """What aiohttp is to send: JSON, or a form if there is an image."""
    if not image:
        return {"data": json.dumps(fields), "headers": JSON}
    form = aiohttp.FormData({name: str(value) for name, value in fields.items()})
    form.add_field("image", image, filename="noise.png", content_type="image/png")
    return {"data": form}


async def fair(server: Server, watch: Watchdog, options: argparse.Namespace) -> dict[str, Any]:
    """How many of each kind's requests were let in, and how often against words'."""
    answers: dict[str, Counter[str]] = {}
    rng, seeds, until = random.Random(5), itertools.count(), time.perf_counter() + 2 * options.beside

    async def client(name: str, route: str, fields: dict[str, Any], image: bytes) -> None:
        async with aiohttp.ClientSession(server.address) as http:
            while time.perf_counter() < until:
                await asyncio.sleep(rng.uniform(*PAUSE_S))
                async with http.post(route, **sent(fields | {"seed": next(seeds)}, image)) as response:
                    await response.read()
                    answers.setdefault(name, Counter())[str(response.status)] += 1

    async with watch.running():
        every = kinds().items()
        await asyncio.gather(*(client(name, *each) for name, each in every for _ in range(CLIENTS)))
    let_in = {name: each["200"] / each.total() for name, each in answers.items()}
    return {
        "answers": {name: dict(each) for name, each in answers.items()},
        "let_in": {name: round(share, 4) for name, share in let_in.items()},
        "of_words": {name: round(share / let_in["words"], 2) for name, share in let_in.items()},
    }
