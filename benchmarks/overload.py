"""Ten times as many requests as are served: a mode of endurance.py.

The crowd is one program in C (clients/flood.c), since all cores are the server's too. What else took processor time
meanwhile is told in percent of one core: the crowd, the server's event loop and all the server, drawing included; and
what was not the server's nor the crowd's, without which a figure says nothing: probes take one or two.
"""

import argparse
import asyncio
import json
import statistics
import time
from collections import Counter
from collections.abc import Awaitable
from pathlib import Path
from typing import Any

from flooding import Crowd, crowd
from serving import OPENAI, Server
from watched import HZ, SMALL, Watchdog, probing, worked

SIZES = ("128x128", "256x256")
CLIENTS, TIMES = 4, 10
WARM_S = 10.0
KINDS, IDLE = 8, (3, 4)  # of time in /proc/stat, but those that are part of another; in these nothing ran


def request(body: dict[str, Any]) -> str:
    """As it is sent."""
    sent = json.dumps(body)
    head = (f"POST {OPENAI} HTTP/1.1", "Host: 127.0.0.1", "Content-Type: application/json")
    return "\r\n".join((*head, f"Content-Length: {len(sent)}", "", sent))


async def overload(server: Server, watch: Watchdog, options: argparse.Namespace) -> dict[str, Any]:
    """`TIMES` as much as capacity for `--seconds`, `--rounds` times, at one size after the other."""
    found: dict[str, Any] = {}
    with crowd(server.address) as clients:
        for size in SIZES:
            asked = request(SMALL | {"size": size})
            await clients.closed(asked, CLIENTS, 1)  # the first of a size takes longer
            watch.samples = []
            async with watch.running():
                rounds = [await _round(server, clients, asked, options) for _ in range(options.rounds)]
            ratio = statistics.median(each["goodput_of_capacity"] for each in rounds)
            found[size] = {"goodput_of_capacity_p50": ratio, **watch.growth(), "rounds": rounds}
    return found | {"lost": sum(each["lost"] for size in SIZES for each in found[size]["rounds"])}


async def _round(server: Server, clients: Crowd, asked: str, options: argparse.Namespace) -> dict[str, Any]:
    """Capacity just before and just after, for a shared machine is not always as fast."""
    before, *_ = await _watched(server, clients.closed(asked, CLIENTS, WARM_S))
    told, probes, ping = await _watched(
        server,
        clients.open(asked, TIMES * before["drawn_per_s"], options.seconds),
        probing(options.probes, options.seconds),
        probing(server.address, options.seconds),
    )
    after, *_ = await _watched(server, clients.closed(asked, CLIENTS, WARM_S))
    capacity = (before["drawn_per_s"] + after["drawn_per_s"]) / 2
    return {
        "capacity": [before, after],
        "overload": told,
        "goodput_of_capacity": round(told["drawn_per_s"] / capacity, 3),
        "lost": told.pop("broken"),
        "probes_p99_ms": probes,
        "ping_p99_ms": ping,
    }


async def _watched(server: Server, crowds: Awaitable[dict[str, Any]], *others: Awaitable[Any]) -> list[Any]:
    """What a crowd tells, with where the processor time went until then; and what others tell beside it."""
    begun = _processor(server)
    told, *rest = await asyncio.gather(_counted(server, begun, crowds), *others)
    return [told, *rest]


async def _counted(server: Server, begun: dict[str, float], crowds: Awaitable[dict[str, Any]]) -> dict[str, Any]:
    told, since = await crowds, begun.pop("clock")
    ended = _processor(server)
    seconds, used = ended["clock"] - since, {name: ended[name] - before for name, before in begun.items()}
    used |= {"crowd": told["cpu_s"], "others": used.pop("machine") - used["server"] - told["cpu_s"]}
    all_ = Counter(told["answers"]) + Counter(told["late"])
    return {
        "sent_per_s": round(told["sent"] / told["seconds"], 2),
        "drawn_per_s": round(told["answers"]["2xx"] / told["seconds"], 2),
        "answers": dict(all_),
        "broken": told["broken"],
        "refused_p50_ms": told["refused_p50_ms"],
        "percent_of_a_core": {name: round(100 * each / seconds, 1) for name, each in used.items()},
        "server_ms_a_picture": round(1e3 * (used["server"] - used["event loop"]) / max(1, all_["2xx"]), 1),
    }


def _processor(server: Server) -> dict[str, float]:
    """Seconds of processor time until now: of the server, of its event loop's thread, and of all that runs here."""
    home = Path(f"/proc/{server.pid}")
    machine = Path("/proc/stat").read_text().split()[1 : 1 + KINDS]
    return {
        "server": worked(home / "stat"),
        "event loop": worked(home / f"task/{server.pid}/stat"),
        "machine": sum(int(each) for i, each in enumerate(machine) if i not in IDLE) / HZ,
        "clock": time.perf_counter(),
    }
