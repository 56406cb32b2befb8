"""A server's process seen from outside, and requests of which it is seen what became of them: for endurance.py."""

import asyncio
import json
import os
import socket
import statistics
import time
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx

from serving import OPENAI, quantile

JSON = {"content-type": "application/json"}
SMALL = {"prompt": "a red circle on a blue background", "size": "128x128", "seed": 1}
SAMPLE_S = 0.5
PROBE_S = 0.1  # between two probes
HZ = os.sysconf("SC_CLK_TCK")
PING = b"GET /ping HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n"


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


async def settled(http: httpx.AsyncClient) -> int:
    """How many requests are still waiting or drawn after a while without any client."""
    for _ in range(100):
        state = (await http.get("/health/ready")).json()
        if not (left := int(state["waiting"]) + int(state["drawing"])):
            break
        await asyncio.sleep(0.1)
    return left


async def probing(address: str, seconds: float) -> float | None:
    """How long /ping there takes, in milliseconds: the 99th percentile, each on a connection of its own.

    On another thread: what this one sends and reads may take a while.
    """
    return await asyncio.to_thread(_probing, address, seconds)


def _probing(address: str, seconds: float) -> float | None:
    """By hand: a client of HTTP takes as long as a probe does."""
    took, until, where = list[float](), time.perf_counter() + seconds, urlsplit(address)
    while (begun := time.perf_counter()) < until:
        with socket.create_connection((where.hostname, where.port), 600) as connection:
            connection.sendall(PING)
            answer = connection.recv(1 << 12)
        assert answer.startswith(b"HTTP/1.1 200 "), answer
        took.append(1e3 * (time.perf_counter() - begun))
        time.sleep(PROBE_S)
    return quantile(sorted(took), 0.99)


def worked(stat: Path) -> float:
    """Processor seconds of a process or a thread until now, in user space and in the kernel, by its file in /proc."""
    return sum(map(int, stat.read_text().rpartition(")")[2].split()[11:13])) / HZ


def free_port() -> int:
    """One that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
