"""A model in a cache of the hub's client, or in a folder of `hf download`, on the volume: found, and looked at first.

    huggingface-cache/hub/                         where RunPod puts a cached model
    hub/, .cache/huggingface/hub/, huggingface/hub/, models--owner--name/   HF_HOME, HOME, or HF_HUB_CACHE on the volume
    any folder, or one in a folder                 `hf download --local-dir`; that notes the commit of each file

Another commit than the row's serves if every file that is read is the same there, by the hub's checksums.
"""

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from handler.catalog.spec import ModelSpec
from handler.core.errors import FetchFailed, KindlingError
from handler.volume.files import ANY_WEIGHTS, TEXT, WEIGHTS, home
from handler.volume.hub import COMMIT, Repository, explained
from handler.volume.listing import INDEX, UNUSED, index_of, weight_files
from handler.volume.manifest import Source
from handler.volume.patience import patiently
from handler.volume.room import inside, reading

HUB_CACHE = Path("huggingface-cache/hub")
CACHES = (HUB_CACHE, *map(Path, ("hub", ".cache/huggingface/hub", "huggingface/hub", ".")))
OURS = "baked boots comfy embeddings fetched kept loras receipts spend sweeps vae weights".split()  # noqa: SIM905
NOTES = ".cache/huggingface/download"  # in a folder of `hf download`
SHOWN = 3  # of what is told of files
VOLUME = "bring it to a volume that can be written: python -m handler fetch {id}"
NETWORK = "fill a network volume with it: python platform/runpod_deploy.py --help, under --fill"


@dataclass(frozen=True, slots=True)
class Place:
    """A folder in diffusers' layout that the hub's client brought, from `commit`; "" where nobody noted it."""

    folder: Path
    commit: str
    hub: Path | None = None  # the cache that it is a snapshot of

    def etag(self, name: str) -> str:
        """What the hub calls the bytes of a file: a SHA-256, or git's name for it; "" where nobody noted it."""
        path = self.folder / name
        if self.hub:
            return Path(os.readlink(path)).name if path.is_symlink() else ""
        return note(self.folder, name)[1]

    @property
    def runpods(self) -> bool:
        """Whether a platform brought it, where nobody else may write."""
        return bool(self.hub and self.hub.parts[-2:] == HUB_CACHE.parts)

    def again(self, spec: ModelSpec) -> str:
        """What whoever looks after the machine can do, that it is as it should be."""
        if self.runpods:
            return f"A cached model of RunPod's cannot be mended from here; {NETWORK}."
        source = home(spec)
        where = f"HF_HUB_CACHE={self.hub} " if self.hub else ""
        into = "" if self.hub else f" --local-dir {self.folder}"
        return f"Complete it with: {where}hf download {source.name} --revision {source.revision or 'main'}{into}"


def found(spec: ModelSpec, volume: Path) -> tuple[Source | None, str]:
    """The files of `spec` in the best of these places, or what is wrong with it and what to do; "" if there is none."""
    told, wanted = "", home(spec)
    if not wanted.revision:
        commits = ", ".join(place.commit or "one that nobody noted" for place in places(spec, volume))
        what = f"of its commits there are {commits}, and no refs/main says which of them it shall be. Leave but one."
        return None, what if commits else ""
    for place in sorted(places(spec, volume), key=lambda place: place.commit != wanted.revision):
        why = unfit(place, spec)
        if not why:
            return Source(place.folder, None, kind="hub cache", name=spec.id), ""
        told = told or why
    return None, told


def snapshots(spec: ModelSpec, volume: Path) -> Path:
    """Where the first hub cache on the volume that has its repository keeps its commits."""
    name = f"models--{home(spec).name.replace('/', '--')}"
    known = [volume / cache / name / "snapshots" for cache in CACHES]
    for folder in known:
        with reading(folder):
            if folder.is_dir():
                return folder
    return known[0]


def places(spec: ModelSpec, volume: Path) -> Iterator[Place]:
    """All that may be it."""
    folder = snapshots(spec, volume)
    for path in inside(folder):
        yield Place(path, path.name, folder.parents[1])
    named = {spec.id, home(spec).name.rpartition("/")[2], home(spec).name.replace("/", "--")}
    for path in folders(volume):
        commit, _ = note(path, INDEX)
        if path.name in named or (commit and commit == home(spec).revision):
            yield Place(path, commit)


def folders(volume: Path) -> Iterator[Path]:
    """Those with a model_index.json, up to two below the volume, but for what is Kindling's own."""
    for above in _within(volume):
        if above.name not in OURS and not above.name.startswith((".", "models--")):
            for path in (above, *_within(above)):
                with reading(path), suppress(PermissionError):
                    if (path / INDEX).is_file():
                        yield path


def _within(folder: Path) -> list[Path]:
    """The folders in it: none where this user may not look, as into lost+found, which so is not meant for it."""
    with reading(folder), suppress(PermissionError, FileNotFoundError), os.scandir(folder) as found:
        return sorted(Path(each) for each in found if each.is_dir())
    return []


def note(folder: Path, name: str) -> tuple[str, str]:
    """The commit and the etag of a file, as `hf download` noted them."""
    with reading(path := folder / NOTES / f"{name}.metadata"):
        try:
            with path.open(errors="replace") as file:
                commit, etag = file.readline(100).strip(), file.readline(100).strip()
        except (FileNotFoundError, NotADirectoryError):
            return "", ""
    return (commit, etag) if COMMIT.fullmatch(commit) else ("", "")


def unfit(place: Place, spec: ModelSpec) -> str:
    """Why what is in `place` cannot be served, and what to do; "" if it can. VolumeFailed, or WeightsCorrupt."""
    what = f"{place.folder}, at commit {place.commit or 'unknown'} of {home(spec).name},"
    if lacking := _lacking(place, spec):
        return f"{what} {lacking}. {place.again(spec)}"
    if spec.grafts:
        own = ", ".join(graft.file for graft in spec.grafts)
        todo = NETWORK if place.runpods else VOLUME.format(id=spec.id)
        return f"{what} is one half of {spec.id}, and {own} of {spec.repository} the other: no cache has both; {todo}"
    if place.commit == home(spec).revision and (place.hub or _all_of(place, spec)):
        return ""
    if other := _other(place, spec):
        return f"{what} {other} {place.again(spec)}"
    return ""


def _lacking(place: Place, spec: ModelSpec) -> str:
    """What a download that has not ended, or that left out too much, has not brought."""
    with reading(folder := place.folder):
        coming = folder.parents[1] / "blobs" if place.hub else folder / NOTES
        begun = any(path.name.endswith(".incomplete") for path in inside(coming))
        dead = [path.relative_to(folder) for path in folder.rglob("*") if path.is_symlink() and not path.exists()]
        if lost := [path for path in dead if _may_be_read(path)]:
            why = "a download has not ended, or its blobs were removed"
            return f"leads to {len(lost)} files that are not there, such as {lost[0]}: {why}"
        missing = _missing(folder, spec) if (folder / INDEX).is_file() else [INDEX]
    if not missing:
        return ""
    state = "is still coming, or its download was cut off" if begun else "is incomplete"
    return f"{state}: it has no {', '.join(missing[:SHOWN])}"


def _may_be_read(path: Path) -> bool:
    """Whether it is of use here: of what is not, people remove the bytes, such as a whole model in one file."""
    kind = TEXT.fullmatch(path.name) or WEIGHTS.fullmatch(path.name)
    return path.as_posix() == INDEX or (len(path.parts) == 2 and path.parts[0] not in UNUSED and bool(kind))


def _missing(folder: Path, spec: ModelSpec) -> list[str]:
    """The weights, and the folders, that its model_index.json leads to and that are not there."""
    source, missing = Source(folder, None, kind="hub cache", name=spec.id), list[str]()
    index = index_of(source)
    files = weight_files(source, index)
    for part, value in index.items():
        if not (isinstance(value, list) and value[:1] and value[0] in ("diffusers", "transformers")):
            continue
        here = [path.name for path in inside(folder / part)]
        missing += [name for name in files[part] if not (folder / name).is_file()]
        if not here:
            missing.append(f"{part}/")
        elif not files[part] and "config.json" in here:
            others = [name for name in here if name.endswith(ANY_WEIGHTS)]
            missing.append(
                f"{part}/*.safetensors" + (f" that is read, only {', '.join(others[:SHOWN])}" if others else "")
            )
    return missing


def _all_of(place: Place, spec: ModelSpec) -> bool:
    """Whether each file of a folder is of its commit: one that came over another may have been cut off."""
    return all(note(place.folder, name)[0] == place.commit for name in _read(place, spec))


def _other(place: Place, spec: ModelSpec) -> str:
    """Why another commit cannot stand for the row's; "" if all that is read of it is the same."""
    wanted = home(spec)
    if not place.commit:
        return f"cannot be compared with {wanted.revision}, which this version was made for: it has no {NOTES}."
    try:
        listed = patiently(_listed, wanted, place.folder, otherwise=_refused)
    except KindlingError as error:
        return (
            f"is another one, and whether its files are those of {wanted.revision}, which this version was made for, "
            f"cannot be told: {error.message}"
        )
    known = {name: place.etag(name) for name in _read(place, spec)}
    if plain := sorted(name for name, etag in known.items() if not etag):
        what = f"cannot be compared with {wanted.revision}, which this version was made for"
        return f"{what}: nothing says whose bytes {', '.join(plain[:SHOWN])} are."
    if others := sorted(name for name, etag in known.items() if listed.get(name) != etag):
        return f"has other files than {wanted.revision}, which this version was made for: {', '.join(others[:SHOWN])}."
    return ""


def _refused(why: str) -> dict[str, str]:
    raise FetchFailed(why)


@cache
def _listed(wanted: Repository, folder: Path) -> dict[str, str]:
    """What the hub calls the bytes of each file at the row's commit."""
    with explained(wanted.name, wanted, folder):
        return {path: file.lfs.sha256 if file.lfs else file.blob_id for path, file in wanted.files().items()}


def _read(place: Place, spec: ModelSpec) -> list[str]:
    """All files of it that a worker reads: weights, and what says what they are."""
    source = Source(place.folder, None, kind="hub cache", name=spec.id)
    index = index_of(source)
    texts = [
        f"{part}/{path.name}" for part in index for path in inside(place.folder / part) if TEXT.fullmatch(path.name)
    ]
    return [INDEX, *texts, *(name for names in weight_files(source, index).values() for name in names)]
