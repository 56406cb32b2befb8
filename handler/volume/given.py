"""What a name in KINDLING_WEIGHTS means: a file, or a folder in diffusers' layout, on the volume or fetched to it.

Of them is read only what a manifest and a folder's model_index.json say.
"""

import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from handler.core.errors import FetchFailed, SettingsError, WeightsCorrupt, WeightsMissing
from handler.volume.files import choose_files
from handler.volume.listing import INDEX, index_of
from handler.volume.manifest import MANIFEST, Entry, Source, checked, read_manifest
from handler.volume.room import inside, reading

SETTING = "KINDLING_WEIGHTS"
# As ComfyUI has them.
FOLDERS = ("", "checkpoints", "diffusers", "unet", "unets", "diffusion_models", "vae", "clip", "text_encoders")
ROOTS = ("", "models", "ComfyUI/models")  # `models` is worker-comfyui's, beside the rows' own folders
PINNED = re.compile(r"(\w[\w.-]*)/(\w[\w.-]*)@([0-9a-f]{40})(?::((?:\w[\w. +-]*/)*\w[\w. +()-]*))?", re.ASCII)


@dataclass(frozen=True, slots=True)
class File:
    """The file at `path`, of `size` bytes, and which one that is; what a manifest says of it, if it was fetched."""

    path: Path
    identity: tuple[int, ...]
    size: int
    entry: Entry | None


@dataclass(frozen=True, slots=True)
class Given:
    """What a name means, and how pictures tell it; its files by their names within it, of a folder those that count."""

    name: str
    path: Path
    files: Mapping[str, File]
    source: Source | None = field(default=None, compare=False)  # of a folder

    @property
    def is_folder(self) -> bool:
        return self.source is not None


@dataclass(frozen=True, slots=True)
class Pinned:
    """A file of a repository on the hub at a commit, or all of it, and where `fetch` puts that, in a folder of its own.

    `file` is empty for a whole repository.
    """

    repository: str
    revision: str
    file: str
    path: Path


def pinned(name: str, volume: Path) -> Pinned:
    """What `owner/repository@revision`, with `:path` or without, means; SettingsError if it is nothing of that kind."""
    if not (found := PINNED.fullmatch(name)):
        wanted = "a file or a folder below the volume, an absolute path, or owner/repository@revision, or that with"
        told = f"'{name}' is not {wanted} :path: pin a revision, with all 40 digits."
        raise SettingsError(f"{SETTING}: {told}", SETTING)
    owner, repository, revision, file = found.groups(default="")
    folder = volume / "weights" / f"{owner}--{repository}" / revision
    path = folder / file.replace("/", "--") / PurePosixPath(file).name if file else folder
    return Pinned(f"{owner}/{repository}", revision, file, path)


def is_pinned(name: str) -> bool:
    """Whether a name is meant to be of the hub's."""
    return "@" in name and not Path(name).is_absolute()


def located(name: str, volume: Path) -> Path:
    """Where what a setting names is; SettingsError if it names nothing below the volume, WeightsMissing."""
    if Path(name).is_absolute() and "\0" not in name:
        return Path(name)
    if is_pinned(name):
        wanted = pinned(name, volume)
        with reading(whole := wanted.path if wanted.file else wanted.path / MANIFEST):
            if whole.is_file():
                return wanted.path
        raise WeightsMissing(f"{SETTING}: {name} is not on the volume. With it set, run: python -m handler fetch")
    if "\0" in name or ".." in name.split("/") or not name:
        told = f"'{name}' leads out of its folder; name a file or a folder below the volume."
        raise SettingsError(f"{SETTING}: {told}", SETTING)
    tried = [volume / root / folder / name for root in ROOTS for folder in FOLDERS]
    for path in tried:
        with reading(path):
            if path.is_file() or (path / INDEX).is_file():
                return path
    raise WeightsMissing(
        f"{SETTING}: there is no {name} in {volume}, nor below its {', '.join(FOLDERS[1:])}, or those of "
        f"{' and '.join(ROOTS[1:])}: neither a file nor a folder with {INDEX}."
    )


def given(name: str, volume: Path) -> Given:
    """What `name` means; raises as `located`, and WeightsCorrupt or VolumeFailed if it cannot be read."""
    path = located(name, volume)
    told = name if is_pinned(name) else path.name
    with reading(path):
        whole = (path / INDEX).is_file()
    return folder_at(path, told) if whole else Given(told, path, {path.name: stated(path)})


def folder_at(path: Path, name: str) -> Given:
    """The folder at `path`."""
    source = checked(path, "repository", name) or Source(path, None)
    entries = source.manifest.files if source.manifest else {}
    files = {each: stated(path / each, entries.get(each)) for each in _names(source)}
    if strange := next((each for each in files if source.manifest and each not in entries), None):
        raise WeightsCorrupt(f"{path / strange} is none of the files that its manifest lists. {source.remedy}")
    return Given(name, path, files, source)


def _names(source: Source) -> list[str]:
    """The files that a pipeline may read, but no licence."""
    index = {part: value for part, value in index_of(source).items() if isinstance(value, list)}
    parts = {part: inside(source.folder / part) for part in index if part.isidentifier()}
    paths = [f"{part}/{path.name}" for part, found in parts.items() for path in found]
    try:
        chosen = choose_files(paths, {part: index[part] for part, found in parts.items() if found})
    except FetchFailed as error:
        told = f"{source.folder}: {error.message} Save it as safetensors, without a variant."
        raise WeightsCorrupt(told) from None
    return [INDEX, *sorted(chosen)]


def stated(path: Path, entry: Entry | None = None) -> File:
    """Which file is at `path`, by its state alone, and what a manifest beside it says of it; raises WeightsMissing."""
    with reading(path):
        try:
            status = path.stat()
        except FileNotFoundError:
            raise WeightsMissing(f"{path} is not there.") from None
    return File(path, identity(status), status.st_size, entry or _entry(path, status.st_size))


def _entry(path: Path, size: int) -> Entry | None:
    """What a manifest beside it says; of one that is none of ours nothing."""
    with suppress(WeightsCorrupt):
        manifest = read_manifest(path.parent)
        entry = manifest.files.get(path.name) if manifest else None
        return entry if entry and entry.size == size else None
    return None


def identity(status: os.stat_result) -> tuple[int, ...]:
    """Which file it is, and of when."""
    return status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size
