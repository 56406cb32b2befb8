"""Folders for temporary files, which go with the process that made them, however that ends.

One that is killed removes nothing. So each holds a lock on its folders, and who comes later removes what nobody holds.
"""

import contextlib
import fcntl
import os
import shutil
import tempfile
import weakref
from functools import cache
from pathlib import Path
from typing import Self

HELD, NEW = "kindling-scratch-", "kindling-new-"  # no folder has the first name that nobody ever held


class Scratch:
    """A new, empty folder for this user alone, at `path`. It is removed with this object, or by `close`."""

    def __init__(self) -> None:
        _begin()
        self.path = Path(tempfile.mkdtemp(prefix=NEW))
        lock = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        with contextlib.suppress(OSError):  # where there are no locks, what a killed process leaves stays
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.path = self.path.rename(self.path.with_name(self.path.name.replace(NEW, HELD)))
        self.close = weakref.finalize(self, _remove, self.path, lock)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def sweep() -> None:
    """Remove the folders of processes that have ended, and those of other users only where it may; raises nothing."""
    with contextlib.suppress(OSError), os.scandir(tempfile.gettempdir()) as found:
        for folder in [each.path for each in found if each.name.startswith(HELD)]:
            with contextlib.suppress(OSError):  # it is held, or somebody else's
                _take(folder)


def _take(folder: str) -> None:
    lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(lock)


@cache
def _begin() -> None:
    sweep()


def _remove(folder: Path, lock: int) -> None:
    shutil.rmtree(folder, ignore_errors=True)  # torch's processes may still write
    os.close(lock)
