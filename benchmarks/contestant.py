"""Servers that peers.py measures: how each is started, and its processes until they are ended."""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx

import report
from serving import OPENAI, Server
from watched import HZ, free_port

ROOT = Path(__file__).parent.parent
SERVERS = Path(__file__).parent / "contestants"
ENVIRONMENT = ROOT / ".venv/peers"
FIRST = {"prompt": "a red circle on a blue background", "seed": 1, "size": "256x256"}
PATIENCE_S = 600.0  # for a start, and for a request: compiling takes minutes on a busy machine
QUEUE = "64"  # requests that may wait at Kindling: its own 32 would refuse some where the peers let all wait
LOADING = 503


@dataclass(frozen=True, slots=True)
class Contestant:
    """How a server is started: by which file of contestants/, or by Kindling's own command where that is empty."""

    file: str = ""
    compiled: bool = False
    peers: tuple[str, ...] = ()  # whom it should be ahead of

    def command(self, port: int, environment: Path) -> list[str]:
        if self.file:
            return [str(environment / "bin/python"), str(SERVERS / self.file)]
        return [sys.executable, "-m", "handler", "serve", "--port", str(port)]

    def variables(self, port: int, folder: Path) -> dict[str, str]:
        """`folder` keeps what an earlier start or a bake has compiled."""
        kept = {"TORCHINDUCTOR_CACHE_DIR": str(folder), "COMPILED": "1"} if self.compiled else {}
        ours = {"KINDLING_VOLUME": str(folder), "KINDLING_QUEUE": QUEUE}
        mine = {"PORT": str(port), **kept} if self.file else ours
        threads = os.environ.get("OMP_NUM_THREADS", "1")
        return report.environment(PYTHONPATH=str(ROOT), OMP_NUM_THREADS=threads, **mine)


CONTESTANTS = {
    "kindling": Contestant(peers=("fastapi", "litserve")),
    "fastapi": Contestant("fastapi_server.py"),
    "litserve": Contestant("litserve_server.py"),
    "kindling-compiled": Contestant(compiled=True, peers=("fastapi-compiled",)),
    "fastapi-compiled": Contestant("fastapi_server.py", compiled=True),
}


class Running:
    """A contestant's processes."""

    def __init__(self, process: "subprocess.Popen[bytes]", address: str, first_picture_s: float) -> None:
        self.process, self.first_picture_s = process, first_picture_s
        self.server = Server(address, timeout=PATIENCE_S)

    def processor_s(self) -> float:
        """What all its processes have worked since their birth."""
        return sum(sum(map(int, fields[11:15])) for fields in map(_stat, self._processes()) if fields) / HZ

    def memory_mb(self) -> dict[str, int]:
        """What they hold now, pages that several map counted once, and the sum of the most that each ever held."""
        held = peak = 0
        for process in self._processes():
            held += _kilobytes(process / "smaps_rollup", "Pss:")
            peak += _kilobytes(process / "status", "VmHWM:")
        return {"held_mb": held // 1024, "peak_mb": peak // 1024}

    def _processes(self) -> list[Path]:
        """Those of its session."""
        every = Path("/proc").glob("[0-9]*")
        return [each for each in every if (fields := _stat(each)) and int(fields[3]) == self.process.pid]


def _stat(process: Path) -> list[str]:
    """The fields behind the name; none if it has ended."""
    with contextlib.suppress(OSError):
        return (process / "stat").read_text().rpartition(")")[2].split()
    return []


def _kilobytes(file: Path, name: str) -> int:
    return next(int(line.split()[1]) for line in file.read_text().splitlines() if line.startswith(name))


@contextlib.contextmanager
def running(name: str, folder: Path, environment: Path = ENVIRONMENT) -> Iterator[Running]:
    """A contestant that has drawn its first picture; ends with all its processes. SystemExit: it draws none."""
    contestant, port = CONTESTANTS[name], free_port()
    address, begun = f"http://127.0.0.1:{port}", time.perf_counter()
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            contestant.command(port, environment), env=contestant.variables(port, folder), cwd=folder,
            stdout=subprocess.DEVNULL, stderr=said, start_new_session=True,
        )  # fmt: skip
        try:
            if not draws(address, process):
                said.seek(0)
                raise SystemExit(f"{name} did not start:\n{said.read()[-2000:].decode(errors='replace')}")
            yield Running(process, address, time.perf_counter() - begun)
        finally:
            end(process)


def draws(address: str, process: "subprocess.Popen[bytes]") -> bool:
    """Ask until it draws; False: it failed, has ended, or draws nothing in `PATIENCE_S`."""
    until = time.perf_counter() + PATIENCE_S
    with httpx.Client(timeout=PATIENCE_S, trust_env=False) as http:
        while process.poll() is None and time.perf_counter() < until:
            with contextlib.suppress(httpx.TransportError):
                if (status := http.post(address + OPENAI, json=FIRST).status_code) != LOADING:
                    return status == 200
            time.sleep(0.005)
    return False


def end(process: "subprocess.Popen[bytes]") -> None:
    for sign in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, sign)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)


def prepare(name: str, folder: Path, environment: Path) -> float:
    """Let a compiled contestant compile, into `folder`; the seconds that took."""
    begun = time.perf_counter()
    if CONTESTANTS[name].file:
        with running(name, folder, environment):
            pass
    else:
        command = [sys.executable, "-m", "handler", "bake", "spark"]
        environ = CONTESTANTS[name].variables(0, folder)
        subprocess.run(command, cwd=ROOT, env=environ, check=True, capture_output=True)
    return round(time.perf_counter() - begun, 2)
