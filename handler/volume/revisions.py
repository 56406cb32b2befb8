"""Which commit of its repository a model is at, where its row names none: the one that is on the volume.

`fetch` looks once what `main` is, and the folder that it makes for the files has that commit as its name, as their
manifest has it: from then on every fetch and every worker of this volume uses it, wherever `main` goes. A hub cache
that a platform put there says it by its only snapshot, of several by refs/main. Bases of others always name theirs.
"""

from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from handler.catalog.spec import ModelSpec
from handler.core.errors import VolumeFailed
from handler.volume.hub import COMMIT
from handler.volume.hubcache import places, snapshots
from handler.volume.manifest import MANIFEST
from handler.volume.room import inside, reading
from handler.volume.sources import fetched_folder

MAIN = "main"


def settled(spec: ModelSpec, volume: Path) -> ModelSpec:
    """`spec` at the commit that workers of this volume use; as it is where it names one, or none is known.

    A volume that cannot be read says nothing here: whoever wants the files is told.
    """
    if spec.revision:
        return spec
    with suppress(VolumeFailed):
        known = _whole(spec, volume) or _cached(spec, volume)
        return replace(spec, revision=next(iter(known), ""))
    return spec


def begun(spec: ModelSpec, volume: Path) -> ModelSpec:
    """`spec` at the commit whose files a fetch has begun to bring; as it is where none has. Raises VolumeFailed."""
    return replace(spec, revision=next(iter(_commits(fetched_folder(spec, volume))), ""))


def _commits(folder: Path) -> list[str]:
    return [path.name for path in inside(folder) if COMMIT.fullmatch(path.name)]


def _whole(spec: ModelSpec, volume: Path) -> list[str]:
    """One, unless machines that cannot see each other's locks have fetched at once: then all take the first."""
    with reading(folder := fetched_folder(spec, volume)):
        return [commit for commit in _commits(folder) if (folder / commit / MANIFEST).is_file()]


def _cached(spec: ModelSpec, volume: Path) -> list[str]:
    found = list(dict.fromkeys(place.commit for place in places(spec, volume) if COMMIT.fullmatch(place.commit)))
    if len(found) < 2:
        return found
    with reading(main := snapshots(spec, volume).parent / "refs" / MAIN):
        named = main.read_text(errors="replace").strip() if main.is_file() else ""
    return [commit for commit in found if commit == named]
