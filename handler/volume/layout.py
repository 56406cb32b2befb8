"""What a safetensors file holds, told from its header alone: the name, type, shape and place of each tensor."""

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from handler.core.untrusted import parse
from handler.volume.manifest import CHUNK

DTYPES = {
    "BOOL": ("bool", 1), "U8": ("uint8", 1), "I8": ("int8", 1), "I16": ("int16", 2), "I32": ("int32", 4),
    "I64": ("int64", 8), "F8_E4M3": ("float8_e4m3fn", 1), "F8_E5M2": ("float8_e5m2", 1),
    "F8_E8M0": ("float8_e8m0fnu", 1), "F16": ("float16", 2), "BF16": ("bfloat16", 2), "F32": ("float32", 4),
    "F64": ("float64", 8),
}  # fmt: skip
FLOATS = ("float16", "bfloat16", "float32")  # what is brought to the type that a model computes in
LARGEST = 1 << 63  # what torch counts with
WIDTHS = dict(DTYPES.values())


@dataclass(frozen=True, slots=True)
class Slot:
    """Where a tensor is in its file; `dtype` is torch's name."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def read_layout(path: Path) -> dict[str, Slot]:
    """The layout of the file at `path`, reading its header alone. OSError, or ValueError as of `layout`."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a FIFO would hold us in open
    try:
        size = os.fstat(descriptor).st_size
        head = os.pread(descriptor, 8, 0)
        return layout(memoryview(head + os.pread(descriptor, min(int.from_bytes(head, "little"), CHUNK), 8)), size)
    finally:
        os.close(descriptor)


def layout(data: memoryview, size: int) -> dict[str, Slot]:
    """Of a file of `size` bytes that begins with `data`, all of its header. ValueError says why it cannot be one."""
    end = 8 + int.from_bytes(data[:8], "little")
    if end > min(len(data), CHUNK):
        raise ValueError(f"its header cannot have {end - 8} bytes")
    try:
        entries = parse(bytes(data[8:end]))
        entries.pop("__metadata__", None)
        slots = {name: _slot(entry, end) for name, entry in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError("its header makes no sense") from None
    for name, slot in sorted(slots.items(), key=lambda item: (item[1].start, item[1].stop)):
        if slot.start != end:
            raise ValueError(f"there is a gap or an overlap before {name}")
        end = slot.stop
    if end != size:
        raise ValueError(f"its tensors end at byte {end}, the file at {size}")
    return slots


def _slot(entry: dict[str, Any], base: int) -> Slot:
    dtype, width = DTYPES[entry["dtype"]]
    shape, (start, stop) = entry["shape"], entry["data_offsets"]
    counts = all(type(n) is int and 0 <= n < LARGEST for n in (*shape, start, stop))
    if not counts or stop - start != math.prod(shape) * width:
        raise ValueError(entry)
    return Slot(dtype, tuple(shape), base + start, base + stop)
