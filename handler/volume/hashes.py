"""What is in people's files and folders, by SHA-256: found once for each file as it is, and remembered on the volume.

    hashes.json      for each path, below the volume if it is there, size, time of change, and hash; written at once

Serving never needs to write it: then each start finds the hash anew, beside the loading of the weights.
"""

import hashlib
import json
import logging
import threading
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from handler.core.errors import WeightsCorrupt
from handler.core.untrusted import Malformed, load, shaped
from handler.volume.given import File, Given, identity
from handler.volume.manifest import write_atomically
from handler.volume.room import reading
from handler.volume.single import AGAIN

REMEMBERED = "hashes.json"
BUFFER = 8 << 20
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Known:
    """A file as it was when its hash was found."""

    size: int
    mtime_ns: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Remembered:
    """All that a volume knows, by path."""

    files: dict[str, Known]


class Hashing:
    """The hashes of what is `given`, found beside other work; what was found is remembered on `volume`."""

    def __init__(self, given: Iterable[Given], volume: Path) -> None:
        self._given, self._volume = tuple(given), volume
        self._found: list[str] = []
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="hashing", daemon=True)
        self._thread.start()

    def wait(self) -> str:
        """All by their names and hashes, as pictures say it; raises what went wrong with one."""
        self._thread.join()
        if self._failure:
            raise self._failure
        return ", ".join(f"{one.name}@sha256:{each}" for one, each in zip(self._given, self._found, strict=True))

    def _run(self) -> None:
        try:
            self._found += [content(one, self._volume) for one in self._given]
        except Exception as error:  # whatever it is, who waits must hear of it
            self._failure = error


def contents(given: Iterable[Given], volume: Path, find: bool = True) -> str:
    """The hashes of all that is given, which tell it from all others; empty if there is nothing, or, unless they shall
    be found now, if one is not known.
    """
    found = [content(one, volume, find) for one in given]
    return ",".join(found) if all(found) else ""


def content(given: Given, volume: Path, find: bool = True) -> str:
    """The hash of a file; of a folder, that of its files' hashes and names, a line each, as `sha256sum` has them."""
    found = {name: sha256(file, volume) if find else known(file, volume) for name, file in given.files.items()}
    if not all(found.values()):
        return ""
    if not given.is_folder:
        return next(iter(found.values()))
    return hashlib.sha256("".join(f"{found[name]}  {name}\n" for name in sorted(found)).encode()).hexdigest()


def known(file: File, volume: Path) -> str:
    """The hash of a file, as it is now, if somebody has found it."""
    if file.entry:
        return file.entry.sha256
    (_, _, changed, size), said = file.identity, remembered(volume).get(key(file.path, volume))
    return said.sha256 if said and (said.size, said.mtime_ns) == (size, changed) else ""


def names(said: str) -> tuple[str, ...]:
    """What `Hashing.wait` told of."""
    return tuple(each.rpartition("@sha256:")[0] for each in said.split(", ")) if said else ()


def sha256(file: File, volume: Path) -> str:
    """In hex; of what was fetched, as it came. WeightsCorrupt if the file is not the one any more; VolumeFailed."""
    if found := known(file, volume):
        return found
    found = _summed(file)
    _remember(key(file.path, volume), Known(file.size, file.identity[2], found), volume)
    return found


def key(path: Path, volume: Path) -> str:
    """What a file is remembered by: a volume is mounted here and there."""
    return path.relative_to(volume).as_posix() if path.is_relative_to(volume) else str(path)


def remembered(volume: Path) -> Mapping[str, Known]:
    """What a volume knows of its files' hashes; nothing if that cannot be read."""
    try:
        return shaped(Remembered, load(volume / REMEMBERED)).files
    except (OSError, Malformed):
        return {}


def _summed(file: File) -> str:
    whole, buffer = hashlib.sha256(), bytearray(BUFFER)
    with reading(file.path), file.path.open("rb", buffering=0) as opened:
        while count := opened.readinto(buffer):
            whole.update(memoryview(buffer)[:count])
        after = file.path.stat()
    if identity(after) != file.identity:
        raise WeightsCorrupt(f"{file.path} was replaced, or written to, while it was read. {AGAIN}")
    return whole.hexdigest()


def _remember(path: str, known: Known, volume: Path) -> None:
    """Beside what others have found meanwhile; of two at once the later one's is kept, and the other found again."""
    files = {**remembered(volume), path: known}
    try:
        write_atomically(volume / REMEMBERED, json.dumps(asdict(Remembered(files)), indent=1).encode() + b"\n")
    except OSError as error:
        log.debug("the hash of %s is not remembered: %s", path, error)
