"""Whether tensors of people's fit a row of the catalogue: names and shapes beside those of the row's own files."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

from handler.catalog.architectures import TAIL, Part, described, parts, rows
from handler.catalog.naming import Piece, Shapes, pieces
from handler.catalog.spec import ModelSpec
from handler.core.errors import SettingsError, WeightsCorrupt, WeightsMissing
from handler.volume.gguf import BLOCKS
from handler.volume.given import SETTING
from handler.volume.layout import FLOATS, Slot, read_layout
from handler.volume.listing import LORA, weight_files
from handler.volume.manifest import Source
from handler.volume.room import reading
from handler.volume.single import AGAIN, Single

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


def own_shapes(source: Source) -> dict[str, Shapes]:
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
            raise WeightsMissing(f"{path} is missing. {source.again}", about=str(path)) from None
        except ValueError as error:
            told = f"{path} is no whole safetensors file: {error}. {source.remedy}"
            raise WeightsCorrupt(told, about=str(path)) from None


def kind_of(part: Part) -> str:
    return part.architecture.kind if part.architecture else "other"


def place(part: Part, own: Mapping[str, Shapes], taken: Mapping[str, Share]) -> tuple[str | None, Fit]:
    """Which component of the row a part is, the one that it fits best, and how; None if it is none of a pipeline."""
    kind = kind_of(part)
    fits = [
        (component, fit(part, shapes, kind == "encoder"))
        for component, shapes in own.items()
        if component.startswith(PLACES.get(kind, ()))
    ]
    return min(fits, key=lambda found: (found[1].faults, found[0] in taken), default=(None, Fit({})))


def fit(part: Part, own: Shapes, loosely: bool) -> Fit:
    """How `part` goes with a component whose own tensors are these.

    `loosely`: releases of transformers differ in what names begin with.
    """

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


def misfit(
    name: str,
    found: Iterable[Part],
    spec: ModelSpec,
    own: Mapping[str, Shapes],
    part: Part | None = None,
    why: str = "",
) -> SettingsError:
    """What is given, with which parts, what the row is, and which rows would take it."""
    found = list(found)
    blamed = part.architecture if part else next((each.architecture for each in found if each.architecture), None)
    mine = described(parts(next((own[name] for name in PLACES["denoiser"] if name in own), {})))
    what, others = described(found), [row for row in rows(found) if row != spec.id]
    advice = blamed.clue if blamed and blamed.clue else f"It goes with {' or '.join(others)}." if others else ""
    alike = part is not None and (what == mine or spec.id in rows(found))
    told = f", as {spec.id} is, but does not fit it ({why})" if alike else f"; {spec.id} is {mine}"
    return SettingsError(f"{SETTING}: {name} is {what}{told}. {advice}".rstrip(), SETTING)


def cut(file: Single, piece: Piece, part: Part) -> Slot:
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
