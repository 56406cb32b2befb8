"""Where the files of a fetch come in: hidden in the folder to fill, which is locked, and each fetch's own.

Locks cannot be relied on: on NFS, Lustre and mounts of object stores they may fail, or lock nothing. So two fetches to
one folder may both bring a file, and each puts its own in place, whole; neither touches what comes to the other. On a
file system of this machine's own a lock means that nobody else fetches: there all that has come to others goes at once.
"""

import errno
import fcntl
import hashlib
import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import IO

from handler.core.errors import VolumeFailed
from handler.volume.leftovers import sweep
from handler.volume.room import discard, inside

BOOT = Path("/proc/sys/kernel/random/boot_id")
PIDS = Path("/proc/self/ns/pid")  # in which numbers of processes mean something
MOUNTS = Path("/proc/self/mountinfo")  # with the number of each file system's device, and its type
OWN = ("ext4", "xfs", "btrfs", "f2fs", "zfs")  # whose locks every container of this machine sees, and no other writes
log = logging.getLogger(__name__)


@contextmanager
def alone(folder: Path) -> Iterator[bool]:
    """Let one process at a time fill `folder`; the lock goes with its process. Whether it surely is the only one."""
    folder.mkdir(parents=True, exist_ok=True)
    with _opened(folder.with_name(f".{folder.name}.lock")) as file:
        locked = True
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.warning("Another process is fetching to %s; waiting for it.", folder)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            log.warning("%s cannot be locked: another process may fetch the same files to it, too.", folder)
            locked = False
        yield locked and _type_of(folder) in OWN


def _type_of(folder: Path) -> str:
    """The type of the file system that `folder` is in; empty where nobody can tell."""
    device = os.stat(folder).st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    with suppress(OSError, ValueError):
        for line in MOUNTS.read_text().splitlines():
            if (words := line.split())[2] == number:
                return words[words.index("-") + 1]
    return ""


def _opened(lock: Path) -> IO[bytes]:
    """The file, made if it is not there. What a link in its place leads to is not ours to touch."""
    try:
        return os.fdopen(os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666), "r+b")
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise VolumeFailed(f"{lock} is a link, which no lock of ours is. Remove it.") from None
        raise


def incoming(folder: Path) -> Path:
    """This fetch's own place in `folder`."""
    thread = hashlib.sha256(f"{threading.get_ident()}".encode()).hexdigest()
    return folder / f".coming-{_machine()}-{os.getpid()}.{thread[:8]}"


def begin(folder: Path, only: bool = False) -> None:
    """Make room: what came to a fetch that was killed here goes, and elsewhere, if that was long ago.

    If this is the `only` one, all that has come to others goes.
    """
    mine = f".coming-{_machine()}-"
    discard(own := incoming(folder))
    for path in inside(folder):
        process = path.name.removeprefix(mine).partition(".")[0]
        known = path.name.startswith(mine) and process.isdecimal() and _gone(int(process))
        if known or (only and path.name.startswith(".coming-")):
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
