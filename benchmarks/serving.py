"""A load generator for any server that speaks OpenAI's Images API, so that peers can be measured side by side.

The figures have the names of SGLang's bench_serving. With a request rate, arrivals are Poisson and a latency counts
from when its request was due, so that a server that stalls cannot hide the requests it kept from being sent; with `inf`
it counts from the sending, as SGLang's does. Failures are counted by status and code and never averaged in.

    python benchmarks/serving.py --base-url http://127.0.0.1:30000 --model black-forest-labs/FLUX.1-dev \\
        --num-prompts 20 --max-concurrency 20

Without --base-url our own server with spark is started, measured and stopped. The other modes: `engine` asks whether 16
clients at once get as much done as one after the other; `overhead` what a request costs outside the model, HTTP in to
HTTP out less encode, denoise and decode, and `growth` how latency grows with steps, pixels, n and the queue. These two
need Kindling's own route, whose answers tell the seconds of each stage.
"""

import argparse
import asyncio
import contextlib
import json
import math
import os
import random
import re
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, cycle, islice
from pathlib import Path
from typing import Any

import httpx

import chart
import report

ROOT = Path(__file__).parent.parent
OPENAI, NATIVE = "/v1/images/generations", "/generate"
MODEL_STAGES = ("encode", "denoise", "decode")
PARTS = ("queue", *MODEL_STAGES, "serialize", "rest")
CLIENTS = 16
PEAKS = (  # where a server may tell its peak memory, how, and in which part of a MiB
    ("/metrics", r"(?m)^\w+_bytes\{[^}]*peak[^}]*\} (\S+)", 2**20),
    ("/health/ready", r'"peak_memory_mb": *([\d.]+)', 1),
)
GROWTH: dict[str, tuple[str, list[tuple[int, dict[str, int]]]]] = {  # how a row is called; its figure, what is sent
    "steps": ("{} steps", [(n, {"num_inference_steps": n}) for n in (1, 2, 4, 8)]),
    "pixels": ("{0} x {0} pixels", [(side, {"width": side, "height": side}) for side in (128, 256, 512, 1024)]),
    "n": ("{} pictures", [(n, {"n": n}) for n in (1, 2, 3, 4)]),
    "queue": ("{} before it", [(n, {}) for n in (0, 1, 3, 7, 15)]),
}


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one request: seconds, and why it failed, or its answer."""

    latency: float
    failure: str = ""
    answer: Any = None


class Server:
    """The server under test, as a client with its key sees it."""

    def __init__(self, address: str, key: str = "", timeout: float = 600, pid: int | None = None) -> None:
        self.address, self.pid = address.rstrip("/").removesuffix("/v1"), pid
        self._headers, self._timeout = {"Authorization": f"Bearer {key}"} if key else {}, timeout
        self.log: list[str] = []  # of a server that was started here, once it was ready

    def client(self) -> httpx.AsyncClient:
        free = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        return httpx.AsyncClient(
            base_url=self.address, headers=self._headers, timeout=self._timeout, limits=free, trust_env=False
        )

    def load(
        self, bodies: Sequence[dict[str, Any]], most: int, due: Sequence[float] | None = None, route: str = OPENAI
    ) -> tuple[float, list[Outcome]]:
        """Send all `bodies`, at most `most` at a time, each when `due`; seconds in all, and what became of each."""
        return asyncio.run(self._load(bodies, most, due, route))

    async def _load(
        self, bodies: Sequence[dict[str, Any]], most: int, due: Sequence[float] | None, route: str
    ) -> tuple[float, list[Outcome]]:
        gate = asyncio.Semaphore(most)

        async def one(body: dict[str, Any], wait: float) -> Outcome:
            await asyncio.sleep(begun + wait - time.perf_counter())
            async with gate:
                return await ask(http, route, body, time.perf_counter() if due is None else begun + wait)

        async with self.client() as http:
            begun = time.perf_counter()
            outcomes = await asyncio.gather(*map(one, bodies, due or [0.0] * len(bodies)))
            return time.perf_counter() - begun, outcomes

    def peak_mb(self) -> float | None:
        """The most memory the server ever held: as it tells, else of its process, else None."""
        for route, pattern, unit in PEAKS:
            with contextlib.suppress(httpx.HTTPError):
                answer = httpx.get(self.address + route, headers=self._headers, timeout=10, trust_env=False)
                if answer.status_code == 200 and (found := re.search(pattern, answer.text)):
                    return float(found[1]) / unit
        if self.pid is None:
            return None
        return int(re.findall(r"VmHWM:\s+(\d+)", Path(f"/proc/{self.pid}/status").read_text())[0]) / 1024


async def ask(http: httpx.AsyncClient, route: str, body: dict[str, Any], since: float) -> Outcome:
    """One request; never raises for what the server or the network does."""
    try:
        response = await http.post(route, json=body)
    except httpx.HTTPError as error:
        return Outcome(time.perf_counter() - since, type(error).__name__)
    latency = time.perf_counter() - since
    try:
        answer = response.json()
    except ValueError:
        return Outcome(latency, f"{response.status_code} not JSON")
    if response.status_code != 200:
        error = answer.get("error") if isinstance(answer, dict) else None
        code = error.get("code") if isinstance(error, dict) else None
        return Outcome(latency, f"{response.status_code} {code or ''}".strip())
    pictures = answer.get("data") or answer.get("images") or [] if isinstance(answer, dict) else []
    if len(pictures) != body.get("n", 1) or not all(p.get("b64_json") or p.get("url") for p in pictures):
        return Outcome(latency, "200 without the pictures")
    return Outcome(latency, answer=answer)


def arrivals(count: int, rate: float, seed: int) -> list[float] | None:
    """When each request is due, in seconds: a Poisson process of `rate` a second; None: all at once."""
    rng = random.Random(seed)
    return None if math.isinf(rate) else list(accumulate(rng.expovariate(rate) for _ in range(count)))


def prompts(kind: str, count: int) -> list[str]:
    """As many as asked for: plain ones over and over, or held-out ones of spark's own grammar."""
    if kind == "plain":
        return list(islice(cycle((Path(__file__).parent / "prompts.txt").read_text().splitlines()), count))
    from spark.scenes import held_out

    return [prompt for prompt, _ in held_out(count, "test", "one", "plain")]


def figures(duration: float, outcomes: Sequence[Outcome], peak_mb: float | None) -> dict[str, Any]:
    """SGLang's keys, and failures by kind. Memory is of each answer where answers tell it, else the server's."""
    good = [outcome for outcome in outcomes if not outcome.failure]
    seconds = sorted(outcome.latency for outcome in good)
    told = [outcome.answer["peak_memory_mb"] for outcome in good if outcome.answer.get("peak_memory_mb")]
    memory = told or ([] if peak_mb is None else [peak_mb])
    return {
        "duration": round(duration, 4),
        "completed_requests": len(good),
        "failed_requests": len(outcomes) - len(good),
        "failures": dict(Counter(outcome.failure for outcome in outcomes if outcome.failure)),
        "throughput_qps": round(len(good) / duration, 4),
        "latency_mean": rounded(statistics.fmean(seconds) if seconds else None),
        "latency_median": quantile(seconds, 0.5),
        "latency_p99": quantile(seconds, 0.99),
        "latency_p50": quantile(seconds, 0.5),
        "peak_memory_mb_max": rounded(max(memory, default=None)),
        "peak_memory_mb_mean": rounded(statistics.fmean(memory) if memory else None),
        "peak_memory_mb_median": rounded(statistics.median(memory) if memory else None),
    }


def quantile(ordered: Sequence[float], share: float) -> float | None:
    """Between the two nearest of `ordered`, as numpy has it; None of nothing."""
    if not ordered:
        return None
    place = share * (len(ordered) - 1)
    low, high = ordered[math.floor(place)], ordered[math.ceil(place)]
    return rounded(low + (high - low) * (place % 1))


def rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 5)


def bodies(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The requests to OpenAI's route; a seed each, so that no server can answer from a cache."""
    asked = {"model": options.model, "num_inference_steps": options.steps}
    fixed = {"size": options.size, "response_format": "b64_json", **{k: v for k, v in asked.items() if v is not None}}
    texts = prompts(options.prompts, options.num_prompts)
    return [{"prompt": text, "seed": options.seed + i, **fixed} for i, text in enumerate(texts)]


def load(server: Server, options: argparse.Namespace) -> dict[str, Any]:
    """The load test itself."""
    due = arrivals(options.num_prompts, options.request_rate, options.seed)
    found = figures(*server.load(bodies(options), options.max_concurrency, due), server.peak_mb())
    print("\n".join(f"{name:<24}{value}" for name, value in found.items()))
    rate = "inf" if due is None else options.request_rate  # JSON has no Infinity
    return {"size": options.size, "request_rate": rate, "max_concurrency": options.max_concurrency, **found}


def engine(server: Server, options: argparse.Namespace) -> dict[str, Any]:
    """Pictures a second with one client and with `CLIENTS`, in turns; the ratio of the medians."""
    found: dict[int, list[float]] = {1: [], CLIENTS: []}
    for _ in range(options.rounds):
        for clients, rates in found.items():
            duration, outcomes = server.load(bodies(options), clients)
            complete(outcomes)
            rates.append(len(outcomes) / duration)
    one, many = (statistics.median(rates) for rates in found.values())
    print(f"1 client: {one:.2f} pictures/s, {CLIENTS} clients: {many:.2f} pictures/s, ratio {many / one:.3f}")
    rows = {f"clients_{clients}_qps": [round(rate, 3) for rate in rates] for clients, rates in found.items()}
    return {**rows, "ratio": round(many / one, 4), "at_least": 0.95}


def overhead(server: Server, options: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds that a request spends outside the model, one after the other at 256x256."""
    sent = [{"prompt": text, "width": 256, "height": 256} for text in prompts(options.prompts, options.num_prompts + 1)]
    parted = [parts(outcome) for outcome in complete(server.load(sent, 1, route=NATIVE)[1])[1:]]
    outside = sorted(1e3 * sum(part[name] for name in PARTS if name not in MODEL_STAGES) for part in parted)
    medians = {name: round(1e3 * statistics.median(part[name] for part in parted), 3) for name in PARTS}
    found = {"median_ms": quantile(outside, 0.5), "p99_ms": quantile(outside, 0.99), "parts_ms": medians}
    print("outside the model: {median_ms:.2f} ms median, {p99_ms:.2f} ms p99; medians {parts_ms}".format(**found))
    return {**found, "below_ms": 5}


def growth(server: Server, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each of `GROWTH`: medians of the latency and its parts."""
    rows = []
    print(f"{'':<20}{'latency':>9}" + "".join(f"{part:>11}" for part in PARTS))
    for grows, (name, cases) in GROWTH.items():
        for figure, fields in cases:
            runs = [slowest(server, fields, figure if grows == "queue" else 0) for _ in range(options.rounds + 1)][1:]
            row = {part: round(statistics.median(run[part] for run in runs), 4) for part in ("latency", *PARTS)}
            rows.append({"grows": grows, "at": figure, "name": name.format(figure), **row})
            print(f"{rows[-1]['name']:<20}{row['latency']:>9.3f}" + "".join(f"{row[part]:>11.3f}" for part in PARTS))
    if options.save:
        bars = {row["name"]: row for row in rows}
        chart.stacked(bars, PARTS, report.RESULTS / "serving.png", "seconds from request to answer, spark")
    return rows


def slowest(server: Server, fields: dict[str, int], before: int) -> dict[str, float]:
    """The parts of the last answer of one more request than `before`, all sent at once."""
    sent = [{"prompt": text, "seed": 1, **fields} for text in prompts("spark", before + 1)]
    return parts(max(complete(server.load(sent, before + 1, route=NATIVE)[1]), key=lambda outcome: outcome.latency))


def parts(outcome: Outcome) -> dict[str, float]:
    """Where an answer's seconds went. Pictures are drawn in turns; all but the last are encoded meanwhile."""
    stages: list[dict[str, float]] = [image["stages_s"] for image in outcome.answer["images"]]
    found = {name: sum(stage[name] for stage in stages) for name in ("queue", *MODEL_STAGES)}
    found["serialize"] = stages[-1]["serialize"]
    return {"latency": outcome.latency, **found, "rest": max(0.0, outcome.latency - sum(found.values()))}


def complete(outcomes: list[Outcome]) -> list[Outcome]:
    """All of them, if none failed: these modes compare what was drawn."""
    if failures := Counter(outcome.failure for outcome in outcomes if outcome.failure):
        raise SystemExit(f"{sum(failures.values())} of {len(outcomes)} requests failed: {dict(failures)}")
    return outcomes


MODES = {"load": load, "engine": engine, "overhead": overhead, "growth": growth}


@contextlib.contextmanager
def started(timeout: float, **given: str) -> Iterator[Server]:
    """Our own server with spark, on a free loopback port, with the variables `given`."""
    command, environ = [sys.executable, "-m", "handler", "serve", "--port", "0"], report.environment(**given)
    with subprocess.Popen(
        command, cwd=ROOT, env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stderr
            ready = next((line for line in process.stderr if "is ready on" in line), None)
            if ready is None:
                raise SystemExit("The server did not start; try: python -m handler serve")
            server = Server(ready.split("is ready on ")[1].split()[0], timeout=timeout, pid=process.pid)
            reading = threading.Thread(target=server.log.extend, args=(process.stderr,), daemon=True)
            reading.start()  # a full pipe would stop the server
            yield server
        finally:
            process.terminate()
            process.wait()  # before its pipe is closed, which is read until then


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mode", nargs="+", choices=MODES, default=["load"], help="what to measure (default: load)")
    parser.add_argument("--base-url", help="the server, with or without /v1 (default: start our own with spark)")
    parser.add_argument("--api-key-from-env", metavar="NAME", help="the environment variable that holds the key")
    parser.add_argument("--model", help="the model to ask for (default: what is served)")
    parser.add_argument("--size", default="256x256", help="WIDTHxHEIGHT (default: 256x256)")
    parser.add_argument("--steps", type=int, help="num_inference_steps (default: the model's)")
    parser.add_argument("--prompts", choices=("plain", "spark"), default="plain", help="everyday ones, or spark's own")
    parser.add_argument("--num-prompts", type=int, default=32, help="requests (default: 32)")
    parser.add_argument("--max-concurrency", type=int, default=1, help="requests at a time (default: 1)")
    parser.add_argument("--request-rate", type=float, default=math.inf, help="a second, Poisson (default: inf)")
    parser.add_argument("--seed", type=int, default=0, help="of the arrivals and the first picture (default: 0)")
    parser.add_argument("--timeout", type=float, default=600, help="seconds for one request (default: 600)")
    parser.add_argument("--rounds", type=int, default=3, help="of engine and growth (default: 3)")
    parser.add_argument("--pid", type=int, help="the server's process, for its peak memory if it does not tell")
    parser.add_argument("--output", type=Path, help="write the figures there too, as JSON")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/serving.json and .png")
    return parser.parse_args()


def main() -> None:
    """Measure what was asked for, print tables, end with one JSON line."""
    options = arguments()
    with report.measuring("serving", options.save) as found, contextlib.ExitStack() as stack:
        if options.base_url:
            key = os.environ[options.api_key_from_env] if options.api_key_from_env else ""
            server = Server(options.base_url, key, options.timeout, options.pid)
        else:
            server = stack.enter_context(started(options.timeout))
        for mode in options.mode:
            figures = MODES[mode](server, options)
            found |= figures if mode == "load" else {mode: figures}
        if options.output:
            options.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
