"""What a sweep has measured so far, on the volume: interrupted, the same command goes on from there.

    sweeps/<id>/<device>/facts.json     what is measured, how, and in which versions
    sweeps/<id>/<device>/<candidate>/   its pictures, and outcome.json, written last

The folder goes with `close`, once what came of the sweep is kept elsewhere. One that was made by other facts is of no
use, and goes too.
"""

import json
import shutil
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from handler.core.untrusted import Malformed, load, shaped
from handler.volume.manifest import write_atomically
from handler.volume.receipts import Candidate, Outcome
from handler.volume.room import discard, reading, writing

FACTS, OUTCOME = "facts.json", "outcome.json"


class Journal:
    """The outcomes of one sweep in `place`, as attempted: not yet judged. VolumeFailed if nothing can be kept there."""

    def __init__(self, place: Path, facts: dict[str, Any]) -> None:
        self._place = place
        if _read(place / FACTS) == facts:
            return
        _remove(place)
        self._write(place / FACTS, facts)

    def pictures(self, one: Candidate) -> Path:
        """Where the pictures of `one` are."""
        return self._place / one.name

    def known(self, one: Candidate) -> Outcome | None:
        """What became of `one` before the interruption; None if that is still to be found out."""
        with suppress(Malformed):
            found = shaped(Outcome, _read(self.pictures(one) / OUTCOME))
            return found if found.candidate == one else None
        return None

    def begin(self, one: Candidate) -> Path:
        """An empty folder for the pictures of `one`."""
        folder = self.pictures(one)
        _remove(folder)
        with writing(folder):
            folder.mkdir(parents=True)
        return folder

    def keep(self, outcome: Outcome) -> None:
        """Leave `outcome` for a later run."""
        self._write(self.pictures(outcome.candidate) / OUTCOME, asdict(outcome))

    def _write(self, path: Path, what: dict[str, Any]) -> None:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, json.dumps(what).encode())


def _read(path: Path) -> dict[str, Any] | None:
    """What a file says; None if it is not there, or torn. VolumeFailed if it cannot be read: then nothing goes."""
    with reading(path), suppress(FileNotFoundError, Malformed):
        return load(path)
    return None


def _remove(folder: Path) -> None:
    """VolumeFailed if it cannot be: what is left of another sweep would be taken for this one's."""
    with writing(folder), suppress(FileNotFoundError):
        shutil.rmtree(folder)


def close(place: Path) -> None:
    """The sweep is over, and its results are told."""
    with suppress(OSError):  # first what makes the rest count, should that stay
        (place / FACTS).unlink()
    discard(place)
    with suppress(OSError):  # where sweeps of others are
        place.parent.rmdir()
        place.parent.parent.rmdir()
