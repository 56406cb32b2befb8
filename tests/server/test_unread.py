"""A server whose words nobody reads, or that was stopped for a while: it serves, drains and ends as others do."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from test_faults import faulty

import forked
from threads import until

TESTS = Path(__file__).parent.parent
PATIENCE_S = 120.0
SERVE = [sys.executable, "-m", "handler", "serve", "--port", "0"]
FAULTY = [sys.executable, str(TESTS / "doubles/faulty.py"), "--port", "0"]


@dataclass
class Unread:
    """A server that said on a pipe where it listens and that it is ready, and to which nobody has listened since."""

    process: "subprocess.Popen[Any]"
    url: str
    reader: int

    def draw(self, prompt: str = "a red circle") -> int:
        payload = {"prompt": prompt, "seed": 5}
        return httpx.post(f"{self.url}/v1/images/generations", json=payload, timeout=PATIENCE_S).status_code

    def told_to_stop(self) -> int:
        self.process.terminate()
        return self.process.wait(PATIENCE_S)


@contextlib.contextmanager
def unread(command: list[str], both: bool = False) -> Iterator[Unread]:
    """Start a server over a pipe that holds little, and read until it is ready."""
    reader, writer = os.pipe()
    os.set_inheritable(writer, True)
    environ = {**os.environ, "PYTHONPATH": str(TESTS.parent), "KINDLING_HANG_S": "60"}
    stdout = writer if both else subprocess.DEVNULL
    process = forked.Popen(
        command, cwd=TESTS.parent, env=environ, stdin=subprocess.DEVNULL, stdout=stdout, stderr=writer
    )
    os.close(writer)
    told = b""
    try:
        while b"is ready on" not in told:
            more = os.read(reader, 1 << 16)
            assert more, told.decode()
            told += more
        found = re.search(r"listening on (http://\S+),", told.decode())
        assert found
        yield Unread(process, found[1], reader)
    finally:
        process.kill()
        with process:
            process.wait()
        with contextlib.suppress(OSError):
            os.close(reader)


def test_a_reader_that_is_gone_costs_lines_and_no_picture() -> None:
    with unread(FAULTY, both=True) as server:
        os.close(server.reader)
        assert server.draw("fine") == 200
        until(lambda: dropped(server.url) > 0)  # they leave by a thread of their own
        assert server.told_to_stop() == 0


def test_a_worker_that_loses_its_gpu_ends_though_nobody_reads() -> None:
    with unread(FAULTY, both=True) as server:
        os.close(server.reader)
        assert server.draw("lose") == 500
        assert server.process.wait(PATIENCE_S) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux makes a pipe small")
def test_a_pipe_that_nobody_empties_holds_up_nothing() -> None:
    import fcntl

    with unread(FAULTY, both=True) as server:
        fcntl.fcntl(server.reader, fcntl.F_SETPIPE_SZ, 4096)
        for _ in range(40):  # each logs a line and tells each step
            assert server.draw("fine") == 200
        assert httpx.get(f"{server.url}/ping", timeout=PATIENCE_S).status_code == 200
        assert server.told_to_stop() == 0


def dropped(url: str) -> float:
    told = httpx.get(f"{url}/metrics").text
    found = re.search(r"^kindling_log_lines_dropped_total (\S+)$", told, re.M)
    assert found, told
    return float(found[1])


@pytest.mark.parametrize("kind", ["unread", "gone", "full", "closed"])
def test_a_start_past_its_budget_ends_whatever_becomes_of_its_words(kind: str) -> None:
    reader, writer = os.pipe()
    if sys.platform == "linux":
        import fcntl

        fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
    os.set_blocking(writer, False)
    with contextlib.suppress(BlockingIOError):
        os.write(writer, b"x" * 4096)  # full before it says anything
    os.set_blocking(writer, True)
    if kind == "gone":
        os.close(reader)
    stderr = {"full": os.open("/dev/full", os.O_WRONLY)}.get(kind, writer)
    command = ["sh", "-c", " ".join(["exec", *SERVE, "2>&-"])] if kind == "closed" else SERVE
    environ = {**os.environ, "KINDLING_COLD_START_BUDGET_S": "1"}  # imports alone take longer
    process = subprocess.Popen(command, cwd=TESTS.parent, env=environ, stdout=subprocess.DEVNULL, stderr=stderr)
    try:
        assert process.wait(PATIENCE_S) == 124
    finally:
        process.kill()
        with process:
            process.wait()
        for number in {reader, writer, stderr}:
            with contextlib.suppress(OSError):
                os.close(number)


def test_a_worker_that_was_stopped_for_a_while_has_not_hung() -> None:
    with faulty(KINDLING_HANG_S="4") as server:
        held = server.hold()
        os.kill(server.process.pid, signal.SIGSTOP)
        time.sleep(8)  # this is what is tried: time passes, and nothing of the process runs
        os.kill(server.process.pid, signal.SIGCONT)
        server.release()
        assert held.result().status_code == 200
        assert server.post("fine").status_code == 200
