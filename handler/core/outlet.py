"""What a process tells, written by threads of their own: no line, whoever tells it, waits, fails or ends anything.

A reader that is gone, a pipe that nobody empties, a full disk: the line is dropped then, and counted.
"""

import atexit
import faulthandler
import io
import os
import select
import stat
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from itertools import accumulate
from queue import Empty, SimpleQueue

LINES = 2000  # that wait to be written; more are dropped
LONGEST = 64 << 10  # characters of a line
AT_ONCE = 64  # lines that are written together
PAUSE_S = 0.05  # after a write: lines that come one after another wake their writer once, and drawing is disturbed less
LAST_S = 0.5  # for the last lines of a process that ends


class Outlet(io.TextIOBase):
    """A text stream over the file descriptor `fd`, or over none. Lines come out whole, in the order they were ended.

    `dropped` counts those that nobody will read. Any thread may write, also one that a signal or a fork interrupts.
    """

    encoding, errors = "utf-8", "backslashreplace"

    def __init__(self, fd: int | None) -> None:
        self._fd = fd
        self.dropped = 0
        self._anew()
        os.register_at_fork(after_in_child=self._anew)

    def _anew(self) -> None:
        """No thread yet, and nothing told, as in a fork: it has its parent's memory, but not its threads."""
        self._begun = threading.local()  # the text of each thread's line so far
        self._lock, self._writing = threading.RLock(), False
        self._lines: SimpleQueue[str | threading.Event] = SimpleQueue()
        self._hurry = threading.Event()  # somebody waits for all to be written

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        if self._fd is None:
            raise io.UnsupportedOperation("fileno")
        return self._fd

    def isatty(self) -> bool:
        return self._fd is not None and os.isatty(self._fd)

    def write(self, text: str) -> int:
        *lines, rest = (getattr(self._begun, "text", "") + text).split("\n")
        for line in lines:
            self._tell(line + "\n")
        self._begun.text = rest
        if len(rest) >= LONGEST:
            self.flush()
        return len(text)

    def flush(self) -> None:
        """Let go of a line that has no end yet; it is written when its turn comes."""
        if rest := getattr(self._begun, "text", ""):
            self._begun.text = ""
            self._tell(rest)

    def drain(self, seconds: float = LAST_S) -> bool:
        """Wait until all that was told is written or dropped; False if that takes longer."""
        self.flush()
        done = threading.Event()
        self._lines.put(done)
        self._hurry.set()
        return not self._writing or done.wait(seconds)

    def _tell(self, text: str) -> None:
        if self._lines.qsize() >= LINES:
            self.dropped += 1
            return
        self._lines.put(text if len(text) <= LONGEST else text[: LONGEST - 1] + text[-1])  # with its end
        with self._lock:
            if not self._writing:
                self._writing = self._start()

    def _start(self) -> bool:
        """Whether a thread writes from now on: there may be no room for one, or this process ends."""
        self._writing = True  # also for what a signal tells meanwhile
        try:
            threading.Thread(target=self._run, name="outlet", daemon=True).start()
        except RuntimeError:
            return False
        return True

    def _run(self) -> None:
        while True:
            told = [self._lines.get(), *self._more()]
            self._write([line.encode(self.encoding, self.errors) for line in told if isinstance(line, str)])
            for each in told:
                if isinstance(each, threading.Event):
                    each.set()
            if len(told) < AT_ONCE and self._hurry.wait(PAUSE_S):
                self._hurry.clear()

    def _more(self) -> Iterator[str | threading.Event]:
        """What else waits already."""
        with suppress(Empty):
            for _ in range(AT_ONCE - 1):
                yield self._lines.get_nowait()

    def _write(self, lines: list[bytes]) -> None:
        """As many together as a pipe takes whole, whoever else writes to it."""
        while lines:
            sizes = accumulate(map(len, lines))
            fit = max(1, sum(size <= select.PIPE_BUF for size in sizes))
            if self._fd is None or not _written(self._fd, b"".join(lines[:fit])):
                self.dropped += fit
            del lines[:fit]


def _written(fd: int, rest: bytes) -> bool:
    """Write all of it, however long that takes; False if nobody will ever read it."""
    try:
        while rest:
            try:
                rest = rest[os.write(fd, rest) :]
            except BlockingIOError:
                select.select([], [fd], [])
    except OSError:
        return False
    return True


OUT, ERR = Outlet(1 if sys.__stdout__ else None), Outlet(2 if sys.__stderr__ else None)


def install() -> None:
    """Let all that this process prints and logs go through outlets. What native code writes to a pipe is dropped when
    nobody empties it. Standard descriptors that are closed lead nowhere from now on: a socket that got such a number
    would end the process when it is closed, by libuv.
    """
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest that is free, which is this one
    for outlet, fd in ((OUT, 1), (ERR, 2)):
        if outlet.isatty() or (free := unblocked(fd)) == fd:
            continue
        os.dup2(free, fd)
        os.close(free)
    sys.stdout, sys.stderr = OUT, ERR


def dropped() -> int:
    """How many lines of this process nobody will read."""
    return OUT.dropped + ERR.dropped


def unblocked(fd: int) -> int:
    """A descriptor of the same pipe that never makes its writer wait, nor changes that for others; else `fd` itself."""
    with suppress(OSError):
        if stat.S_ISFIFO(os.fstat(fd).st_mode):
            return os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    return fd


def stacks() -> str:
    """The stacks of all threads, as text; or why there are none."""
    try:
        reader, writer = os.pipe()
    except OSError as error:  # no descriptor is free, perhaps the very reason why somebody asks
        return f"(no stacks: {error.strerror})\n"
    with open(reader, encoding=ERR.encoding, errors=ERR.errors) as text:
        with open(writer, "wb") as dump:
            os.set_blocking(writer, False)  # what the pipe does not hold is cut off
            faulthandler.dump_traceback(file=dump)
        return text.read()


@atexit.register
def drain() -> None:
    """Wait a moment for what was told to be written: this process ends."""
    for outlet in (OUT, ERR):
        outlet.drain()
