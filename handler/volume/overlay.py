"""What people's files and folders put over a row of the catalogue, told by their headers: which component gets what.

What they have, by diffusers' names, must have the names and shapes of the row's own files. What they lack comes from
these. Anything else is refused here, with both names, before anything large is read.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from handler.catalog.naming import Shapes
from handler.catalog.spec import ModelSpec
from handler.core.errors import SettingsError
from handler.volume.fitting import PLACES, Share, cut, kind_of, misfit, own_shapes, place
from handler.volume.given import SETTING, Given, given
from handler.volume.manifest import Source
from handler.volume.pipelines import Pipeline, examined, laid
from handler.volume.single import Single, examine


@dataclass(frozen=True, slots=True)
class Overlay:
    """What is given, in the order of the setting, and what each component gets of it.

    `shares` are its tensors, of several files where these are shards, `folders` where its small files are, `index` what
    a model_index.json says in the place of the row's.
    """

    given: tuple[Given, ...] = ()
    shares: Mapping[str, tuple[Share, ...]] = field(default_factory=dict)
    folders: Mapping[str, Source] = field(default_factory=dict)
    index: Mapping[str, Any] = field(default_factory=dict)

    def get(self, component: str) -> tuple[Share, ...]:
        return self.shares.get(component, ())


NOTHING = Overlay()


def overlay(names: Iterable[str], spec: ModelSpec, source: Source, volume: Path) -> Overlay:
    """What these names put over `spec`, whose own files are in `source`.

    For a component that several have, one of fewer parts goes before a checkpoint. SettingsError says what something is
    and why it does not fit, or that others have all that it has; WeightsMissing, WeightsCorrupt and VolumeFailed, what
    cannot be read.
    """
    wanted = tuple(given(name, volume) for name in names)
    own, made = own_shapes(source) if wanted else {}, NOTHING
    for found in sorted((_opened(one) for one in wanted), key=lambda found: -len(found.parts)):
        made = _over(made, found, spec, source, own)
    taken = {share.file.path for shares in made.shares.values() for share in shares}
    if idle := [one.name for one in wanted if taken.isdisjoint(file.path for file in one.files.values())]:
        raise SettingsError(f"{SETTING}: {idle[0]} would change nothing: others have all that it has.", SETTING)
    return replace(made, given=wanted)


def _opened(one: Given) -> Single | Pipeline:
    return examined(one) if one.is_folder else examine(one.path, *one.files.values())


def _over(
    below: Overlay, found: Single | Pipeline, spec: ModelSpec, source: Source, own: Mapping[str, Shapes]
) -> Overlay:
    """`below` with what was found over it."""
    if isinstance(found, Pipeline):
        more = laid(found, spec, source, own)
        return Overlay((), {**below.shares, **more.shares}, {**below.folders, **more.folders}, more.index)
    shares = {part: (share,) for part, share in _shared(found, spec, own).items()}
    folders = {part: at for part, at in below.folders.items() if part not in shares}
    return Overlay((), {**below.shares, **shares}, folders, below.index)


def _shared(file: Single, spec: ModelSpec, own: Mapping[str, Shapes]) -> dict[str, Share]:
    """What each component gets of one file."""
    if not any(kind_of(part) in PLACES for part in file.parts):
        raise misfit(file.path.name, file.parts, spec, own)
    shares = dict[str, Share]()
    for part in file.parts:
        component, fits = place(part, own, shares)
        if component is None:
            continue
        if fits.faults:
            raise misfit(file.path.name, file.parts, spec, own, part, f"{component}: {fits}")
        shares[component] = Share(file, {name: cut(file, piece, part) for name, piece in fits.found.items()})
    return shares
