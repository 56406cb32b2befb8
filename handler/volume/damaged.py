"""Baked weights that a start found damaged while it read them: marked, so that no later start reads them in vain.

    baked/<id>/<folder>/damaged.json   what was wrong, and when; it goes with the folder, once that is baked again

Serving never needs to write it: then each start finds out anew.
"""

import contextlib
import json
import logging
from datetime import UTC, datetime
from pathlib import Path

from handler.core.untrusted import Malformed, load
from handler.volume.manifest import write_atomically
from handler.volume.room import reading

MARK = "damaged.json"
LONGEST = 64 << 10  # bytes of a mark
log = logging.getLogger(__name__)


def marked(folder: Path) -> str:
    """What a start found wrong with `folder`; empty if none has. VolumeFailed if nobody can tell."""
    with reading(path := folder / MARK):
        try:
            return str(load(path, LONGEST).get("reason") or f"{path} marks it")
        except FileNotFoundError:
            return ""
        except Malformed:
            return f"{path} marks it"


def mark(folder: Path, why: str) -> None:
    """Leave word of what is wrong with `folder`, if the volume takes it."""
    said = {"reason": why, "when": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"}
    try:
        write_atomically(folder / MARK, json.dumps(said, indent=1).encode() + b"\n")
    except OSError as error:
        log.warning("%s cannot be marked as damaged: %s", folder, error.strerror or error)


def unmark(folder: Path) -> None:
    """It was read again, all of it, and is whole: what was wrong was not the folder."""
    with contextlib.suppress(OSError):
        (folder / MARK).unlink()
