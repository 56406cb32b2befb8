"""What people's files put over a row of the catalogue, told by their headers: which component gets which tensors.

A file fits if what it has, by diffusers' names, has the names and shapes of the row's own files. What it lacks comes
from these. Anything else is refused here, with both names, before anything large is read.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path, PurePosixPath

from handler.catalog.architectures import TAIL, Part, described, parts, rows
from handler.catalog.naming import Piece, Shapes, pieces
from handler.catalog.spec import ModelSpec
from handler.core.errors import SettingsError, WeightsCorrupt, WeightsMissing
from handler.volume.gguf import BLOCKS
from handler.volume.layout import FLOATS, Slot, read_layout
from handler.volume.listing import LORA, weight_files
from handler.volume.manifest import Source
from handler.volume.room import reading
from handler.volume.single import AGAIN, Single, examine

SETTING = "KINDLING_WEIGHTS"
FOLDERS = (
    "",
    "checkpoints",
    "unet",
    "unets",
    "diffusion_models",
    "vae",
    "clip",
    "text_encoders",
)  # as ComfyUI has them
ROOTS = ("", "ComfyUI/models")
SPARE = re.compile(  # tensors that some files have and no model needs, or has already
    r"(.*\.)?(position_ids|logit_scale|text_projection(\.weight)?|encoder\.embed_tokens\.weight|lm_head\.weight"
    r"|norm_final\.weight|__index_timestep_zero__)"
)
UNNEEDED = re.compile(r"(.*\.)?(position_ids|encoder\.embed_tokens\.weight)")  # of a row's own: its library makes them
OLDER = re.compile(r"(?<=\.attentions\.0\.)(query|key|value|proj_attn)(?=\.)")  # the VAE's, in files of before 2023
NEWER = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
PLACES = {"denoiser": ("unet", "transformer"), "vae": ("vae",), "encoder": ("text_encoder",)}


@dataclass(frozen=True, slots=True)
class Share:
    """What of a file is one component's: tensors by the model's names."""

    file: Single
    slots: Mapping[str, Slot]


@dataclass(frozen=True, slots=True)
class Overlay:
    """Files over a row, in the order of the setting, and what each component gets of them."""

    files: tuple[Single, ...] = ()
    shares: Mapping[str, Share] | None = None

    def get(self, component: str) -> Share | None:
        return (self.shares or {}).get(component)


NOTHING = Overlay()


@dataclass(frozen=True, slots=True)
class Fit:
    """How a part's tensors go with a component's; whole if nothing is amiss."""

    found: Mapping[str, Piece]
    missing: tuple[str, ...] = ()
    strange: tuple[str, ...] = ()
    misshapen: tuple[str, ...] = ()

    @property
    def faults(self) -> int:
        return len(self.missing) + len(self.strange) + len(self.misshapen)

    def __str__(self) -> str:
        told = {"lacks": self.missing, "has besides": self.strange, "has in another shape": self.misshapen}
        said = [f"it {what} {names[0]}{_more(len(names) - 1)}" for what, names in told.items() if names]
        return "; ".join(said)


def _more(count: int) -> str:
    return f" and {count} more" if count else ""


def overlay(names: Iterable[str], spec: ModelSpec, source: Source, volume: Path) -> Overlay:
    """What the files of these names put over `spec`, whose own files are in `source`.

    For a component that several have, a file of fewer parts goes before a checkpoint. SettingsError says what a file is
    and why it does not fit, or that others have all that it has; WeightsMissing, WeightsCorrupt and VolumeFailed, which
    cannot be read.
    """
    files = tuple(examine(located(name, volume)) for name in names)
    own, shares = _own(source) if files else {}, dict[str, Share]()
    for file in sorted(files, key=lambda file: -len(file.parts)):
        shares |= _shared(file, spec, own)
    if idle := [file.path.name for file in files if all(share.file is not file for share in shares.values())]:
        raise SettingsError(f"{SETTING}: {idle[0]} would change nothing: others have all that it has.", SETTING)
    return Overlay(files, shares)


def _shared(file: Single, spec: ModelSpec, own: Mapping[str, Shapes]) -> dict[str, Share]:
    """What each component gets of one file."""
    if not any(_kind(part) in PLACES for part in file.parts):
        raise _misfit(file, spec, own)
    shares = dict[str, Share]()
    for part in file.parts:
        component, fit = _place(part, own, shares)
        if component is None:
            continue
        if fit.faults:
            raise _misfit(file, spec, own, part, f"{component}: {fit}")
        shares[component] = Share(file, {name: _cut(file, piece, part) for name, piece in fit.found.items()})
    return shares


@dataclass(frozen=True, slots=True)
class Pinned:
    """A file of a repository on the hub at a commit, and where `fetch` puts it, in a folder of its own."""

    repository: str
    revision: str
    file: str
    path: Path


def pinned(name: str, volume: Path) -> Pinned:
    """What `owner/repository@revision:path` means; SettingsError if it is nothing of that kind."""
    found = re.fullmatch(r"(\w[\w.-]*)/(\w[\w.-]*)@([0-9a-f]{40}):((?:\w[\w. +-]*/)*\w[\w. +()-]*)", name, re.ASCII)
    if not found:
        wanted = "a file below the volume, an absolute path, or owner/repository@revision:path"
        raise SettingsError(f"{SETTING}: '{name}' is not {wanted}: pin a revision, with all 40 digits.", SETTING)
    owner, repository, revision, file = found.groups()
    folder = volume / "weights" / f"{owner}--{repository}" / revision / file.replace("/", "--")
    return Pinned(f"{owner}/{repository}", revision, file, folder / PurePosixPath(file).name)


def located(name: str, volume: Path) -> Path:
    """Where the file that a setting names is; SettingsError if it names none below the volume, WeightsMissing."""
    if Path(name).is_absolute() and "\0" not in name:
        return Path(name)
    if "@" in name:
        with reading(path := pinned(name, volume).path):
            if path.is_file():
                return path
        raise WeightsMissing(f"{SETTING}: {name} is not on the volume. With it set, run: python -m handler fetch")
    if "\0" in name or ".." in name.split("/") or not name:
        raise SettingsError(f"{SETTING}: '{name}' leads out of its folder; name a file below the volume.", SETTING)
    tried = [volume / root / folder / name for root in ROOTS for folder in FOLDERS]
    for path in tried:
        with reading(path):
            if path.is_file():
                return path
    raise WeightsMissing(
        f"{SETTING}: there is no {name} in {volume}, nor below its {', '.join(FOLDERS[1:])}, or those of {ROOTS[1]}."
    )


def _own(source: Source) -> dict[str, Shapes]:
    """The names and shapes of the row's own tensors, by component."""
    found: dict[str, Shapes] = {}
    for component, files in weight_files(source).items():
        if files and not component.endswith(f"/{LORA}"):
            found[component] = {
                name: slot.shape for file in files for name, slot in _layout(source, source.folder / file).items()
            }
    return found


def _layout(source: Source, path: Path) -> dict[str, Slot]:
    with reading(path):
        try:
            return read_layout(path)
        except FileNotFoundError:
            raise WeightsMissing(f"{path} is missing. {source.again}") from None
        except ValueError as error:
            raise WeightsCorrupt(f"{path} is no whole safetensors file: {error}. {source.remedy}") from None


def _kind(part: Part) -> str:
    return part.architecture.kind if part.architecture else "other"


def _place(part: Part, own: Mapping[str, Shapes], taken: Mapping[str, Share]) -> tuple[str | None, Fit]:
    """Which component of the row a part is, the one that it fits best, and how; None if it is none of a pipeline."""
    kind = _kind(part)
    fits = [
        (component, _fit(part, shapes, kind == "encoder"))
        for component, shapes in own.items()
        if component.startswith(PLACES.get(kind, ()))
    ]
    return min(fits, key=lambda found: (found[1].faults, found[0] in taken), default=(None, Fit({})))


def _fit(part: Part, own: Shapes, loosely: bool) -> Fit:
    """`loosely`: releases of transformers differ in what names begin with."""

    def plain(name: str) -> str:
        return TAIL.sub("", name) if loosely else OLDER.sub(lambda found: NEWER[found[0]], name)

    made, unknown = pieces(part.naming, part.shapes)
    mine = {plain(name): name for name in own}
    found, strange = dict[str, Piece](), [name for name in unknown if not SPARE.fullmatch(name)]
    for piece in made:
        if (name := plain(piece.name)) in mine:
            found[mine[name]] = piece
        elif not SPARE.fullmatch(piece.name):
            strange.append(piece.source)
    misshapen = tuple(name for name, piece in found.items() if piece.shape != tuple(own[name]))
    missing = tuple(name for name in own if name not in found and not UNNEEDED.fullmatch(name))
    return Fit(found, missing, tuple(strange), misshapen)


def _misfit(
    file: Single, spec: ModelSpec, own: Mapping[str, Shapes], part: Part | None = None, why: str = ""
) -> SettingsError:
    """What the file is, what the row is, and which rows would take it."""
    blamed = part.architecture if part else next((each.architecture for each in file.parts if each.architecture), None)
    mine = described(parts(next((own[name] for name in PLACES["denoiser"] if name in own), {})))
    what, others = described(file.parts), [row for row in rows(file.parts) if row != spec.id]
    advice = blamed.clue if blamed and blamed.clue else f"It goes with {' or '.join(others)}." if others else ""
    alike = part is not None and (what == mine or spec.id in rows(file.parts))
    told = f", as {spec.id} is, but does not fit it ({why})" if alike else f"; {spec.id} is {mine}"
    return SettingsError(f"{SETTING}: {file.path.name} is {what}{told}. {advice}".rstrip(), SETTING)


def _cut(file: Single, piece: Piece, part: Part) -> Slot:
    """The bytes of a piece, which are as contiguous as its rows."""
    slot = file.slots[part.prefix + piece.source]
    if slot.dtype not in FLOATS and len(slot.shape) > 1 and not SPARE.fullmatch(piece.name):
        told = f"keeps {piece.source} as {slot.dtype} without a scale, and nothing says which floats these are"
        raise SettingsError(f"{SETTING}: {file.path.name} {told}. Bring a file of the same model in floats.", SETTING)
    rows = slot.shape[0] if slot.shape else 1
    if (piece.first, piece.last) == (0, rows) or not slot.shape:
        return replace(slot, shape=piece.shape, turn=piece.turn)
    block = next((weights for name, weights, _ in BLOCKS.values() if name == slot.packed), 1)
    if prod(slot.shape[1:]) % block:
        raise WeightsCorrupt(f"{file.path} has rows of {piece.source} that end within a block of {block}. {AGAIN}")
    return replace(_rows(slot, piece, rows), shape=piece.shape, turn=piece.turn)


def _rows(slot: Slot, piece: Piece, rows: int) -> Slot:
    each = (slot.stop - slot.start) // rows
    scale = slot.scale
    if scale and scale.shape[:1] == (rows,) and rows > 1:
        scale = replace(_rows(scale, piece, rows), shape=(piece.last - piece.first, *scale.shape[1:]))
    return replace(slot, start=slot.start + piece.first * each, stop=slot.start + piece.last * each, scale=scale)
