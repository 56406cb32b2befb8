"""A person's own folder in diffusers' layout over a row of the catalogue: a whole pipeline, or what there is of one.

Its model_index.json says which pipeline it is, which must be the row's; its tensors have the row's names and shapes.
Its tokenizers, schedulers and what is set of its denoiser and VAE are used; text encoders are made as the row has them,
and what is set of those and of the denoiser may not differ in anything that decides pixels. No code of its own is run.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from handler.catalog.architectures import Part, parts
from handler.catalog.naming import Shapes
from handler.catalog.spec import ModelSpec
from handler.core.errors import SettingsError
from handler.volume.codeless import OWN_CODE
from handler.volume.fitting import PLACES, Share, cut, fit, misfit
from handler.volume.given import SETTING, Given
from handler.volume.listing import index_of, json_of, weight_files
from handler.volume.manifest import Source
from handler.volume.single import Single, examine, kept

CLASS = "_class_name"
CONFIG, SCHEDULE = "config.json", "scheduler_config.json"
FLOW = "FlowMatch"  # in the names of schedulers for what predicts flow, and of no others
# What configurations say that changes no picture: where they come from, training, and what tensors' shapes say already.
HARMLESS = re.compile(
    r"_.*|architectures|(torch_)?dtype|transformers_version|\w*_token_id|\w*dropout\w*|initializer_\w+|use_cache"
    r"|sample_size|projection_dim|model_type"
)


@dataclass(frozen=True, slots=True)
class Pipeline:
    """A folder, its model_index.json, and the weights of its components."""

    given: Given
    source: Source
    index: Mapping[str, Any]
    components: Mapping[str, tuple[Single, ...]]

    @property
    def parts(self) -> tuple[Part, ...]:
        return tuple(_part(files) for files in self.components.values())

    @property
    def precision(self) -> str:
        """How most of its bytes are kept."""
        return kept(file for files in self.components.values() for file in files)


def examined(given: Given) -> Pipeline:
    """The folder that is `given`, by the headers of its weights; raises as `single.examine`."""
    assert given.source, "it is a folder"
    source, index = given.source, index_of(given.source)
    weights = weight_files(source, {name: value for name, value in index.items() if name.isidentifier()})
    found = {
        name: tuple(examine(source.folder / file, given.files.get(file)) for file in files)
        for name, files in weights.items()
        if files and "/" not in name
    }
    return Pipeline(given, source, index, found)


def _shapes(files: tuple[Single, ...]) -> Shapes:
    return {name: slot.shape for file in files for name, slot in file.slots.items()}


def _part(files: tuple[Single, ...]) -> Part:
    shapes = _shapes(files)
    return Part("", shapes, next((each.architecture for each in parts(shapes) if each.architecture), None))


@dataclass(frozen=True, slots=True)
class Laid:
    """What a folder has for a row, as an `Overlay` says it."""

    shares: Mapping[str, tuple[Share, ...]]
    folders: Mapping[str, Source]
    index: Mapping[str, Any]


def laid(found: Pipeline, spec: ModelSpec, source: Source, own: Mapping[str, Shapes]) -> Laid:
    """What `found` has for the row whose files are in `source`; SettingsError, with both names, if it is of another."""
    mine, name = index_of(source), found.given.name
    if (theirs := found.index.get(CLASS)) != mine.get(CLASS):
        told = misfit(name, found.parts, spec, own).message
        raise SettingsError(f"{told} It is a {theirs}, and what draws here is a {mine.get(CLASS)}.", SETTING)
    shares = {part: _taken(found, part, spec, own) for part in own if part in found.components}
    folders = {part: found.source for part, value in mine.items() if _configures(found, part, value, own)}
    for part in folders | shares:
        _require_harmless(found, source, part, spec, strict=part in shares and not part.startswith(PLACES["vae"]))
    return Laid(shares, folders, _said(found, mine, folders.keys() - shares.keys()))


def _taken(found: Pipeline, part: str, spec: ModelSpec, own: Mapping[str, Shapes]) -> tuple[Share, ...]:
    """The tensors of one component, by the row's names for them."""
    files = found.components[part]
    fits = fit(whole := _part(files), own[part], loosely=part.startswith(PLACES["encoder"]))
    if fits.faults:
        raise misfit(found.given.name, found.parts, spec, own, whole, f"{part}: {fits}")
    shares = [
        Share(file, {n: cut(file, piece, whole) for n, piece in fits.found.items() if piece.source in file.slots})
        for file in files
    ]
    return tuple(share for share in shares if share.slots)


def _configures(found: Pipeline, part: str, value: Any, own: Mapping[str, Shapes]) -> bool:
    """Whether the folder's small files are used for a component: models of diffusers, tokenizers, schedulers."""
    match value:
        case ["diffusers", _] if part in own:
            return part in found.components and f"{part}/{CONFIG}" in found.given.files
        case ["transformers", _] if part in own:
            return False
        case ["diffusers", _]:
            return f"{part}/{SCHEDULE}" in found.given.files
        case [str(), _]:
            return any(name.startswith(f"{part}/") for name in found.given.files)
    return False


def _require_harmless(found: Pipeline, source: Source, part: str, spec: ModelSpec, strict: bool) -> None:
    """SettingsError if one component wants code of its own, or, `strict`, is set as the row's is not."""
    name, configs = found.given.name, {path: json_of(found.source, path) for path in _configs(found, part)}
    if any(OWN_CODE in each for each in configs.values()):
        raise SettingsError(f"{SETTING}: {name} has code of its own for its {part}, which is never run.", SETTING)
    theirs, mine = configs.get(f"{part}/{CONFIG}", {}), json_of(source, f"{part}/{CONFIG}") if strict else {}
    if key := _differs(theirs, mine):
        told = f"its {part} has {key} {theirs[key]!r:.80}, and {spec.id} has {mine[key]!r:.80}"
        raise SettingsError(f"{SETTING}: {name} is not as {spec.id} is: {told}.", SETTING)


def _configs(found: Pipeline, part: str) -> list[str]:
    return [name for name in found.given.files if re.fullmatch(rf"{part}/\w*{CONFIG}", name)]


def _differs(theirs: Mapping[str, Any], mine: Mapping[str, Any]) -> str:
    """The first that both say, and say otherwise; what is off may be said in several ways."""
    for key in sorted(theirs.keys() & mine.keys()):
        one, other = theirs[key], mine[key]
        both = isinstance(one, dict) and isinstance(other, dict)
        if not HARMLESS.fullmatch(key) and (_differs(one, other) if both else one != other and (one or other)):
            return key
    return ""


def _said(found: Pipeline, mine: Mapping[str, Any], others: Collection[str]) -> dict[str, Any]:
    """What its model_index.json says in the place of the row's: which schedulers, of the row's kind, and settings."""
    said = {name: value for name, value in found.index.items() if name in mine and name[0] != "_"}
    for part in [part for part in others if mine[part][0] == "diffusers" and part in said]:
        if (FLOW in str(said[part])) != (FLOW in str(mine[part])):
            told = f"{found.given.name} has {said[part]} as its {part}, which is of another kind than {mine[part]}"
            raise SettingsError(f"{SETTING}: {told}.", SETTING)
    return {
        name: value
        for name, value in said.items()
        if not isinstance(value, list) or (name in others and mine[name][0] == "diffusers")
    }
