"""Folders for temporary files, which go with the process that made them, or with the next start.

One that is killed, or ends while it starts, removes nothing. So each holds a lock on its folders, and the next start on
this machine removes what nobody holds.
"""

import contextlib
import fcntl
import hashlib
import os
import shutil
import tempfile
import weakref
from functools import cache
from pathlib import Path
from typing import NoReturn, Self

NEW, HELD = "kindling-new-", "kindling-scratch-"  # a folder gets the second name once it is locked, and not before
BOOT = Path("/proc/sys/kernel/random/boot_id")
OTHERS = ("/tmp", "/var/tmp", "/usr/tmp", os.curdir)  # noqa: S108, where Python's `tempfile` has them unless told otherwise


class Scratch:
    """A new, empty folder for this user alone, at `path`. It goes with this object, by `close`, or by `leave`."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix=NEW))
        lock = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        with contextlib.suppress(OSError):  # where there are no locks, what a killed process leaves stays
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.path = self.path.rename(self.path.with_name(self.path.name.replace(NEW, prefix())))
        self.close = weakref.finalize(self, _close, self.path, lock, os.getpid())
        _open.add(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


_open = weakref.WeakSet[Scratch]()


def leave(code: int) -> NoReturn:
    """End this process here, without the interpreter's own end, but with its folders, which nothing may still need."""
    try:
        for each in [*_open]:
            each.close()
    finally:
        os._exit(code)


def sweep() -> None:
    """Remove the folders of this user's processes that have ended; raises nothing.

    Also where nothing can be written, so that Python passes it over: they may be what fills it.
    """
    for place in {*map(os.environ.get, ("TMPDIR", "TEMP", "TMP")), *OTHERS, tempfile.tempdir} - {None, ""}:
        with contextlib.suppress(OSError), os.scandir(place) as found:
            for folder in [each.path for each in found if each.name.startswith(prefix())]:
                with contextlib.suppress(OSError):  # it is held, or somebody else's
                    _take(folder)


@cache
def prefix() -> str:
    """How names of folders begin whose locks this kernel knows: on a network's disk others' would seem free to it."""
    try:
        boot = BOOT.read_bytes()
    except OSError:
        boot = os.urandom(16)
    return f"{HELD}{hashlib.sha256(boot).hexdigest()[:8]}-"


def _take(folder: str) -> None:
    lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(lock).st_uid == os.geteuid():
            _remove(folder)
    finally:
        os.close(lock)


def _close(folder: Path, lock: int, maker: int) -> None:
    if os.getpid() == maker:  # and not a fork of it
        _remove(folder)
    os.close(lock)


def _remove(folder: Path | str) -> None:
    with contextlib.suppress(RecursionError):  # so deep
        shutil.rmtree(folder, ignore_errors=True)  # torch's processes may still write
