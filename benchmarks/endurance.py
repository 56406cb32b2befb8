"""What a server holds: overload, clients that vanish, a long mix of good, bad and cancelled requests, hostile clients.

Our own server with spark is started, driven over loopback, watched from outside (memory, descriptors) and stopped.

    overload      ten times as many requests as are served, Poisson, for a minute, at two sizes: pictures a second
                  against capacity, which a few clients find just before and just after, for a shared machine is not
                  always as fast; and every request has an answer, be it 429. In the smaller size a picture takes
                  little longer than the Python around it
    disconnects   200 clients that go away while their picture waits or is drawn; then the same picture as before, bit
                  for bit, and nothing still at work
    mixed         1,000 requests, a quarter of them cancelled half-way and a quarter malformed in each of `BAD`'s ways
    sizes         pictures of random sizes, one after another: the slope of memory after a warm-up
    flooded       64 clients that ask again as soon as they are refused, beside good ones (this wants a C compiler)
    held          60 bodies of 7.8 MB that lack their last byte
    unread        100 clients that never read their answers
    bombs         images that ask a decoder for as much as they may
    fair          words, streams and edits, more of each than can wait: how often each is let in

Growth is the slope of a straight line through what was sampled after the first quarter, over all of it, in percent; in
overload that is all rounds of one size.
"""

import argparse
import asyncio
import itertools
import json
import random
import statistics
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import aiohttp
import httpx

import fair
import hostile
import mixed
import report
from serving import OPENAI, Server, started
from watched import JSON, SMALL, Watchdog, ask, free_port, judged, probing

SIZES = ("128x128", "256x256")  # of overload
CLIENTS, TIMES = 4, 10
WARM_S = 10.0


async def capacity(http: httpx.AsyncClient, body: dict[str, Any], seeds: Iterator[int]) -> float:
    """Pictures a second with `CLIENTS`, each with one request at a time."""
    until, done = time.perf_counter() + WARM_S, 0

    async def client() -> None:
        nonlocal done
        while time.perf_counter() < until:
            status, _ = await ask(http, body | {"seed": next(seeds)})
            done += status == "200"  # not in one with the wait, during which others count too

    await asyncio.gather(*(client() for _ in range(CLIENTS)))
    return done / WARM_S


async def flood(
    http: aiohttp.ClientSession, body: dict[str, Any], seeds: Iterator[int], rate: float, seconds: float
) -> tuple[float, float, list[tuple[str, float]]]:
    """Requests a second, pictures a second while they came, and what became of each request."""
    rng = random.Random(1)
    begun, tasks, due = time.perf_counter(), [], 0.0
    while (due := due + rng.expovariate(rate)) < seconds:
        await asyncio.sleep(begun + due - time.perf_counter())
        tasks.append(asyncio.create_task(one_of_many(http, body | {"seed": next(seeds)})))
    done, took = sum(task.done() and task.result()[0] == "200" for task in tasks), time.perf_counter() - begun
    return len(tasks) / took, done / took, await asyncio.gather(*tasks)


async def one_of_many(http: aiohttp.ClientSession, body: dict[str, Any]) -> tuple[str, float]:
    """As `ask`, with a client that takes a quarter of the time, for all cores are the server's too."""
    begun = time.perf_counter()
    try:
        async with http.post(OPENAI, data=json.dumps(body), headers=JSON) as response:
            return judged(response.status, json.loads(await response.read())), time.perf_counter() - begun
    except (aiohttp.ClientError, ValueError):
        return "lost", time.perf_counter() - begun


async def overload(server: Server, watch: Watchdog, options: argparse.Namespace) -> dict[str, Any]:
    """`TIMES` as much as capacity for `--seconds`, `--rounds` times, at one size after the other."""
    seeds, found = itertools.count(), {}
    many = aiohttp.TCPConnector(limit=0)
    async with server.client() as http, aiohttp.ClientSession(server.address, connector=many) as crowd:
        for size in SIZES:
            watch.samples, rounds = [], []
            async with watch.running():
                for _ in range(options.rounds):
                    rounds.append(await overloaded(http, crowd, SMALL | {"size": size}, seeds, options))
            ratio = statistics.median(each["goodput_of_capacity"] for each in rounds)
            found[size] = {"goodput_of_capacity_p50": ratio, **watch.growth(), "rounds": rounds}
    return found | {"lost": sum(each["answers"].get("lost", 0) for size in SIZES for each in found[size]["rounds"])}


async def overloaded(
    http: httpx.AsyncClient,
    crowd: aiohttp.ClientSession,
    body: dict[str, Any],
    seeds: Iterator[int],
    options: argparse.Namespace,
) -> dict[str, Any]:
    """One round."""
    before = await capacity(http, body, seeds)
    (offered, goodput, outcomes), probes, ping = await asyncio.gather(
        flood(crowd, body, seeds, TIMES * before, options.seconds),
        probing(options.probes, options.seconds),
        probing(str(http.base_url), options.seconds),
    )
    after = await capacity(http, body, seeds)
    refused = [took for status, took in outcomes if status == "429"]
    return {
        "capacity_per_s": [round(before, 2), round(after, 2)],
        "offered_per_s": round(offered, 2),
        "goodput_per_s": round(goodput, 2),
        "goodput_of_capacity": round(2 * goodput / (before + after), 3),
        "answers": dict(Counter(status for status, _ in outcomes)),
        "refused_p50_ms": round(1e3 * statistics.median(refused), 1) if refused else None,
        "probes_p99_ms": probes,
        "ping_p99_ms": ping,
    }


MODES = {
    "overload": overload,
    "disconnects": mixed.disconnects,
    "mixed": mixed.mixed,
    "sizes": mixed.sizes,
    **hostile.MODES,
    "fair": fair.fair,
}


def main() -> None:
    """Measure, print a line for each mode, end with one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mode", nargs="+", choices=MODES, default=list(MODES), help="what to do (default: all)")
    parser.add_argument("--seconds", type=float, default=60, help="of overload and of sizes (default: 60)")
    parser.add_argument("--rounds", type=int, default=3, help="of overload, at each size (default: 3)")
    parser.add_argument("--disconnects", type=int, default=200, help="clients that vanish (default: 200)")
    parser.add_argument("--requests", type=int, default=1000, help="of the mix (default: 1000)")
    parser.add_argument("--beside", type=float, default=12, help="seconds beside hostile clients (default: 12)")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/endurance.json")
    options = parser.parse_args()
    with report.measuring("endurance", options.save) as found:
        for mode in options.mode:
            port = free_port()
            options.probes = f"http://127.0.0.1:{port}"
            with started(timeout=600, PORT_HEALTH=str(port)) as server:
                assert server.pid
                found[mode] = asyncio.run(MODES[mode](server, Watchdog(server.pid), options))
            print(mode, json.dumps(found[mode]), flush=True)


if __name__ == "__main__":
    main()
