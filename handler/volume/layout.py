"""What a safetensors file holds, told from its header alone: the name, type, shape and place of each tensor."""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from handler.core.untrusted import OURS, parse
from handler.volume.manifest import CHUNK

DTYPES = {
    "BOOL": ("bool", 1), "U8": ("uint8", 1), "I8": ("int8", 1), "I16": ("int16", 2), "I32": ("int32", 4),
    "I64": ("int64", 8), "F8_E4M3": ("float8_e4m3fn", 1), "F8_E5M2": ("float8_e5m2", 1),
    "F8_E8M0": ("float8_e8m0fnu", 1), "F16": ("float16", 2), "BF16": ("bfloat16", 2), "F32": ("float32", 4),
    "F64": ("float64", 8),
}  # fmt: skip
FLOATS = ("float16", "bfloat16", "float32")  # what is brought to the type that a model computes in
LONGEST = 500  # characters of a tensor's name; published ones have less than 150
LARGEST = 1 << 63  # what torch counts with
DEEPEST = 8  # dimensions
MOST = 100_000  # tensors; the largest models here have some thousands
WIDTHS = dict(DTYPES.values())


@dataclass(frozen=True, slots=True)
class Slot:
    """Where a tensor is in its file; `dtype` is torch's name.

    What people make smaller has more to say. `packed` is how floats, then said to be float32, are kept in fewer bits: a
    `DTYPES` name, or one of GGUF's; `scale` is what they are multiplied with, `rotated` along how many columns they
    were turned before they were rounded. `turn` is one of `catalog/naming.py`.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int
    packed: str = ""
    scale: "Slot | None" = None
    rotated: int = 0
    turn: str = ""

    def moved(self, by: int) -> "Slot":
        """The same, with all its places so many bytes further on."""
        scale = self.scale.moved(by) if self.scale else None
        return replace(self, start=self.start + by, stop=self.stop + by, scale=scale)


def read_layout(path: Path) -> dict[str, Slot]:
    """The layout of the file at `path`, reading its header alone. OSError, or ValueError as of `layout`."""
    head, size = read_head(path)
    return layout(head, size)


def read_head(path: Path) -> tuple[memoryview, int]:
    """What `path` begins with, all of its header if it is a safetensors file, and its size. OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a FIFO would hold us in open
    try:
        size = os.fstat(descriptor).st_size
        head = os.pread(descriptor, 8, 0)
        return memoryview(head + os.pread(descriptor, min(int.from_bytes(head, "little"), CHUNK), 8)), size
    finally:
        os.close(descriptor)


def layout(data: memoryview, size: int) -> dict[str, Slot]:
    """Of a file of `size` bytes that begins with `data`, all of its header. ValueError says why it cannot be one."""
    return described(data, size)[0]


def described(data: memoryview, size: int) -> tuple[dict[str, Slot], Mapping[str, Any]]:
    """Likewise, with what the file says of itself."""
    end = 8 + int.from_bytes(data[:8], "little")
    if end > min(len(data), CHUNK):
        raise ValueError(f"its header cannot have {end - 8} bytes")
    try:
        entries = parse(bytes(data[8:end]), marks=OURS)
        said = entries.pop("__metadata__", None) or {}
        require_count(len(entries))
        slots = {name: _slot(entry, end) for name, entry in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError("its header makes no sense") from None
    require_names(slots)
    for name, slot in sorted(slots.items(), key=lambda item: (item[1].start, item[1].stop)):
        if slot.start != end:
            raise ValueError(f"there is a gap or an overlap before {name}")
        end = slot.stop
    if end != size:
        raise ValueError(f"its tensors end at byte {end}, the file at {size}")
    return slots, said if isinstance(said, dict) else {}


def require_count(tensors: int) -> None:
    """ValueError if there are more than any model has."""
    if tensors > MOST:
        raise ValueError(f"it has {tensors} tensors")


def weights_in(shape: Sequence[int]) -> int:
    """How many numbers a tensor of that shape has; ValueError where torch could not have one.

    Bounded before anything is multiplied: numbers of millions of digits hold the interpreter, and all its threads.
    """
    if len(shape) > DEEPEST or not all(type(n) is int and 0 <= n < LARGEST for n in shape):
        raise ValueError("it has a tensor whose shape makes no sense")
    if (count := math.prod(shape)) >= LARGEST:
        raise ValueError("it has a tensor whose shape makes no sense")
    return count


def require_names(slots: Mapping[str, Slot]) -> None:
    """ValueError if a tensor's name cannot be told in a line."""
    if odd := next((name for name in slots if len(name) > LONGEST or not name.isprintable()), None):
        raise ValueError(f"it has a tensor whose name makes no sense: {odd[:80]!a}")


def _slot(entry: dict[str, Any], base: int) -> Slot:
    dtype, width = DTYPES[entry["dtype"]]
    shape, (start, stop) = entry["shape"], entry["data_offsets"]
    placed = all(type(n) is int and 0 <= n < LARGEST for n in (start, stop))
    if not placed or stop - start != weights_in(shape) * width:
        raise ValueError(entry)
    return Slot(dtype, tuple(shape), base + start, base + stop)
