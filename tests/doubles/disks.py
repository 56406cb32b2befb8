"""Disks that fail, for what runs inside: one that takes no more, and one where a chosen call ends in a chosen error.

`failing` stands before every call on files that Python makes (`CALLS` of os and fcntl, and open), looks whether it is
about the folder, and passes it on, or fails as the system would. What libraries in C or Rust do by themselves it does
not see. `calls` has what was seen, so a test can first watch an operation and then fail each call that it makes.
"""

import builtins
import fcntl
import io
import os
import re
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

CALLS: dict[str, tuple[str, ...]] = {  # what a person calls them, and who makes them
    "open": ("open",),
    "stat": ("stat", "lstat", "fstat", "statvfs"),
    "list": ("listdir", "scandir"),
    "read": ("read", "readv", "pread", "preadv"),
    "write": ("write", "writev", "pwrite", "sendfile"),
    "fsync": ("fsync", "fdatasync"),
    "mkdir": ("mkdir",),
    "rename": ("rename", "replace"),
    "unlink": ("unlink", "remove", "rmdir"),
    "utime": ("utime",),
}
HANGING = """
import os, runpy, sys, threading
from handler.volume import patience
patience.PATIENCE_S = 2.0  # of who looks at it in vain
opened, name = os.open, sys.argv.pop(1)

def hang(path, *given, **others):
    if os.path.basename(path) == name:
        threading.Event().wait()
    return opened(path, *given, **others)

os.open = hang
runpy.run_module("handler", run_name="__main__", alter_sys=True)
"""
RANDOM = re.compile(r"\b[0-9a-f]{8}\b")  # in the names of what is not whole yet


@contextmanager
def full_disk(room: int = 0) -> Iterator[None]:
    """Files of this process may have `room` bytes. Python ignores the signal that comes with it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def hanging(name: str, *words: str) -> list[str]:
    """The command that runs ours where no file called `name` can ever be opened, as on a network mount that is dead."""
    return [sys.executable, "-c", HANGING, name, *words]


@dataclass(frozen=True)
class Call:
    """One of `CALLS`, or flock, on a path within the folder; random parts of names are *."""

    name: str
    path: str

    def __str__(self) -> str:
        return f"{self.name} {self.path}"


@contextmanager
def failing(folder: Path, number: int = 0, chosen: Callable[[Call], bool] = lambda _: False) -> Iterator[list[Call]]:
    """Calls on `folder` and what is in it that are `chosen` fail with the errno `number`, as often as they are made.

    Yields the calls, as they are made.
    """
    calls: list[Call] = []

    def look(name: str, path: Any, at: int | None = None) -> None:
        full = _path(path, at)
        if full == str(folder) or full.startswith(f"{folder}/"):
            calls.append(call := Call(name, RANDOM.sub("*", full[len(str(folder)) + 1 :])))
            if chosen(call):
                raise OSError(number, os.strerror(number), full)

    with mock.patch.multiple(os, **_guarded(os, look)), mock.patch.multiple(fcntl, flock=_one(fcntl, "flock", look)):
        opened = _opener(look)
        with mock.patch.object(io, "open", opened), mock.patch.object(builtins, "open", opened):
            yield calls


Look = Callable[..., None]


def _path(path: Any, at: int | None) -> str:
    """In full, of a path, a descriptor, or a name in a folder that is open as `at`."""
    if hasattr(path, "fileno"):
        path = path.fileno()
    if isinstance(path, int):
        return os.readlink(f"/proc/self/fd/{path}")
    name = os.fsdecode(path)
    return name if at is None else os.path.join(os.readlink(f"/proc/self/fd/{at}"), name)


def _guarded(module: ModuleType, look: Look) -> dict[str, Any]:
    return {made: _one(module, made, look, name) for name, all_made in CALLS.items() for made in all_made}


def _one(module: ModuleType, made: str, look: Look, name: str = "") -> Any:
    real = getattr(module, made)

    def call(*given: Any, **others: Any) -> Any:
        look(name or made, given[0] if given else ".", others.get("dir_fd", others.get("src_dir_fd")))
        return real(*given, **others)

    return call


def _opener(look: Look) -> Any:
    """In the place of `open`: what it opens reads and writes by Python's own layers, above one that looks first."""
    real = io.open

    class Raw(io.FileIO):
        def readinto(self, buffer: Any) -> int | None:
            look("read", self.fileno())
            return super().readinto(buffer)

        def readall(self) -> bytes:
            look("read", self.fileno())
            return super().readall()

        def write(self, data: Any) -> int | None:
            look("write", self.fileno())
            return super().write(data)

    def opened(file: Any, mode: str = "r", buffering: int = -1, *given: Any, **others: Any) -> Any:
        if isinstance(file, int) or "+" in mode or others.get("opener"):
            return real(file, mode, buffering, *given, **others)
        look("open", file)
        raw = Raw(file, mode.replace("b", "").replace("t", ""))
        if buffering == 0:
            return raw
        buffered = io.BufferedReader(raw) if "r" in mode else io.BufferedWriter(raw)
        return buffered if "b" in mode else io.TextIOWrapper(buffered, *given, **others)

    return opened
