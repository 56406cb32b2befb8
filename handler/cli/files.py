"""People's own files, and folders in diffusers' layout: what each is, how it is kept, which rows take it."""

from dataclasses import dataclass
from pathlib import Path

from handler.catalog.architectures import described, rows
from handler.core.errors import KindlingError
from handler.core.untrusted import printed
from handler.volume.given import FOLDERS, ROOTS, folder_at
from handler.volume.hashes import content, known
from handler.volume.listing import INDEX
from handler.volume.pipelines import CLASS, examined
from handler.volume.room import inside
from handler.volume.single import examine

SUFFIXES = {".safetensors", ".gguf", ".ckpt", ".pt", ".pth", ".bin"}
LISTED = (*FOLDERS, "loras", "embeddings", "controlnet")
LINE = "{:<44} {:<14} {}"


@dataclass(frozen=True, slots=True)
class FileState:
    """One file or folder, by its name below the volume. `sha256` is empty where nobody has found it yet."""

    name: str
    what: str
    precision: str = ""
    rows: tuple[str, ...] = ()
    sha256: str = ""


def files(volume: Path) -> list[FileState]:
    """All that lie where ComfyUI has them, by their headers; VolumeFailed if the volume cannot be read."""
    folders = [volume / root / folder for root in ROOTS for folder in LISTED]
    found = {path for folder in folders for path in inside(folder) if _is_model(path)}
    return [_state(path, volume) for path in sorted(found)]


def _is_model(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES or (path / INDEX).is_file()


def _state(path: Path, volume: Path) -> FileState:
    name = path.relative_to(volume).as_posix()
    try:
        if (path / INDEX).is_file():
            return _folder(path, printed(name), volume)
        file = examine(path)
    except KindlingError as error:
        return FileState(printed(name), printed(error.message))
    clue = next((part.architecture.clue for part in file.parts if part.architecture and part.architecture.clue), "")
    what = f"{described(file.parts)}. {clue}" if clue else described(file.parts)
    return FileState(printed(name), what, file.precision, tuple(rows(file.parts)), known(file, volume))


def _folder(path: Path, name: str, volume: Path) -> FileState:
    given = folder_at(path, path.name)
    found = examined(given)
    what = f"{described(found.parts)}, a {printed(str(found.index.get(CLASS)))}"
    return FileState(name, what, found.precision, tuple(rows(found.parts)), content(given, volume, find=False))


def lines(found: list[FileState]) -> list[str]:
    """For people; of no files nothing."""
    if not found:
        return []
    told = [f"{each.what}; for {', '.join(each.rows)}" if each.rows else each.what for each in found]
    each_line = [LINE.format(each.name, each.precision, words) for each, words in zip(found, told, strict=True)]
    return ["\nFILES", *each_line]
