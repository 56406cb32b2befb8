"""How cold starts went, for people: one JSON file each in the volume's boots/, kept up to date on the way.

A volume may be read-only, full, or hang for ever, and none of that may touch a start: a thread of its own writes,
and only a start that ends early waits for it, for `PATIENCE_S` at most. A file that still says "starting" belongs to
a process that was killed, in the phase it names.

Which is the newest is what the volume's own clock says of when each was written: those of workers differ. A worker
knows what time it is there from what it has just written; a record of a later date counts as the oldest.
"""

import contextlib
import json
import logging
import math
import os
import queue
import re
import secrets
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from shlex import quote
from typing import Any

from handler.core.birth import Birth
from handler.core.errors import VolumeFailed
from handler.core.untrusted import Malformed, load, shaped
from handler.volume.leftovers import sweep
from handler.volume.manifest import write_atomically
from handler.volume.room import inside, reading, unwritable
from handler.worker.clock import Ledger
from handler.worker.ending import Ending

PATIENCE_S = 2.0
KEPT = 50
AHEAD_S = 60  # others write while this one looks
LONGEST = 1 << 20  # bytes of a record; a longer one is none
OWN = re.compile(r"\d{4}-\d\d-\d\dT\d\d-\d\d-\d\d-.+\.json", re.ASCII)  # as `Birth.identity` begins
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Record:
    """One start's file: its name, what it says, also in words of another version, and the ledger that this makes."""

    boot: str
    said: dict[str, Any]
    ledger: Ledger


class BootLog:
    """Call it with the ledger at every turn of a start; it writes the newest state and never raises.

    If the start's `ending` comes before the next turn, the record says that the start failed.
    """

    def __init__(self, volume: Path, birth: Birth, ending: Ending | None = None) -> None:
        self._folder = volume / "boots"
        self._path = self._folder / f"{birth.identity}.json"
        part = self._folder / f".{self._path.name}.{secrets.token_hex(4)}"  # as leftovers are called
        folder, written, path = (quote(str(each)) for each in (self._folder, part, self._path))
        self._to = f"| (mkdir -p -- {folder} && cat >{written} && mv -- {written} {path})"
        self._ending, self._told = ending or Ending(), False
        self._news: queue.SimpleQueue[bytes | threading.Event | None] = queue.SimpleQueue()
        threading.Thread(target=self._write, name="boot-log", daemon=True).start()

    def __call__(self, ledger: Ledger) -> None:
        """Note `ledger` as it is now; wait a little for the last words of a start that failed or was stopped."""
        self._news.put(_text(ledger).encode())
        self._ending.say(_text(ledger.held), self._to)
        if ledger.outcome in ("failed", "stopped"):
            self.flush()
        if ledger.outcome != "starting":
            self._news.put(None)  # nothing more will come

    def flush(self) -> bool:
        """Wait until all is written, at most `PATIENCE_S`; whether it was."""
        written = threading.Event()
        self._news.put(written)
        return written.wait(PATIENCE_S)

    def _write(self) -> None:
        while (news := self._news.get()) is not None:
            if isinstance(news, threading.Event):
                news.set()
                continue
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
                write_atomically(self._path, news)
                written = True
            except OSError as error:
                written = False
                self._tell_once(error)
            self._tidy(written)  # also a volume that is full

    def _tell_once(self, error: OSError) -> None:
        if not self._told and not isinstance(error, NotADirectoryError):  # which whoever looks for a model tells
            log.warning("%s", unwritable(self._folder.parent, error))
        self._told = True

    def _tidy(self, written: bool) -> None:
        """Of records of a date to come make the oldest, so that whoever reads takes them for old; remove the oldest.

        Only workers' own: what else is there, and where links lead, is other people's.
        """
        with contextlib.suppress(VolumeFailed, OSError):  # of one that cannot be looked at
            own = [
                (at, path) for at, path in _dated(self._folder) if OWN.fullmatch(path.name) and not path.is_symlink()
            ]
            dated = {path: at for at, path in own}
            now = (dated.get(self._path) if written else 0) or math.inf  # else nobody knows what time it is there
            to_come = now + AHEAD_S * 10**9
            if now < math.inf:
                sweep(self._folder, now / 10**9)
            for path in [path for path, at in dated.items() if at > to_come]:
                dated[path] = 0
                with contextlib.suppress(OSError):
                    _make_oldest(path)
            for path in sorted(dated, key=lambda path: (dated[path], path), reverse=True)[KEPT:]:
                if path != self._path:
                    with contextlib.suppress(OSError):
                        path.unlink()


def _text(ledger: Ledger) -> str:
    return json.dumps(asdict(ledger))


def _make_oldest(path: Path) -> None:
    with contextlib.suppress(FileNotFoundError):  # another worker has just removed it
        try:
            os.utime(path, (0, 0))
        except PermissionError:  # another user's, whose dates only that one may change
            path.unlink()


def _newest_first(folder: Path) -> list[Path]:
    """The records there, by when the volume says that they were written last."""
    return [path for _, path in sorted(_dated(folder), reverse=True)]


def _dated(folder: Path) -> list[tuple[int, Path]]:
    """When the volume says that each record was written last, in nanoseconds, 0 if it does not say; and the record."""
    return [(_date(path), path) for path in inside(folder) if path.suffix == ".json" and path.name[0] != "."]


def _date(path: Path) -> int:
    with contextlib.suppress(OSError):  # another worker may have just removed it
        return path.stat().st_mtime_ns
    return 0


def last_boots(volume: Path, count: int) -> list[dict[str, Any]]:
    """The newest ledgers, newest first, each with its file's name as "boot"; damaged ones are left out, and told.

    VolumeFailed if nobody can tell which there are; one that cannot be read is left out too, and told.
    """
    return [_shown(record) for record in islice(records(volume), count)]


def _shown(record: Record) -> dict[str, Any]:
    checked = asdict(record.ledger)
    return {name: checked.get(name, value) for name, value in record.said.items()} | {"boot": record.boot}


def records(volume: Path) -> Iterator[Record]:
    """The newest first, but damaged ones; VolumeFailed as `last_boots`."""
    for path in _newest_first(volume / "boots"):
        try:
            if (said := _load(path)) is not None:
                yield Record(path.stem, said, shaped(Ledger, said))
        except Malformed:
            _tell_odd(path)


def _load(path: Path) -> dict[str, Any] | None:
    try:
        with reading(path), contextlib.suppress(FileNotFoundError):  # another worker has just removed it
            return load(path, LONGEST)
    except VolumeFailed as error:
        log.warning("a start is passed over: %s", error.message)
    return None


@lru_cache(KEPT)
def _tell_odd(path: Path) -> None:
    """Once, for it stays: a server has all records read for each graph whose time it foretells."""
    log.warning("a start is passed over: %s is no record of one", path)
