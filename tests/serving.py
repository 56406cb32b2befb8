"""A real `python -m handler serve` process on a free loopback port, for tests and benchmarks; or an app in this one."""

import asyncio
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from queue import Queue
from typing import Any

import uvicorn

import forked

ROOT = Path(__file__).parent.parent
BOOT_S = 180


class Served:
    """A running server: its process, address, and the lines it has printed on stderr so far."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.lines: list[str] = []
        self._fresh: Queue[str | None] = Queue()
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()
        self.url = self.wait_for(r"listening on (http://\S+), loading")[1]

    def _read(self) -> None:
        assert self.process.stderr
        for line in self.process.stderr:
            self.lines.append(line)
            self._fresh.put(line)
        self._fresh.put(None)

    def wait_for(self, pattern: str) -> re.Match[str]:
        """Wait for a line of stderr; fails if the process ends first."""
        while (line := self._fresh.get(timeout=BOOT_S)) is not None:
            if match := re.search(pattern, line):
                return match
        raise AssertionError(f"the server ended without saying {pattern!r}:\n{''.join(self.lines)}")


def editors_site(folder: Path) -> str:
    """What PYTHONPATH says so that a process finds ComfyUI's page, an empty one, in `folder`."""
    page = folder / "comfyui_frontend_package/static"
    page.mkdir(parents=True)
    (page.parent / "__init__.py").touch()
    (page / "index.html").touch()
    return f"{folder}{os.pathsep}{ROOT}"


def children(pid: int) -> dict[int, list[str]]:
    """The processes that this one has begun, each with its words; threads and processes may end while they are read."""
    begun = [int(each) for path in Path(f"/proc/{pid}/task").glob("*/children") for each in _read(path).split()]
    return {each: _read(Path(f"/proc/{each}/cmdline")).split("\0") for each in begun}


def _read(path: Path) -> str:
    with suppress(OSError):
        return path.read_text()
    return ""


@contextmanager
def serving(
    environ: Mapping[str, str] | None = None, *arguments: str, ready: bool = True, anew: bool = False
) -> Iterator[Served]:
    """Start a server, wait until it is ready (or only listening), and end it afterwards.

    `anew` is for tests of how it starts: in a new interpreter, with its imports before it.
    """
    clean = {name: value for name, value in os.environ.items() if not name.startswith("KINDLING_")}
    process = (subprocess if anew else forked).Popen(
        [sys.executable, "-m", "handler", "serve", "--port", "0", *arguments],
        cwd=ROOT,
        env={**clean, **(environ or {})},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        served = Served(process)
        if ready:
            served.wait_for("is ready on")
        yield served
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        with process:  # closes its pipe
            pass


class Prompt(uvicorn.Server):
    """uvicorn that ends when it is told to, instead of looking ten times a second whether it was."""

    async def main_loop(self) -> None:
        self.loop, self.told = asyncio.get_running_loop(), asyncio.Event()
        if not await self.on_tick(0):
            await self.told.wait()

    def end(self) -> None:
        self.should_exit = True
        with suppress(AttributeError):  # it has not begun, and will not
            self.loop.call_soon_threadsafe(self.told.set)


@contextmanager
def live(app: Any) -> Iterator[str]:
    """The address of `app`, served over real HTTP from a thread; its lifespan begins and ends with this."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = Prompt(uvicorn.Config(app, log_level="critical", lifespan="on", ws="none"))
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.end()
            thread.join()
