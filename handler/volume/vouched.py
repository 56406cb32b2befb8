"""What vouches for the bytes of a pinned revision: the sums that the hub named when it was first fetched to a volume.

A commit names its files, but the hub does not show how: another hub, or this one another day, may have others for it.
So what came first is written down, and whoever fetches the same again, for any model, gets that or nothing.
"""

import hashlib
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING

from handler.core.errors import FetchFailed
from handler.core.untrusted import Malformed, load
from handler.volume.files import Item
from handler.volume.manifest import Entry, summarize, write_atomically
from handler.volume.room import reading

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoFile

FOLDER = Path("fetched/sums")


def record(volume: Path, item: Item) -> Path:
    """Where its sum is: each file has a record of its own, for other fetches write theirs at the same time."""
    repository = item.repository
    return volume / FOLDER / repository.name.replace("/", "--") / repository.revision / f"{item.file}.json"


def require(volume: Path, item: Item, file: "RepoFile") -> None:
    """FetchFailed if the hub now says that the file is another than the first time."""
    path = record(volume, item)
    if (first := _first(path)) not in ("", _sum(file)):
        raise FetchFailed(
            f"{item.file} of {item.repository.name} at {item.repository.revision} is not what was fetched first: the "
            f"hub names {_sum(file)}, then it named {first}. A commit's files never change, so ask who runs this hub; "
            f"to trust it nevertheless, remove {path}."
        )


def remember(volume: Path, item: Item, file: "RepoFile") -> None:
    """Write down which file has come, if it is the first time."""
    path = record(volume, item)
    if not _first(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, dumps({"sum": _sum(file)}).encode())


def _first(path: Path) -> str:
    """What came first; empty if nothing has."""
    with reading(path):
        try:
            return str(load(path)["sum"])
        except FileNotFoundError:
            return ""
        except (Malformed, KeyError):
            raise FetchFailed(f"{path} is damaged; remove it, and the hub is believed once more.") from None


def came(volume: Path, item: Item, path: Path) -> Entry | None:
    """The checksums of what is at `path`, if that is what came first; the hub is not asked."""
    kind, _, wanted = _first(record(volume, item)).partition(" ")
    if not wanted or not path.is_file():
        return None
    entry = summarize(path)
    return entry if wanted == (entry.sha256 if kind == "sha256" else _blob(path.read_bytes())) else None


def _blob(data: bytes) -> str:
    """What git calls a file."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def _sum(file: "RepoFile") -> str:
    return f"sha256 {file.lfs.sha256}" if file.lfs else f"git {file.blob_id}"


def verified(path: Path, file: "RepoFile") -> Entry | None:
    """The checksums of what is at `path`, if that is what the hub has."""
    if not sized(path, file):
        return None
    entry = summarize(path)
    if file.lfs:
        return entry if entry.sha256 == file.lfs.sha256 else None
    return entry if _blob(path.read_bytes()) == file.blob_id else None  # small: the hub knows git's name for it alone


def sized(path: Path, file: "RepoFile") -> bool:
    """Whether there is a file of that size."""
    return path.is_file() and path.stat().st_size == file.size
