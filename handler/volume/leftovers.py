"""What writers that were killed have left behind: hidden names beside what they wrote, which all readers pass over.

Nobody can tell from another machine whether a writer lives. One that has written nothing for a day, by the volume's own
clock, does not: what it left goes with the next publication or record beside it. Links are not followed.
"""

import logging
import os
import re
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from handler.core.errors import VolumeFailed
from handler.volume.room import discard, inside

NAME = re.compile(r"\..+\.[0-9a-f]{8}")  # as `publishing.py` and `write_atomically` make them
PLACES = (
    *("", "baked/*", "baked/*/*", "boots", "fetched/loras", "models/*/*", "receipts/*/*"),
    *("spend/*", "sweeps/*/*", "vae/*/*", "weights/*/*"),
)
DEAD_S = 24 * 3600.0
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Leftover:
    """A file or folder; how long nobody has written to it, by the volume's clock."""

    path: Path
    bytes: int
    age_s: float


def leftovers(volume: Path) -> list[Leftover]:
    """All on `volume`; VolumeFailed where nobody can tell."""
    places = [folder for pattern in PLACES for folder in (volume.glob(pattern) if pattern else [volume])]
    now = _clock(volume)
    return [one for folder in places if not NAME.fullmatch(folder.name) for one in _in(folder, now)]


def sweep(folder: Path, now: float) -> None:
    """Remove what the dead left in `folder`, where it is `now`, in seconds; what cannot be removed stays."""
    try:
        dead = [one for one in _in(folder, now) if one.age_s > DEAD_S]
    except VolumeFailed as error:
        log.warning("what was left behind is not looked for: %s", error.message)
        return
    for one in dead:
        log.info("%s was left by a process that was killed, and is removed", one.path)
        with suppress(OSError):
            one.path.unlink() if one.path.is_symlink() or not one.path.is_dir() else discard(one.path)


def _in(folder: Path, now: float) -> Iterator[Leftover]:
    for path in inside(folder):
        if NAME.fullmatch(path.name):
            with suppress(OSError):  # its writer has just put it in place
                found = [path.lstat(), *(each.lstat() for each in _below(path))]
                size, written = sum(status.st_size for status in found), max(status.st_mtime for status in found)
                yield Leftover(path, size, now - written)


def _below(path: Path) -> Iterator[Path]:
    for folder, folders, files in os.walk(path):
        yield from (Path(folder) / name for name in (*folders, *files))


def _clock(volume: Path) -> float:
    """What time it is there; here, where nothing can be written."""
    with suppress(OSError), tempfile.TemporaryFile(dir=volume) as file:
        return os.fstat(file.fileno()).st_mtime
    return time.time()
