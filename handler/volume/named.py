"""Files that requests name, in folders of the volume: LoRAs, embeddings.

A name never leads out of these folders, not by a link either, and nothing but safetensors is ever read.
"""

import difflib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from hashlib import file_digest
from pathlib import Path, PurePosixPath

from handler.core.errors import InvalidValue
from handler.core.loras import nameable

SUFFIX = ".safetensors"
PICKLES = (".pt", ".pth", ".ckpt", ".bin", ".pickle", ".pkl")
LISTED = 1000  # files that a list looks at
REMEMBERED = 1024  # of whose content something is known
NEAR = 3  # names that are told where one is not there
Stamp = tuple[Path, int, int, int]  # a file, its size, when it was written last, and changed in any way


@dataclass(frozen=True, slots=True)
class Folders:
    """Folders of the volume, whose files go before those of the same name in the next; `param` is who names them."""

    param: str
    folders: tuple[str, ...]

    def found(self, asked: str, volume: Path) -> tuple[str, Path]:
        """The name as it is listed, and the file. InvalidValue if there is none, which says what there is."""
        name = asked.removesuffix(SUFFIX)
        if not _named(name):
            told = f"'{asked:.80}' is no name of a file below {self.folders[0]}/ on the volume."
            raise InvalidValue(f"{self.param}: {told}", self.param)
        for folder in (volume / each for each in self.folders):
            path = _real(folder / f"{name}{SUFFIX}")
            if not path.is_relative_to(_real(folder)):
                raise InvalidValue(f"{self.param}: '{asked:.80}' leads out of its folder.", self.param)
            if path.is_file():
                return name, path
        raise InvalidValue(f"{self.param}: {self._missing(asked, name, volume)}", self.param)

    def files(self, volume: Path) -> dict[str, Path]:
        """Names that a request may have, and files."""
        found: dict[str, Path] = {}
        for folder in (volume / each for each in self.folders):
            inside = _real(folder)
            for path in _walked(folder):
                name = path.relative_to(folder).as_posix().removesuffix(SUFFIX)
                if not (_named(name) and nameable(name)) or name.endswith(SUFFIX):
                    continue
                if len(found) < LISTED and name not in found and _real(path).is_relative_to(inside):
                    found[name] = path
        return found

    def _missing(self, asked: str, name: str, volume: Path) -> str:
        bare = str(PurePosixPath(name).with_suffix("")) if name.endswith(PICKLES) else name
        places = [(volume / folder / f"{bare}{suffix}", suffix) for folder in self.folders for suffix in PICKLES]
        if pickled := [suffix for path, suffix in places if path.is_file()]:
            return f"'{bare}{pickled[0]}' is a pickle, which could run anything; save it as safetensors."
        known = sorted(self.files(volume))
        if not known:
            put = f"put safetensors files below {self.folders[0]}/ on the volume"
            return f"there is no '{asked:.80}', nor any other: {put}."
        last = {each.rpartition("/")[2].lower(): each for each in reversed(known)}
        near = [last[each] for each in difflib.get_close_matches(name.rpartition("/")[2].lower(), last, NEAR)]
        told = f"Did you mean {' or '.join(near)}?" if near else f"There is {', '.join(known[:NEAR])}."
        return f"there is no '{asked:.80}' on the volume. {told}"


def stamp(path: Path) -> Stamp:
    """What changes with the file."""
    told = path.stat()
    return path, told.st_size, told.st_mtime_ns, told.st_ctime_ns


@lru_cache(REMEMBERED)
def hashed(path: Path, size: int, written: int, changed: int) -> str:
    """The SHA-256 of the file, read once for each of its stamps."""
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()


def _named(name: str) -> bool:
    """Whether that is a name of a file in these folders."""
    return not ({"\\", "\0"} & {*name} or PurePosixPath(name).is_absolute() or {"..", ".", ""} & {*name.split("/")})


def _real(path: Path) -> Path:
    """Where links lead; unlike Path.resolve it bears those that lead to themselves."""
    return Path(os.path.realpath(path))


def _walked(folder: Path) -> Iterator[Path]:
    for place, folders, files in os.walk(folder):
        folders[:] = sorted(each for each in folders if not each.startswith("."))
        paths = (Path(place) / each for each in sorted(files) if each.endswith(SUFFIX) and not each.startswith("."))
        yield from (path for path in paths if os.path.isfile(path))  # not what cannot be looked at
