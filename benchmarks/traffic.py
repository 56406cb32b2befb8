"""Requests as they come: by chance, by the hours of a day, in bursts, or of a file. The same seed gives the same."""

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

HOUR, DAY = 3600.0, 86400.0
BURST, WITHIN_S = 8, 5.0  # requests of a burst on average, and the seconds over which they come


@dataclass(frozen=True, slots=True)
class Request:
    """When it comes, in seconds, and its work, in pictures of the usual size and steps."""

    at: float
    work: float = 1.0


def poisson(rate: float, begin: float, end: float, rng: random.Random) -> Iterator[float]:
    """Times by chance, `rate` of them a second."""
    now = begin
    while rate > 0 and (now := now + rng.expovariate(rate)) < end:
        yield now


def flat(count: float, begin: float, end: float, rng: random.Random) -> list[float]:
    """As many at each hour, about `count` in all."""
    return list(poisson(count / (end - begin), begin, end, rng))


def diurnal(count: float, begin: float, end: float, rng: random.Random) -> list[float]:
    """None at first and last, most in the middle: half a sine."""
    top = count / (end - begin) * math.pi / 2
    return [
        at for at in poisson(top, begin, end, rng) if rng.random() < math.sin(math.pi * (at - begin) / (end - begin))
    ]


def bursty(count: float, begin: float, end: float, rng: random.Random) -> list[float]:
    """Bursts by chance, of `BURST` requests on average."""
    found = []
    for at in poisson(count / BURST / (end - begin), begin, end, rng):
        size = 1 + math.floor(math.log(1 - rng.random()) / math.log(1 - 1 / BURST))
        found += [at + rng.uniform(0, WITHIN_S) for _ in range(size)]
    return sorted(found)


SHAPES: dict[str, Callable[[float, float, float, random.Random], list[float]]] = {
    "flat": flat,
    "diurnal": diurnal,
    "bursty": bursty,
}


def day(shape: str, count: float, hours: tuple[float, float], seed: int) -> list[Request]:
    """About `count` requests between two hours of a day, that begins with the first; 22 and 6 are the night's."""
    begin, end = hours
    long = (end - begin) % 24 or 24
    return [Request(at) for at in SHAPES[shape](count, 0.0, long * HOUR, random.Random(seed))]


def trace(path: Path) -> list[Request]:
    """One request a line: seconds or an ISO 8601 time, then its work if it is not 1. The first comes at 0.

    ValueError names a line that says neither, or no time or work that can be.
    """
    found = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if words := line.replace(",", " ").split():
            try:
                found.append(one := Request(_seconds(words[0]), float(words[1]) if words[1:] else 1.0))
            except ValueError:
                raise ValueError(f"{path}, line {number}: no seconds and no ISO 8601 time: {line[:40]!r}") from None
            if not (math.isfinite(one.at) and 0 < one.work < math.inf):
                raise ValueError(f"{path}, line {number}: a time is finite, and a work above 0: {line[:40]!r}")
    first = min((request.at for request in found), default=0.0)
    return sorted((Request(one.at - first, one.work) for one in found), key=lambda one: one.at)


def _seconds(word: str) -> float:
    try:
        return float(word)
    except ValueError:
        return datetime.fromisoformat(word).timestamp()
