"""What good clients get while others are hostile: modes of endurance.py.

Each measures `CLIENTS` good clients, each with one request at a time, alone before and after, and beside what is done
to the server meanwhile: pictures a second, the latency of theirs, of probes on the port of their own, and of /ping.
"""

import argparse
import asyncio
import itertools
import json
import socket
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

import httpx

import bombs
from flooding import crowd
from serving import OPENAI, Server, quantile
from watched import JSON, SMALL, Watchdog, ask, probing

CLIENTS, LOOPS = 4, 64
BODY = json.dumps(SMALL)
DRAW = f"POST {OPENAI} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
FLOODS = {  # a request, and whether each comes on a connection of its own
    "unknown route": ("GET /nowhere HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n", False),
    "unknown route, new connections": ("GET /nowhere HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n", True),
    "full queue": (f"{DRAW}Content-Length: {len(BODY)}\r\n\r\n{BODY}", False),
}
HELD, HELD_BYTES, HELD_S = 60, 7_800_000, 2  # bodies that lack their last byte, and the deadline that they name
UNREAD, LARGE = 100, SMALL | {"size": "512x512", "n": 4}  # clients that never read the one answer to this
Attack = Callable[[float], Awaitable[dict[str, Any]]]


async def pictures(http: httpx.AsyncClient, seeds: "itertools.count[int]", seconds: float) -> tuple[float, list[float]]:
    """How many a second the good clients get, and seconds that each took, sorted."""
    until, took = time.perf_counter() + seconds, list[float]()

    async def client() -> None:
        while time.perf_counter() < until:
            status, each = await ask(http, SMALL | {"seed": next(seeds)})
            if status == "200":
                took.append(each)
            else:
                await asyncio.sleep(0.05)

    begun = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(CLIENTS)))
    return len(took) / (time.perf_counter() - begun), sorted(took)


async def beside(server: Server, watch: Watchdog, options: argparse.Namespace, attack: Attack) -> dict[str, Any]:
    """One attack. `drawn_per_s` of what it says counts too: pictures that the attackers got."""
    seconds, seeds = options.beside, itertools.count()
    async with server.client() as http:
        await pictures(http, seeds, 1)
        before, alone = await pictures(http, seeds, seconds / 2)
        watch.samples = []
        async with watch.running():
            (good, took), probes, ping, theirs = await asyncio.gather(
                pictures(http, seeds, seconds),
                probing(options.probes, seconds),
                probing(server.address, seconds),
                attack(seconds),
            )
        after, _ = await pictures(http, seeds, seconds / 2)
    drawn = good + theirs.get("drawn_per_s", 0.0)
    memory = [sample[1] / 1e6 for sample in watch.samples]
    return {
        "goodput_of_alone": round(2 * drawn / (before + after), 3),
        "alone_per_s": [round(before, 2), round(after, 2)],
        "good_per_s": round(good, 2),
        "good_p99_s": {"alone": quantile(alone, 0.99), "beside": quantile(took, 0.99)},
        "probes_p99_ms": probes,
        "ping_p99_ms": ping,
        "memory_mb": {"before": round(memory[0]), "most": round(max(memory))},
        "attack": theirs,
    }


async def flooded(server: Server, watch: Watchdog, options: argparse.Namespace) -> dict[str, Any]:
    """`LOOPS` clients that ask again as soon as they are refused, at hardly any cost of their own."""
    with crowd(server.address) as clients:

        async def flood(request: str, fresh: bool, seconds: float) -> dict[str, Any]:
            found = await clients.closed(request, LOOPS, seconds, fresh)
            answers = found["answers"]
            return {
                "refused_per_s": round((answers["4xx"] + answers["5xx"]) / found["seconds"], 1),
                "drawn_per_s": round(answers["2xx"] / found["seconds"], 2),
                "broken": found["broken"],
            }

        return {
            name: await beside(server, watch, options, lambda seconds, each=each: flood(*each, seconds))
            for name, each in FLOODS.items()
        }


async def held(server: Server, watch: Watchdog, options: argparse.Namespace) -> dict[str, Any]:
    """Large bodies that never end, with a deadline that is soon over."""
    head = f"{DRAW}x-deadline-s: {HELD_S}\r\nContent-Length: {HELD_BYTES}\r\n\r\n".encode()

    async def attack(seconds: float) -> dict[str, Any]:
        sent = head + b'{"prompt": "' + bytes(HELD_BYTES - 13).replace(b"\0", b"a")
        return dict(Counter(await asyncio.gather(*(asking(server, sent, seconds) for _ in range(HELD)))))

    return await beside(server, watch, options, attack)


async def asking(server: Server, sent: bytes, seconds: float) -> str:
    """The status of the answer to a request by hand, whose bytes are not copied; "none" in that time."""
    loop, answer = asyncio.get_running_loop(), b""
    with suppress(TimeoutError, OSError), socket.socket() as connection:
        connection.setblocking(False)
        async with asyncio.timeout(seconds):
            await loop.sock_connect(connection, (urlsplit(server.address).hostname, urlsplit(server.address).port))
            with suppress(ConnectionError):  # it may be answered before all is sent
                await loop.sock_sendall(connection, sent)
            answer = await loop.sock_recv(connection, 1 << 10)
    return answer[9:12].decode() or "none"


async def unread(server: Server, watch: Watchdog, options: argparse.Namespace) -> dict[str, Any]:
    """Clients that ask for the same large answer under one Idempotency-Key, and never read it."""
    key, body, address = {"idempotency-key": "unread"}, json.dumps(LARGE), urlsplit(server.address)
    lines = [f"{name}: {value}\r\n" for name, value in key.items()]
    sent = f"{DRAW}{''.join(lines)}Content-Length: {len(body)}\r\n\r\n{body}".encode()
    async with server.client() as http:
        size = len((await http.post(OPENAI, content=body, headers=JSON | key)).content)

    async def attack(seconds: float) -> dict[str, Any]:
        opened = [
            await asyncio.open_connection(address.hostname, address.port, limit=1, family=2) for _ in range(UNREAD)
        ]
        for _, writer in opened:
            writer.write(sent)
        await asyncio.sleep(seconds)
        for _, writer in opened:
            writer.transport.abort()
        return {"clients": UNREAD, "answer_mb": round(size / 1e6, 2)}

    return await beside(server, watch, options, attack)


async def scanned(server: Server, watch: Watchdog, options: argparse.Namespace) -> dict[str, Any]:
    """Images that ask a decoder for as much as they may, beside good requests."""
    async with server.client() as http:
        return await bombs.beside(http, options.beside)


MODES = {"flooded": flooded, "held": held, "unread": unread, "bombs": scanned}
