"""What a server holds: overload, clients that vanish, a long mix of good, bad and cancelled requests.

Our own server with spark is started, driven over loopback, watched from outside (memory, descriptors) and stopped.

    overload      ten times as many requests as are served, Poisson, for a minute, at two sizes: pictures a second
                  against capacity, which a few clients find just before and just after, for a shared machine is not
                  always as fast; and every request has an answer, be it 429. In the smaller size a picture takes
                  little longer than the Python around it
    disconnects   200 clients that go away while their picture waits or is drawn; then the same picture as before, bit
                  for bit, and nothing still at work
    mixed         1,000 requests, a quarter of them cancelled half-way and a quarter malformed in each of `BAD`'s ways

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
from collections.abc import Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import aiohttp
import httpx

import report
from serving import OPENAI, Server, started

JSON = {"content-type": "application/json"}
SMALL = {"prompt": "a red circle on a blue background", "size": "128x128", "seed": 1}
SIZES = ("128x128", "256x256")  # of overload
CLIENTS, TIMES = 4, 10
WARM_S = 10.0
SAMPLE_S = 0.5
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


class Watchdog:
    """A server's process seen from outside: (seconds, bytes resident, open descriptors), sampled until it ends."""

    def __init__(self, pid: int) -> None:
        self._home, self._begun = Path(f"/proc/{pid}"), time.perf_counter()
        self.samples: list[tuple[float, int, int]] = []

    def sample(self) -> None:
        pages = int((self._home / "statm").read_text().split()[1])
        descriptors = len(list((self._home / "fd").iterdir()))
        self.samples.append((time.perf_counter() - self._begun, pages * 4096, descriptors))

    @asynccontextmanager
    async def running(self) -> Any:
        """Sample meanwhile."""

        async def sample() -> None:
            while True:
                self.sample()
                await asyncio.sleep(SAMPLE_S)

        task = asyncio.create_task(sample())
        try:
            yield
        finally:
            task.cancel()
            self.sample()

    def growth(self) -> dict[str, float]:
        """Percent over the whole time, by a straight line through all but the first quarter."""
        later = self.samples[len(self.samples) // 4 :]
        span = later[-1][0] - later[0][0]
        found = {}
        for name, column in (("memory", 1), ("descriptors", 2)):
            slope, start = statistics.linear_regression([s[0] for s in later], [s[column] for s in later])
            found[f"{name}_growth_percent"] = round(100 * slope * span / (start + slope * later[0][0]), 3)
        return found | {"memory_mb": round(later[-1][1] / 1e6, 1), "descriptors": later[-1][2]}


async def ask(http: httpx.AsyncClient, body: dict[str, Any] | bytes) -> tuple[str, float]:
    """The status and the seconds it took; "lost" if no whole answer came."""
    begun = time.perf_counter()
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    try:
        response = await http.post(OPENAI, content=content, headers=JSON)
        return judged(response.status_code, response.json()), time.perf_counter() - begun
    except (httpx.HTTPError, ValueError):
        return "lost", time.perf_counter() - begun


def judged(status: int, answer: Any) -> str:
    """The status of a whole answer, else "lost"."""
    with suppress(LookupError, TypeError):
        whole = answer["data"][0]["b64_json"] if status == 200 else answer["error"]["code"]
        return str(status) if whole else "lost"
    return "lost"


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
                    rounds.append(await overloaded(http, crowd, SMALL | {"size": size}, seeds, options.seconds))
            ratio = statistics.median(each["goodput_of_capacity"] for each in rounds)
            found[size] = {"goodput_of_capacity_p50": ratio, **watch.growth(), "rounds": rounds}
    return found | {"lost": sum(each["answers"].get("lost", 0) for size in SIZES for each in found[size]["rounds"])}


async def overloaded(
    http: httpx.AsyncClient, crowd: aiohttp.ClientSession, body: dict[str, Any], seeds: Iterator[int], seconds: float
) -> dict[str, Any]:
    """One round."""
    before = await capacity(http, body, seeds)
    offered, goodput, outcomes = await flood(crowd, body, seeds, TIMES * before, seconds)
    after = await capacity(http, body, seeds)
    refused = [took for status, took in outcomes if status == "429"]
    return {
        "capacity_per_s": [round(before, 2), round(after, 2)],
        "offered_per_s": round(offered, 2),
        "goodput_per_s": round(goodput, 2),
        "goodput_of_capacity": round(2 * goodput / (before + after), 3),
        "answers": dict(Counter(status for status, _ in outcomes)),
        "refused_p50_ms": round(1e3 * statistics.median(refused), 1) if refused else None,
    }


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


async def settled(http: httpx.AsyncClient) -> int:
    """How many requests are still waiting or drawn after a while without any client."""
    for _ in range(100):
        state = (await http.get("/health/ready")).json()
        if not (left := int(state["waiting"]) + int(state["drawing"])):
            break
        await asyncio.sleep(0.1)
    return left


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


MODES = {"overload": overload, "disconnects": disconnects, "mixed": mixed}


def main() -> None:
    """Measure, print a line for each mode, end with one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mode", nargs="+", choices=MODES, default=list(MODES), help="what to do (default: all)")
    parser.add_argument("--seconds", type=float, default=60, help="of overload (default: 60)")
    parser.add_argument("--rounds", type=int, default=3, help="of overload, at each size (default: 3)")
    parser.add_argument("--disconnects", type=int, default=200, help="clients that vanish (default: 200)")
    parser.add_argument("--requests", type=int, default=1000, help="of the mix (default: 1000)")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/endurance.json")
    options = parser.parse_args()
    with report.measuring("endurance", options.save) as found:
        for mode in options.mode:
            with started(timeout=600) as server:
                assert server.pid
                found[mode] = asyncio.run(MODES[mode](server, Watchdog(server.pid), options))
            print(mode, json.dumps(found[mode]), flush=True)


if __name__ == "__main__":
    main()
