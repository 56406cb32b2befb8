"""A single file of people's: what its header says it holds, however it is packed, and what it is. Nothing else is read.

Safetensors and GGUF, plain or as ComfyUI's users make them smaller: 8-bit floats, alone or with a scale, by the names
of its older files (`scale_weight`) or its newer ones (`weight_scale`, and `comfy_quant` or `_quantization_metadata`);
8-bit integers with a scale for each row, plain or rotated. Pickles are never opened.
"""

import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from handler.catalog.architectures import PREFIXES, Part, parts
from handler.core.errors import WeightsCorrupt, WeightsMissing
from handler.core.untrusted import OURS, Malformed, parse
from handler.volume import gguf, layout
from handler.volume.given import File, stated
from handler.volume.layout import FLOATS, Slot
from handler.volume.room import reading

AGAIN = "Download it again."
PICKLED = (
    "It is a pickle, which could run anything, and is never opened. Bring the .safetensors file of the same model."
)
STARTS = {  # of what is none of ours: what to do about it
    b"PK\x03\x04": PICKLED,
    **{b"\x80%c" % protocol: PICKLED for protocol in range(2, 6)},
    b"<": "It is a web page: the address that it was downloaded from leads to one, or asks for a login. " + AGAIN,
    b"version https://git-lfs": "It is a pointer of Git LFS, not the file. Download the file itself.",
}
SCALES = (".scale_weight", ".weight_scale")
BESIDE = (*SCALES, ".scale_input", ".input_scale", ".weight_scale_2", ".comfy_quant", ".pre_quant_scale")
EIGHT_BITS = ("float8_e4m3fn", "float8_e5m2", "float64")
INTEGERS = "int8_tensorwise"
KEPT = ("float8_e4m3fn", "float8_e5m2", INTEGERS)  # as ComfyUI calls formats, those that are read
NOTE = 4096  # bytes of what one layer says of itself


@dataclass(frozen=True, slots=True)
class Single(File):
    """A file with its tensors by its own names, and its parts."""

    slots: Mapping[str, Slot]
    parts: tuple[Part, ...]

    @property
    def precision(self) -> str:
        """How most of its bytes are kept: bf16, float8_e4m3fn, Q4_K."""
        return kept([self])


def kept(files: Iterable[Single]) -> str:
    """How most of their bytes are kept."""
    sizes = Counter[str]()
    for slot in (slot for file in files for slot in file.slots.values()):
        sizes[slot.packed or slot.dtype] += slot.stop - slot.start
    most = sizes.most_common(1)[0][0] if sizes else "nothing"
    return {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}.get(most, most)


def examine(path: Path, file: File | None = None) -> Single:
    """The single file at `path`. WeightsMissing, VolumeFailed, or WeightsCorrupt with why it cannot be read."""
    file = file or stated(path)  # first, so that whoever reads on sees if what follows is of another file
    with reading(path):
        try:
            head, size = layout.read_head(path)
        except FileNotFoundError:
            raise WeightsMissing(f"{path} is not there.") from None
        except IsADirectoryError:
            raise WeightsMissing(f"{path} is a folder, not a file.") from None
    is_gguf = bytes(head[:4]) == gguf.MAGIC
    try:
        packed, said = (gguf.layout(_head(path), size), {}) if is_gguf else layout.described(head, size)
        slots = packed if is_gguf else _unpacking(path, packed, said)
    except (ValueError, UnicodeDecodeError) as error:
        if why := strange(head):  # not before: a whole file's length may begin so
            raise WeightsCorrupt(f"{path} holds no weights that can be read. {why}") from None
        raise WeightsCorrupt(
            f"{path} is no whole {'GGUF' if is_gguf else 'safetensors'} file: {error}. {AGAIN}"
        ) from None
    shapes = {name: slot.shape for name, slot in slots.items()}
    found = parts(shapes, str(said.get("modelspec.prediction_type", "")))
    return Single(path, file.identity, size, file.entry, slots, tuple(found))


def strange(head: memoryview) -> str:
    """What a file that begins so is instead, and what to do about it; empty if nothing that is known."""
    return next((why for start, why in STARTS.items() if bytes(head[: len(start)]) == start), "")


def _head(path: Path) -> memoryview:
    with path.open("rb") as file:
        return memoryview(file.read(gguf.HEAD))


def _unpacking(path: Path, slots: Mapping[str, Slot], said: Mapping[str, Any]) -> dict[str, Slot]:
    """The tensors that are weights, each with what makes a float of it. ValueError names what is not read."""
    notes = _notes(path, slots, said)
    return {
        name: _unpacked(name, slot, slots, notes)
        for name, slot in slots.items()
        if not name.endswith(BESIDE) and name.rpartition(".")[2] != "scaled_fp8"
    }


def _unpacked(name: str, slot: Slot, slots: Mapping[str, Slot], notes: Mapping[str, Any]) -> Slot:
    stem = name.removesuffix(".weight")
    scale = next((slots[stem + end] for end in SCALES if stem + end in slots), None) if stem != name else None
    note = (
        notes.get(stem) or notes.get(next((stem[len(each) :] for each in PREFIXES if stem.startswith(each)), "")) or {}
    )
    kept = note.get("format", INTEGERS if slot.dtype == "int8" else slot.dtype)
    if scale is None and (slot.dtype in FLOATS or (stem == name and slot.dtype not in EIGHT_BITS)):
        return slot
    if scale is None and slot.dtype not in EIGHT_BITS:
        raise ValueError(f"it keeps {name} as {slot.dtype} without a scale, and no model has such weights")
    if kept not in (*KEPT, *FLOATS, "float64") or slot.dtype == "uint8" or f"{stem}.pre_quant_scale" in slots:
        raise ValueError(f"it keeps {name} as {kept}, and only {', '.join(KEPT)} and plain floats are read")
    if scale and (scale.dtype not in FLOATS or len(scale.shape) > 2 or scale.shape not in _scalings(slot.shape)):
        raise ValueError(f"the scale of {name} has a shape that makes no sense")
    rotated = note.get("convrot_groupsize", 256) if note.get("convrot") else 0
    if (
        type(rotated) is not int
        or rotated < 0
        or (rotated and (slot.shape[-1] % rotated or 4 ** _log4(rotated) != rotated))
    ):
        raise ValueError(f"{name} is rotated by groups of {rotated}, which cannot be")
    return replace(slot, dtype="float32", packed=slot.dtype, scale=scale, rotated=rotated)


def _scalings(shape: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    return (), (1,), (1, 1), shape[:1], (*shape[:1], 1)


def _log4(count: int) -> int:
    return (count.bit_length() - 1) // 2


def _notes(path: Path, slots: Mapping[str, Slot], said: Mapping[str, Any]) -> dict[str, Any]:
    """What the file says of its layers, by their names."""
    found: dict[str, Any] = {}
    if told := said.get("_quantization_metadata"):
        layers = _object(str(told).encode()).get("layers")
        found |= layers if isinstance(layers, dict) else {}
    with path.open("rb", buffering=0) as file:
        for name, slot in slots.items():
            if name.endswith(".comfy_quant") and slot.stop - slot.start <= NOTE:
                found[name.removesuffix(".comfy_quant")] = _object(
                    os.pread(file.fileno(), slot.stop - slot.start, slot.start)
                )
    return {name: note if isinstance(note, dict) else {"format": str(note)} for name, note in found.items()}


def _object(text: bytes) -> dict[str, Any]:
    try:
        found = parse(text, marks=OURS)
    except Malformed as error:
        raise ValueError(f"what it says of its layers is no JSON: {error}") from None
    return found if isinstance(found, dict) else {}
