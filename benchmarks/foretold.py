"""A real worker beside the simulated one, on this machine: the same requests at the same moments, in fleet.py.

What the worker can do is measured first, with as many clients as keep it busy. Then requests come by chance, at so much
of that; the simulation is given their times, and seconds of service drawn from those that were measured: "foretold". On
a machine that others use, service takes longer or shorter a minute later, so it is asked again with what the worker
itself says its pictures took meanwhile: "explained". What is compared is how long requests waited in the queue, by the
worker's own stages, and how many it refused.
"""

import argparse
import itertools
import math
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.request import ProxyHandler, build_opener

import serving
from simulation import Fleet, Rule, Service, quantile, simulate
from traffic import Request

PLACES, CLIENTS = 8, 3  # requests that may wait; clients that keep a worker busy
PICTURES = 30  # measured first, and again at the end
SETTINGS = {"KINDLING_QUEUE": str(PLACES), "KINDLING_BATCH": "1"}


@dataclass(frozen=True, slots=True)
class Pace:
    """Seconds from one picture to the next where there is no pause, and the pictures' own, as parts of their mean."""

    service_s: float
    parts: tuple[float, ...]


def compare(options: argparse.Namespace, figures: dict[str, Any]) -> None:
    """Fill `figures`, and print a line for each load."""
    begun = time.perf_counter()
    with serving.started(600, **SETTINGS) as server:
        figures |= {"cold_start_s": round(time.perf_counter() - begun, 3), "side": options.side, "places": PLACES}
        paced(server, CLIENTS, options.side)  # the first pictures take longer
        pace = paced(server, PICTURES, options.side)
        figures |= {"service_s": round(pace.service_s, 4), "loads": (rows := [])}
        print(f"cold start {figures['cold_start_s']} s; a picture each {pace.service_s:.3f} s", flush=True)
        for load in options.load:
            rows.append(row := seen(server, load / pace.service_s, options, pace))
            print(f"load {load}: " + "; ".join(f"{name} {row[name]}" for name in ("seen", "foretold", "explained")))
        figures["service_s_after"] = round(paced(server, PICTURES, options.side).service_s, 4)
        figures |= told_of(server, 3 * PICTURES)


def bodies(count: int, side: int) -> list[dict[str, Any]]:
    texts = serving.prompts("plain", count)
    return [{"prompt": text, "seed": seed, "width": side, "height": side} for seed, text in enumerate(texts)]


def paced(server: serving.Server, count: int, side: int) -> Pace:
    """What the worker can do, asked by `CLIENTS` at a time."""
    seconds, outcomes = server.load(bodies(count, side), CLIENTS, route=serving.NATIVE)
    return Pace(seconds / count, own(serving.complete(outcomes)))


def own(outcomes: Sequence[serving.Outcome]) -> tuple[float, ...]:
    """How long each picture was drawn, by the worker's own stages, as a part of their mean."""
    drawn = [sum(stages(outcome)[name] for name in serving.MODEL_STAGES) for outcome in outcomes]
    return tuple(one / statistics.fmean(drawn) for one in drawn)


def stages(outcome: serving.Outcome) -> dict[str, float]:
    found: dict[str, float] = outcome.answer["images"][0]["stages_s"]
    return found


def seen(server: serving.Server, rate: float, options: argparse.Namespace, pace: Pace) -> dict[str, Any]:
    """`rate` requests a second by chance: how they fared, and how they fared in simulations."""
    due = serving.arrivals(max(1, round(rate * options.for_s)), rate, options.seed) or []
    _, outcomes = server.load(bodies(len(due), options.side), len(due), due, serving.NATIVE)
    good = [outcome for outcome in outcomes if not outcome.failure]
    refused = sum(outcome.failure.startswith("429") for outcome in outcomes)
    drawn = [sum(stages(outcome)[name] for name in serving.MODEL_STAGES) for outcome in good]
    meanwhile = Pace(statistics.fmean(drawn), own(good))
    return {
        "rate": round(rate, 3),
        "sent": len(due),
        "answered": len(good),
        "failed": len(due) - len(good) - refused,
        "seen": told([stages(outcome)["queue"] for outcome in good], refused / len(due)),
        "foretold": foretold(due, pace, options.seed),
        "explained": foretold(due, meanwhile, options.seed),
    }


def foretold(due: Sequence[float], pace: Pace, seed: int) -> dict[str, float]:
    rng = random.Random(seed)
    requests = [Request(at, rng.choice(pace.parts)) for at in due]
    found = simulate(requests, one_worker(pace.service_s))
    return told(found.waits, found.lost)


def one_worker(service_s: float) -> Fleet:
    return Fleet(Service(service_s), Rule("count", math.inf), 0, math.inf, most=1, least=1, queue=PLACES)


def told(waits: Sequence[float], refused: float) -> dict[str, float]:
    found = {f"wait_p{round(100 * share)}_s": round(quantile(waits, share), 3) for share in (0.5, 0.95)}
    return found | {"refused": round(refused, 3)}


def told_of(server: serving.Server, pictures: int) -> dict[str, int]:
    """Bytes that a worker has for those who watch it: a request's line in the log, and a page of metrics."""
    lines = itertools.islice((line for line in reversed(server.log) if "/generate" in line), pictures)
    with build_opener(ProxyHandler({})).open(f"{server.address}/metrics", timeout=60) as answer:
        page = answer.read().decode()
    series = sum(1 for line in page.splitlines() if line and not line.startswith("#"))
    sizes = [len(line.encode()) for line in lines]
    return {
        "log_bytes_a_request": round(statistics.fmean(sizes)) if sizes else 0,
        "metrics_bytes": len(page.encode()),
        "metrics_series": series,
    }
