"""What each worker of a volume has cost in a month, in files that all of them read.

    spend/<YYYY-MM>/<identity>.json   a worker's own dollars: it alone writes them, once a minute and at its end
    spend/<YYYY-MM>/<other>.json      those of many that have ended, by identity, in the place of their files

Files that nobody has written for an hour, by the volume's own clock, are folded into one as soon as there are many: how
long a look takes hangs on the workers that run, not on those that ran. It takes no locks: dollars count once for each
identity, the most that any file says, however many files have it; so folding twice, or half, changes no sum.
"""

import json
import logging
import secrets
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from handler.core.untrusted import Malformed, load, shaped
from handler.volume.leftovers import sweep
from handler.volume.manifest import write_atomically

DEAREST = 1000 * 24 * 31  # dollars that one worker can cost in a month: KINDLING_GPU_PRICE is at most 1000 an hour
ENDED_S = 3600.0  # since a file was written; a worker that was frozen for so long writes its own again
MANY = 100  # files of workers that have ended, or of such files
LONGEST = 32 << 20  # bytes of a file; a longer one is none
Dollars = Annotated[float, Field(strict=True, ge=0, le=DEAREST)]
State = tuple[int, int, int]
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Bill:
    """What a file must say; `folded` are the dollars of those that it stands for, and `dollars` then their sum."""

    dollars: Annotated[float, Field(strict=True, ge=0)]
    folded: dict[str, Dollars] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.folded and self.dollars > DEAREST:
            raise ValueError("no worker costs as much")


@dataclass(slots=True)
class Bills:
    """The files of one month, as far as they were read; `unread` are those that cannot be, and why."""

    folder: Path
    unread: dict[str, str] = field(default_factory=dict)
    _known: dict[str, tuple[State, Mapping[str, float]]] = field(default_factory=dict)

    def write(self, identity: str, facts: Mapping[str, Any]) -> None:
        """Put a worker's own file in place; raises OSError. What is old beside it is folded, or goes."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(path := self.folder / f"{identity}.json", json.dumps(facts).encode())
        with suppress(OSError):
            now = path.stat().st_mtime
            sweep(self.folder, now)
            self._fold(now)

    def dollars(self, without: str) -> float:
        """Of all but `without`; files are read again only if they were written again. OSError if nobody can tell."""
        self.unread = {}
        before, names = None, self._names(without)
        while names != before:  # what has gone meanwhile was folded into another
            for name in names:
                self._read(name)
            before = names
            if not self._known.keys() >= set(names):
                names = self._names(without)
        return sum(dollars for identity, dollars in self._each(names).items() if identity != without)

    def _names(self, without: str) -> list[str]:
        found = [path.name for path in self.folder.iterdir() if path.suffix == ".json" and path.name[0] != "."]
        return sorted(name for name in found if name != f"{without}.json")

    def _each(self, names: Iterable[str]) -> dict[str, float]:
        """What each worker has cost: the most that any of these files says."""
        found: dict[str, float] = {}
        for name in names:
            for identity, dollars in self._known.get(name, ((), {}))[1].items():
                found[identity] = max(dollars, found.get(identity, 0.0))
        return found

    def _read(self, name: str) -> None:
        """Of a file that is damaged, or cannot be read, what it said before."""
        try:
            if (state := self._state(name)) != self._known.get(name, ((), {}))[0]:
                bill = shaped(Bill, load(self.folder / name, LONGEST))
                self._known[name] = state, bill.folded or {name.removesuffix(".json"): bill.dollars}
        except FileNotFoundError:
            self._known.pop(name, None)
        except Malformed:
            self.unread[name] = "damaged"
        except OSError as error:
            self.unread[name] = error.strerror or str(error)

    def _state(self, name: str) -> State:
        status = (self.folder / name).stat()
        return status.st_mtime_ns, status.st_size, status.st_ino

    def _fold(self, now: float) -> None:
        """Let one file stand for all that are old. It is there before they go."""
        old = [name for name, (state, _) in self._known.items() if state[0] < (now - ENDED_S) * 1e9]
        if len(old) < MANY or len(old := [name for name in old if self._is_there(name)]) < MANY:
            return
        each = self._each(old)
        told = json.dumps({"dollars": sum(each.values()), "folded": each}).encode()
        write_atomically(self.folder / f"folded-{secrets.token_hex(8)}.json", told)
        for name in old:
            with suppress(OSError):
                if self._state(name) == self._known[name][0]:  # else somebody has just written it
                    (self.folder / name).unlink()
                    del self._known[name]

    def _is_there(self, name: str) -> bool:
        """Whether a file still is, that was read; one that is gone, another worker has folded."""
        if not (there := (self.folder / name).exists()):
            del self._known[name]
        return there
