"""Where files of ComfyUI's routes lie: a folder of the volume, or one that goes with the worker.

A name is relative, with slashes, such as `output/portraits/ComfyUI_00001_.png`. It never leads out of the folder that
it begins with, not by a link either; whoever asks for one that would is told so before anything is touched.
"""

import contextlib
import errno
import math
import os
import re
import secrets
import stat
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Protocol

from handler.core.errors import InvalidValue, OutsideFolder
from handler.core.scratch import Scratch

LONGEST = 200  # bytes of a part of a name: file systems take 255, and a counter is added
DEEPEST = 8  # folders in folders
DRIVE = re.compile("[A-Za-z]:")
# Controls, ends of lines, what turns the direction of writing, and halves of characters.
STEERING = re.compile("[\0-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
TRIES = 100  # to write into a folder that others remove
PART = ".part"  # the end of what is being written
WRITTEN = re.compile(rf"[0-9a-f]{{16}}\{PART}")
DEAD_S = 24 * 3600.0  # after which nobody writes it any more


@dataclass(frozen=True, slots=True, order=True)
class Entry:
    """A file of `size` bytes, written at `time`, in seconds since 1970."""

    time: float
    name: str
    size: int


class Shelf(Protocol):
    """Files by name. Every function may take as long as a volume does, so none is for an event loop.

    They raise OSError where the volume fails; FileNotFoundError is a file that is not there.
    """

    shared: bool  # whether other workers may see it
    look_s: float  # between two looks for something new

    def get(self, name: str) -> bytes:
        """What is in a file."""

    def has(self, name: str) -> bool:
        """Whether there is such a file."""

    def put(self, name: str, data: bytes, anew: bool = False) -> None:
        """Write a file, whole or not at all; FileExistsError if it shall be `anew` and is not."""

    def remove(self, name: str) -> None:
        """Be it there or not."""

    def entries(self, folder: str, deep: bool = False) -> list[Entry]:
        """The files of a folder, the oldest first; if `deep`, of the folders in it too."""

    def now(self) -> float:
        """What time it is there, in seconds since 1970: a machine's own clock may be ahead."""

    def sweep(self, folder: str, since: float) -> None:
        """Remove, of a folder and those in it, what was last written before then and never whole."""


def named(folder: str, subfolder: str, name: str) -> str:
    """The name of a file in one of the folders. InvalidValue or OutsideFolder if it could mean another place."""
    if not name or "/" in name or name in (".", ".."):
        raise InvalidValue("filename should be the name of a file, without a folder.", "filename")
    parts = [part for part in subfolder.split("/") if part not in ("", ".")]
    if subfolder.startswith("/") or ".." in parts or len(parts) > DEEPEST:
        raise OutsideFolder("subfolder should be a folder inside the one that type names.", "subfolder")
    for part in (*parts, name):
        _require_plain(part)
    return "/".join((folder, *parts, name))


def _require_plain(part: str) -> None:
    """Refuse what some system takes for more than a name, or would not take at all."""
    if "\\" in part or DRIVE.match(part) or STEERING.search(part) or part.endswith(PART) or part.startswith("."):
        raise InvalidValue("A file's name should be plain: no backslash, drive, dot before it or control character.")
    if len(part.encode(errors="surrogatepass")) > LONGEST:
        raise InvalidValue(f"A file's name should have at most {LONGEST} bytes.")


class Disk:
    """Files below `root`, which is made when the first is written."""

    look_s = 0.3

    def __init__(self, root: Path, shared: bool) -> None:
        self._root, self.shared = root, shared

    def get(self, name: str) -> bytes:
        """See `Shelf`."""
        # Without waiting: what lies there may be a pipe, which nobody writes to.
        try:
            number = os.open(self._place(name), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except NotADirectoryError:  # what is named as its folder is a file
            raise FileNotFoundError(name) from None
        if not stat.S_ISREG(os.fstat(number).st_mode):
            os.close(number)
            raise FileNotFoundError(name)
        with os.fdopen(number, "rb") as file:
            return file.read()

    def has(self, name: str) -> bool:
        """See `Shelf`."""
        place = self._place(name)
        return place.is_file() and not place.is_symlink()

    def put(self, name: str, data: bytes, anew: bool = False) -> None:
        """See `Shelf`. Other workers may look for a name at the same time: it is one's who makes the file first."""
        place = self._place(name)
        for _ in range(TRIES):  # whoever removes the last file of a folder removes that too
            with contextlib.suppress(FileNotFoundError):
                return self._put(place, data, anew)
            time.sleep(secrets.randbelow(1000) / 1e6)  # or both go on in step
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name)

    def _put(self, place: Path, data: bytes, anew: bool) -> None:
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
        except FileExistsError:  # which would mean the file
            if not place.parent.is_file():
                raise FileNotFoundError from None
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(place.parent)) from None
        part = place.with_name(f"{secrets.token_hex(8)}{PART}")
        if anew:
            os.close(os.open(place, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        try:
            part.write_bytes(data)
            part.replace(place)
        except OSError:
            for each in (part, *([place] if anew else [])):
                each.unlink(missing_ok=True)
            raise

    def remove(self, name: str) -> None:
        """See `Shelf`."""
        place = self._place(name)
        place.unlink(missing_ok=True)
        if place.parent.parent != self._root:
            with contextlib.suppress(OSError):  # there is more in its folder
                place.parent.rmdir()

    def entries(self, folder: str, deep: bool = False) -> list[Entry]:
        """See `Shelf`."""
        return sorted(self._found(self._place(folder), PurePosixPath(folder), DEEPEST if deep else 0))

    def now(self) -> float:
        """See `Shelf`."""
        with contextlib.suppress(OSError), tempfile.TemporaryFile(dir=self._root) as file:
            return os.fstat(file.fileno()).st_mtime
        return time.time()

    def sweep(self, folder: str, since: float) -> None:
        """See `Shelf`."""
        top = self._place(folder)
        for place, _, names in () if top.is_symlink() else os.walk(top):
            for part in (Path(place) / name for name in names if WRITTEN.fullmatch(name)):
                with contextlib.suppress(OSError):
                    if part.lstat().st_mtime < since:
                        part.unlink()

    def _found(self, place: Path, name: PurePosixPath, depth: int) -> Iterator[Entry]:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(place) as there:
            for each in there:
                with contextlib.suppress(FileNotFoundError):  # gone meanwhile
                    if each.is_file(follow_symlinks=False) and not each.name.endswith(PART):
                        about = each.stat(follow_symlinks=False)
                        yield Entry(about.st_mtime, str(name / each.name), about.st_size)
                    elif depth and each.is_dir(follow_symlinks=False):
                        yield from self._found(Path(each.path), name / each.name, depth - 1)

    def _place(self, name: str) -> Path:
        """Where a file is; a link on the way there leads nowhere."""
        place = self._root / name
        top = (self._root / name.partition("/")[0]).absolute()
        real = Path(os.path.realpath(self._root)) / name  # `resolve` raises where links go round in circles
        if Path(os.path.realpath(place.parent)) != real.parent or not place.is_relative_to(top):
            raise OutsideFolder("What leads there is a link.", "subfolder")
        return place


def prune(shelf: Shelf, folder: str, most: int, oldest_s: float, largest: float = math.inf) -> None:
    """Remove what is older than `oldest_s` seconds, and all but the latest `most` files, and `largest` bytes, there."""
    now, size = shelf.now(), 0
    since = now - oldest_s
    shelf.sweep(folder, now - DEAD_S)
    for place, entry in enumerate(reversed(shelf.entries(folder, deep=True))):
        size += entry.size
        lost = not entry.size and entry.time < now - DEAD_S  # its name was taken, and its writer killed
        if place >= most or entry.time < since or size > largest or lost:
            shelf.remove(entry.name)


def disk_of(volume: Path, folder: str = "comfy") -> Disk | None:
    """A folder of the volume, if it can be written."""
    there = next((each for each in (volume / folder, volume, *volume.parents) if each.exists()), volume)
    return Disk(volume / folder, shared=True) if os.access(there, os.W_OK | os.X_OK) else None


class Passing(Disk):
    """One that goes with this worker, or with the next start."""

    def __init__(self) -> None:
        self._scratch = Scratch()
        super().__init__(self._scratch.path / "comfy", shared=False)
