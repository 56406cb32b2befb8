"""What ComfyUI's page keeps at its server: workflows, and its settings. All who use a worker share them.

They lie on the archive's shelf in a folder of their own, which is never tidied: where it is full, nothing more is kept.
"""

import posixpath
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, unquote

from handler.api.comfy.shelf import Entry, Shelf, named
from handler.core.errors import BodyTooLarge, FileMissing, VolumeFailed
from handler.core.untrusted import Malformed, parse

FOLDER = "userdata"
SETTINGS = "comfy.settings.json"
MOST, BYTES = 500, 64 << 20  # files, and what they come to


@dataclass(frozen=True, slots=True)
class Kept:
    """A file as the page lists it: its path below a folder, its bytes, and when it was written, in ms since 1970."""

    path: str
    size: int
    modified: int


def read(shelf: Shelf, path: str) -> bytes:
    """What is in a file; FileMissing if there is none. For a thread, as are all of these."""
    try:
        return shelf.get(_place(path))
    except FileNotFoundError:
        raise FileMissing("There is no such file.", "file") from None


def write(shelf: Shelf, path: str, data: bytes, anew: bool = False) -> Kept:
    """Keep a file; FileExistsError if it shall be `anew` and is not, BodyTooLarge if there is no room."""
    place = _place(path)
    others = [entry for entry in shelf.entries(FOLDER, deep=True) if entry.name != place]
    if len(others) >= MOST or sum(entry.size for entry in others) + len(data) > BYTES:
        raise BodyTooLarge(f"The editor may keep {MOST} files here, of {BYTES >> 20} MB in all. Remove some of them.")
    try:
        shelf.put(place, data, anew)
    except FileExistsError:
        raise
    except OSError as error:
        raise VolumeFailed(f"The file cannot be kept: {error.strerror}.") from None
    return info(shelf, path)


def remove(shelf: Shelf, path: str) -> None:
    """Remove a file; FileMissing if there is none."""
    if not shelf.has(place := _place(path)):
        raise FileMissing("There is no such file.", "file")
    shelf.remove(place)


def move(shelf: Shelf, path: str, other: str, anew: bool) -> Kept:
    """Give a file another name; what has that already is in the way if it shall be `anew`: FileExistsError."""
    data = read(shelf, path)
    if _place(path) != _place(other):
        write(shelf, other, data, anew)
        remove(shelf, path)
    return info(shelf, other)


def info(shelf: Shelf, path: str) -> Kept:
    """One file; FileMissing if there is none."""
    place = _place(path)
    for entry in shelf.entries(place.rpartition("/")[0]):
        if entry.name == place:
            return _kept(entry, "")
    raise FileMissing("There is no such file.", "file")


def listed(shelf: Shelf, folder: str, deep: bool) -> Iterator[Kept]:
    """The files of a folder, the oldest first; if `deep`, of those in it too."""
    top = _place(posixpath.join(folder, "x")).removesuffix("/x")
    return (_kept(entry, folder) for entry in shelf.entries(top, deep))


def settings(shelf: Shelf) -> dict[str, Any]:
    """The page's, by name; none where they cannot be read."""
    try:
        found = parse(read(shelf, SETTINGS))
    except (FileMissing, Malformed):
        return {}
    return found if isinstance(found, dict) else {}


def _place(path: str) -> str:
    """Where a file lies. A name may begin with a dot, as that of the page's bookmarks does; on the shelf none does."""
    subfolder, name = posixpath.split(path)
    parts = [_shelved(part) for part in subfolder.split("/")]
    return named(FOLDER, "/".join(parts), _shelved(name))


def _shelved(part: str) -> str:
    escaped = part.replace("%", quote("%"))
    return f"%2E{escaped[1:]}" if part.startswith(".") and part.strip(".") else escaped


def _kept(entry: Entry, folder: str) -> Kept:
    path = unquote(entry.name.removeprefix(f"{FOLDER}/"))
    return Kept(posixpath.relpath(path, folder) if folder else path, entry.size, round(entry.time * 1000))
