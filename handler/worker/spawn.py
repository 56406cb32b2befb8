"""Processes of this program that another one begins, talks to over lines, and takes along when it ends."""

import contextlib
import ctypes
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from multiprocessing import Pipe
from multiprocessing.connection import Connection

from handler.core.scratch import sweep
from handler.core.secrets import without_secrets

LIBC, PDEATHSIG = ctypes.CDLL(None), 1  # prctl's PR_SET_PDEATHSIG: the signal for when the thread that began this ends
END_S = 5.0  # for a process to end by itself
LOOK_S = 1.0


def die_together() -> None:
    """Let this process end with who began it, also if it is stopped before it is anything but a fork of that."""
    if sys.platform == "linux":
        LIBC.prctl(PDEATHSIG, signal.SIGKILL)


class Child:
    """`python -m MODULE WORDS... FD...` at the other end of `lines`; it ends with the thread that makes this.

    `environ` goes over this process's own environment, of which it gets no secrets.
    """

    def __init__(self, module: str, words: list[str], environ: Mapping[str, str], lines: int = 1) -> None:
        pairs = [Pipe() for _ in range(lines)]
        self.lines = [ours for ours, _ in pairs]
        with contextlib.ExitStack() as stack:
            numbers = [stack.enter_context(theirs).fileno() for _, theirs in pairs]
            self.process = subprocess.Popen(  # noqa: S603 this program, with words of our own
                [sys.executable, "-m", module, *words, *map(str, numbers)],
                stdin=subprocess.DEVNULL,
                pass_fds=numbers,
                env=without_secrets(os.environ) | dict(environ),
                preexec_fn=die_together,
            )

    @property
    def line(self) -> Connection:
        """The first of them."""
        return self.lines[0]

    @property
    def ended(self) -> str:
        """How it has ended, which its line has told."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return f"has ended (exit code {self.process.wait(1)})"
        return "has ended (its end of the line is closed)"

    def hang_up(self) -> None:
        """Tell it to end, from any thread: whoever reads the first line comes to its end too."""
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(self.line.fileno())) as line:
            line.shutdown(socket.SHUT_RDWR)

    def leave(self) -> None:
        """Close the lines, by which it is told to end."""
        for line in self.lines:
            line.close()

    def close(self, seconds: float = END_S) -> None:
        """The same, and wait so long for its end, which then comes by force, but not to one stuck in a driver."""
        self.leave()
        for wait_s in (seconds, END_S):
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(wait_s)
            self.process.kill()
        sweep()


def heard(line: Connection, seconds: float) -> bool:
    """Whether anything comes within `seconds`; of a time in which nothing ran, frozen or stopped, a second counts."""
    while seconds > 0:
        if line.poll(min(seconds, LOOK_S)):
            return True
        seconds -= LOOK_S
    return False


def attend(*numbers: int, last: Callable[[], object] = lambda: None) -> list[Connection]:
    """In such a process, first: its ends of the lines. Once the first is closed at the other end, `last` is called and
    the process ends, whatever it does, be it stuck in native code or not.
    """
    for number in (signal.SIGINT, signal.SIGTERM):  # they reach all of a terminal or a container; who began it decides
        signal.signal(number, signal.SIG_IGN)
    for line in numbers:
        os.set_inheritable(line, False)  # else whatever this one begins would hold its lines when it is gone
    threading.Thread(target=_end_with, args=[numbers[0], last], name="leader", daemon=True).start()
    return [Connection(number) for number in numbers]


def _end_with(line: int, last: Callable[[], object]) -> None:
    hung_up = select.poll()
    hung_up.register(line, 0)
    hung_up.poll()
    try:
        last()
        threading.Event().wait(END_S / 2)  # for the main thread, which reads that too
    finally:
        os._exit(0)
