"""Where the files of a fetch come in: hidden in the folder to fill, and each fetch's own.

Locks cannot be relied on: on NFS, Lustre and mounts of object stores they may fail, or lock nothing. So two fetches to
one folder may both bring a file, and each puts its own in place, whole; neither touches what comes to the other.
"""

import hashlib
import os
import threading
from contextlib import suppress
from functools import cache
from pathlib import Path

from handler.volume.leftovers import sweep
from handler.volume.room import discard, inside

BOOT = Path("/proc/sys/kernel/random/boot_id")
PIDS = Path("/proc/self/ns/pid")  # in which numbers of processes mean something


def incoming(folder: Path) -> Path:
    """This fetch's own place in `folder`."""
    thread = hashlib.sha256(f"{threading.get_ident()}".encode()).hexdigest()
    return folder / f".coming-{_machine()}-{os.getpid()}.{thread[:8]}"


def begin(folder: Path) -> None:
    """Make room: what came to a fetch that was killed here goes, and elsewhere, if that was long ago."""
    mine = f".coming-{_machine()}-"
    discard(own := incoming(folder))
    for path in inside(folder):
        process = path.name.removeprefix(mine).partition(".")[0]
        if path.name.startswith(mine) and process.isdecimal() and _gone(int(process)):
            discard(path)
    own.mkdir()
    sweep(folder, own.stat().st_mtime)


def _gone(process: int) -> bool:
    with suppress(PermissionError):
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            return True
    return False


@cache
def _machine() -> str:
    """What tells the processes that this one can see from all others; this process alone where nothing does."""
    try:
        seen = BOOT.read_text() + os.readlink(PIDS)
    except OSError:
        seen = os.urandom(16).hex()
    return hashlib.sha256(seen.encode()).hexdigest()[:16]
