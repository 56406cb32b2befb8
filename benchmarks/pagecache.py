"""The page cache, emptied of what a start reads: all of it where the system lets us, else file by file."""

import contextlib
import itertools
import os
import sys
import sysconfig
from collections.abc import Iterable
from pathlib import Path

ALL = Path("/proc/sys/vm/drop_caches")
PACKAGE = Path(__file__).parent.parent / "handler"
PYTHON = (sys.prefix, sysconfig.get_path("stdlib"))  # the environment, and the installation that it is made from


def drop(volume: Path) -> str:
    """Empty it, and say how. What a running process has mapped stays in it; so file by file torch's libraries may."""
    os.sync()  # what is not written yet would stay
    with contextlib.suppress(OSError):
        ALL.write_text("3")
        return "drop_caches"
    drop_files([PACKAGE, volume, *map(Path, PYTHON)])
    return "posix_fadvise"


def drop_files(folders: Iterable[Path]) -> None:
    """The same for all files below these."""
    for folder, _, names in itertools.chain.from_iterable(map(os.walk, folders)):
        for name in names:
            with contextlib.suppress(OSError), open(os.path.join(folder, name), "rb", buffering=0) as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def cached(file: Path) -> bool:
    """Whether its first page is there. Raises OSError where the file system cannot tell."""
    with file.open("rb") as opened:
        try:
            return os.preadv(opened.fileno(), [bytearray(1)], 0, os.RWF_NOWAIT) == 1
        except BlockingIOError:
            return False
