"""Tests, run in a fork of this process on a copy of a checkout, under a limit.

This process has imported what takes long, and nothing of the project: a fork has it at once, and imports the copy's.
"""

import compileall
import contextlib
import ctypes
import gc
import importlib
import importlib.util
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

# No cache beside the tests, no rewriting of their asserts at each fork: what failed is told by name.
OPTIONS = ("-q", "--assert=plain", "--tb=short", "-p", "no:cacheprovider")
SUBREAPER = 36  # linux/prctl.h: orphans of what we start become our children, so that we can end them
HUNG, GOOD, BAD = -1, 0, 1  # the last two are pytest's


@dataclass(frozen=True, slots=True)
class Ran:
    """How tests ended: pytest's exit code or `HUNG`, who failed, how long it took, and all that was said."""

    code: int
    failed: tuple[str, ...]
    seconds: float
    said: str


class Plugin:
    """Of pytest's: it writes the names of tests that fail to a file, at once, and keeps the order they are named in."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def pytest_runtest_logreport(self, report: Any) -> None:
        """After each phase of a test."""
        if report.failed:
            with self._path.open("a") as file:
                file.write(f"{report.nodeid}\n")

    pytest_collectreport = pytest_runtest_logreport

    @pytest.hookimpl(wrapper=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> Iterator[None]:
        """Those that notice most and soonest are named first, whatever order suits who runs them all."""
        place = {item: i for i, item in enumerate(items)}
        yield
        items.sort(key=lambda item: place[item])


class Trial:
    """A copy of a checkout in which files are changed and tests run."""

    def __init__(self, home: Path) -> None:
        self._home, self.root, self._temporary = home, home / "checkout", home / "tmp"
        self._temporary.mkdir()  # what tests leave there goes with it

    def run(self, tests: Sequence[str], limit_s: float, *options: str) -> Ran:
        """Run tests as they are named to pytest."""
        log, failed = self._home / "log", self._home / "failed"
        for file in (log, failed):
            file.write_text("")
        begun, pid = time.monotonic(), os.fork()
        if not pid:
            self._child([*OPTIONS, *options, f"--basetemp={self._home / 'pytest'}", *tests], log, failed)
        try:
            code = _waited(pid, limit_s)
        finally:
            _end_children()
        said = log.read_text(errors="replace")
        return Ran(code, tuple(failed.read_text().split("\n")[:-1]), time.monotonic() - begun, said)

    def _child(self, options: list[str], log: Path, failed: Path) -> None:
        code = 99
        try:
            os.setsid()
            for file, to in ((os.open(os.devnull, os.O_RDONLY), 0), (os.open(log, os.O_WRONLY), 1), (1, 2)):
                os.dup2(file, to)
            os.chdir(self.root)
            os.environ["PYTHONPATH"] = sys.path[0] = str(self.root)
            os.environ["TMPDIR"] = tempfile.tempdir = str(self._temporary)
            sys.argv = ["pytest"]
            code = int(pytest.main(options, [Plugin(failed)]))
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    @contextlib.contextmanager
    def changed(self, path: str, data: bytes) -> Iterator[None]:
        """Inside, the file `path` holds `data`."""
        file = self.root / path
        before = file.read_bytes()
        Path(importlib.util.cache_from_source(str(file))).unlink(missing_ok=True)  # told apart by whole seconds
        file.write_bytes(data)
        try:
            yield
        finally:
            file.write_bytes(before)


@contextlib.contextmanager
def trials(checkout: Path, heavy: Sequence[str]) -> Iterator[Trial]:
    """A copy of what git knows, or would, of `checkout`; the modules `heavy` are imported once for all that runs."""
    ctypes.CDLL(None).prctl(SUBREAPER, 1, 0, 0, 0)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that no fork goes on without us
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    sys.dont_write_bytecode = True
    _import(heavy)
    with tempfile.TemporaryDirectory(prefix="mutate-", ignore_cleanup_errors=True) as home:
        trial = Trial(Path(home))
        listed = ("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard")
        for name in subprocess.check_output(listed, cwd=checkout, text=True).split("\0"):
            if (checkout / name).is_file():
                (trial.root / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(checkout / name, trial.root / name)
        for command in (("git", "init", "-q"), ("git", "add", "--all")):  # tests ask what is in the repository
            subprocess.run(command, cwd=trial.root, check=True)
        compileall.compile_dir(trial.root, quiet=2)
        yield trial


def _import(heavy: Sequence[str]) -> None:
    sys.modules["torchao"] = None  # a worker hides it from diffusers, which looks but once
    with warnings.catch_warnings(action="ignore"):
        for name in heavy:
            importlib.import_module(name)
    del sys.modules["torchao"]
    gc.freeze()  # pytest collects garbage at its end: seconds, with all of that


def _waited(pid: int, limit_s: float) -> int:
    """The exit code of a child, or `HUNG`."""
    descriptor = os.pidfd_open(pid)
    try:
        ended, _, _ = select.select([descriptor], [], [], limit_s)
    finally:
        os.close(descriptor)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) if ended else HUNG


def _end_children() -> None:
    """End what is left of a run: first our children, then theirs, which are ours by then."""
    while pids := list(_children()):
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def _children() -> Iterator[int]:
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            if int(stat.read_text().rpartition(")")[2].split()[1]) == os.getpid():
                yield int(stat.parent.name)
