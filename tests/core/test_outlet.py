"""What a process tells never makes it wait, fail or end: whoever reads it, or does not."""

import fcntl
import os
import select
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from handler.core.outlet import LINES, LONGEST, Outlet, stacks, unblocked

LEAST = 4096  # bytes, the smallest pipe that Linux makes


@contextmanager
def pipe() -> Iterator[tuple[int, int]]:
    """A reader and a writer of a pipe that holds little."""
    reader, writer = os.pipe()
    if sys.platform == "linux":
        fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, LEAST)
    try:
        yield reader, writer
    finally:
        os.close(writer)
        os.close(reader)


def read(reader: int) -> bytes:
    return os.read(reader, 1 << 20)


def emptied(outlet: Outlet, reader: int) -> bytes:
    """All that waits to be written: what is left would go to whatever file has the pipe's number next."""
    told = b""
    while not outlet.drain(0.05) or select.select([reader], [], [], 0)[0]:
        told += read(reader) if select.select([reader], [], [], 0)[0] else b""
    return told


def test_lines_come_out_whole_and_in_order() -> None:
    with pipe() as (reader, writer):
        outlet = Outlet(writer)
        print("one", 2, file=outlet)
        outlet.write("begun, ")
        teller = threading.Thread(target=print, args=("of another thread",), kwargs={"file": outlet})
        teller.start()
        teller.join()
        outlet.write("ended\nand")
        assert outlet.drain()
        assert read(reader).decode().splitlines() == ["one 2", "of another thread", "begun, ended", "and"]
        assert not outlet.dropped


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells what was written at once")
def test_lines_that_come_one_after_another_are_written_together_as_far_as_a_pipe_takes_them_whole() -> None:
    reader, writer = os.pipe2(os.O_DIRECT)
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 1 << 20)  # room for 256 writes, whatever their size
    outlet, lines = Outlet(writer), [f"{each:050d}\n" for each in range(200)]
    try:
        for line in lines:
            outlet.write(line)
        assert outlet.drain(30)
        told = list[bytes]()
        while select.select([reader], [], [], 0)[0]:
            told.append(read(reader))
    finally:
        os.close(writer)
        os.close(reader)
    assert b"".join(told).decode() == "".join(lines)
    assert len(told) < len(lines) / 2
    assert max(map(len, told)) <= select.PIPE_BUF


def test_what_cannot_be_spelled_is_told_in_escapes() -> None:
    with pipe() as (reader, writer):
        outlet = Outlet(writer)
        print("a lone \ud800, an é", file=outlet)
        assert outlet.drain()
        assert read(reader).decode() == "a lone \\ud800, an é\n"


def test_a_pipe_that_nobody_reads_costs_lines_and_no_time() -> None:
    with pipe() as (reader, writer):
        outlet = Outlet(writer)
        for each in range(3 * LINES):
            print(f"{each:0100d}", file=outlet)
        assert not outlet.drain(0.01)  # the process may end: it says so, and waits no longer
        assert LINES <= outlet.dropped <= 2 * LINES
        kept = emptied(outlet, reader).splitlines()  # whoever reads again gets what was kept
        assert kept == sorted(kept)
        assert kept[0] == b"0" * 100


@pytest.mark.parametrize("kind", ["gone", "full", "closed", "none"])
def test_a_reader_that_is_gone_costs_lines(kind: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    fds = {"gone": writer, "full": os.open("/dev/full", os.O_WRONLY), "closed": reader, "none": None}
    outlet = Outlet(fds[kind])
    try:
        print("one", file=outlet)
        print("two", file=outlet, flush=True)
        assert outlet.drain()
        assert outlet.dropped == 2
    finally:
        os.close(writer)
        os.close(fds["full"] or 0)


def test_a_line_is_no_longer_than_a_pipe() -> None:
    with pipe() as (reader, writer):
        outlet = Outlet(writer)
        outlet.write("x" * (2 * LONGEST) + "\nnext\n")
        assert emptied(outlet, reader).splitlines() == [b"x" * (LONGEST - 1), b"next"]


def test_a_line_that_never_ends_is_told_in_parts() -> None:
    with pipe() as (reader, writer):
        outlet = Outlet(writer)
        for _ in range(LONGEST):
            outlet.write("..")
        assert select.select([reader], [], [], 30)[0]
        assert emptied(outlet, reader)


def test_without_room_for_a_thread_lines_wait_for_one() -> None:
    with pipe() as (reader, writer):
        outlet = Outlet(writer)
        before = threading.stack_size(1 << 62)
        try:
            print("first", file=outlet)
        finally:
            threading.stack_size(before)
        print("second", file=outlet)
        assert outlet.drain(30)
        assert read(reader) == b"first\nsecond\n"


def test_a_fork_tells_its_own_lines() -> None:
    with pipe() as (reader, writer):
        outlet = Outlet(writer)
        print("parent", file=outlet)
        assert outlet.drain()
        outlet.write("begun before, ")
        if not (child := os.fork()):
            print("child", file=outlet)
            os._exit(not outlet.drain(10))
        assert os.waitpid(child, 0)[1] == 0
        print("ended after", file=outlet)
        assert outlet.drain()
        assert read(reader) == b"parent\nchild\nbegun before, ended after\n"


def test_the_same_pipe_by_a_writer_that_never_waits() -> None:
    with pipe() as (reader, writer):
        free = unblocked(writer)
        try:
            assert not os.get_blocking(free)
            assert os.get_blocking(writer)  # which other processes have too
            os.write(free, b"told")
            assert read(reader) == b"told"
        finally:
            os.close(free)


def test_what_is_no_pipe_is_written_as_it_is() -> None:
    with open(os.devnull, "w") as file:
        assert unblocked(file.fileno()) == file.fileno()


def test_stacks_name_what_each_thread_does() -> None:
    held, ready = threading.Event(), threading.Event()

    def waits_here() -> None:
        ready.set()
        held.wait()

    thread = threading.Thread(target=waits_here)
    thread.start()
    try:
        assert ready.wait(30)
        told = stacks()
        assert "waits_here" in told
        assert "test_stacks_name_what_each_thread_does" in told
    finally:
        held.set()
        thread.join()


STACKS = """
import os, resource
from handler.core.outlet import stacks
_, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
print(stacks())
"""


def test_stacks_of_a_process_that_can_open_no_more_files() -> None:
    done = subprocess.run([sys.executable, "-c", STACKS], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("(no stacks: Too many open files)")


NATIVE = """
import os, sys
from handler.core import outlet
outlet.install()
os.write(2, b"x" * 3000)
try:
    os.write(2, b"x" * 3000)
except BlockingIOError:
    print("native code is not held up", flush=True)
print("nor is Python", file=sys.stderr)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux opens a pipe anew")
def test_native_code_is_not_held_up_either_and_the_process_ends() -> None:
    with pipe() as (_, writer):
        done = subprocess.run(
            [sys.executable, "-c", NATIVE], stdout=subprocess.PIPE, stderr=writer, text=True, timeout=60, check=False
        )
    assert (done.returncode, done.stdout) == (0, "native code is not held up\n")


def test_a_process_that_ends_has_told_all() -> None:
    told = subprocess.run(
        [sys.executable, "-c", "from handler.core import outlet; outlet.install(); [print(n) for n in range(1000)]"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert told.stdout.split() == [str(number) for number in range(1000)]


CLOSED = """
import os, subprocess, sys
from handler.core import outlet
outlet.install()
print("nobody reads this")
assert min(os.pipe()) > 2
subprocess.run([sys.executable, "-c", "print('nor this', flush=True)"], check=True)
"""


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_nothing_takes_the_number_of_a_standard_descriptor_that_is_closed(closed: str) -> None:
    """Else a socket has it, and libuv ends the process with SIGABRT when that is closed."""
    command = ["sh", "-c", f'exec "$@" {closed}', "-", sys.executable, "-c", CLOSED]
    assert subprocess.run(command, stdin=subprocess.DEVNULL, timeout=60, check=False).returncode == 0


def test_an_end_before_the_first_line_holds_up_no_later_one() -> None:
    with pipe() as (reader, writer):
        outlet = Outlet(writer)
        assert outlet.drain()
        print("later", file=outlet)
        assert outlet.drain()
        assert read(reader) == b"later\n"
