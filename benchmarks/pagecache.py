"""The page cache, emptied of what a start reads: all of it where the system lets us, else file by file."""

import contextlib
import os
import sys
import sysconfig
from collections.abc import Iterable
from pathlib import Path

ALL = Path("/proc/sys/vm/drop_caches")
PACKAGE = Path(__file__).parent.parent / "handler"
PYTHON = {sys.prefix, sys.base_prefix, *(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib"))}


def drop(volume: Path) -> str:
    """Empty it, and say how. What a running process has mapped stays in it; so file by file torch's libraries may."""
    os.sync()  # what is not written yet would stay
    with contextlib.suppress(OSError):
        ALL.write_text("3")
        return "drop_caches"
    drop_files([PACKAGE, volume, *map(Path, PYTHON)])
    return "posix_fadvise"


def drop_files(folders: Iterable[Path]) -> None:
    """The same for all files below these, each once however many names it has."""
    for file in {path.resolve() for folder in folders for path in folder.rglob("*") if path.is_file()}:
        with contextlib.suppress(OSError), file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def cached(file: Path) -> bool:
    """Whether its first page is there. Raises OSError where the file system cannot tell."""
    with file.open("rb") as opened:
        try:
            return os.preadv(opened.fileno(), [bytearray(1)], 0, os.RWF_NOWAIT) == 1
        except BlockingIOError:
            return False
