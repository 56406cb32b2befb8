"""What a GGUF file holds, told from its head alone, which is not trusted: no count in it makes room for anything.

github.com/ggml-org/ggml/blob/master/docs/gguf.md is the format; `BLOCKS` are the sizes of ggml's types.
"""

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from handler.volume.layout import LARGEST, Slot, require_count, require_names, weights_in

MAGIC = b"GGUF"
HEAD = 32 << 20  # bytes that are read at most: a language model's words are in there too
MOST = 1 << 20  # facts, and values of a list
LONGEST = 1 << 16  # bytes of a name
DEEPEST = 4  # dimensions
BLOCKS = {  # ggml's number: name, weights of a block, bytes of a block
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 30: ("BF16", 1, 2),
}  # fmt: skip
PLAIN = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, LIST = 8, 9
SHAPE = "comfy.gguf.orig_shape."  # what ggml cannot have: more than four dimensions, or rows no block fits in


@dataclass(slots=True)
class Cursor:
    """Where we are in the head; ValueError where it ends too early."""

    data: memoryview
    at: int = 0

    def take(self, count: int) -> memoryview:
        if count > len(self.data) - self.at:
            raise ValueError("its head ends too early, or is too long")
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0]

    def text(self, longest: int = LONGEST) -> str:
        size = self.number("Q")
        if size > longest:
            raise ValueError(f"its head has a name of {size} bytes")
        return bytes(self.take(size)).decode()


def layout(data: memoryview, size: int) -> dict[str, Slot]:
    """Of a file of `size` bytes that begins with `data`. ValueError says why it cannot be one."""
    cursor = Cursor(data)
    if bytes(cursor.take(4)) != MAGIC or (version := cursor.number("I")) not in (2, 3):
        raise ValueError("it is no GGUF file of version 2 or 3")
    del version
    count, facts = cursor.number("Q"), cursor.number("Q")
    if max(count, facts) > MOST:
        raise ValueError("its head cannot be true")
    require_count(count)
    said = dict(_fact(cursor) for _ in range(facts))
    tensors = [_tensor(cursor) for _ in range(count)]
    alignment = said.get("general.alignment", 32)
    if type(alignment) is not int or not 1 <= alignment <= 1 << 16:
        raise ValueError("its head has an alignment that cannot be")
    base = -(-cursor.at // alignment) * alignment
    slots = {name: _slot(said.get(SHAPE + name), sides, kind, base + start) for name, sides, kind, start in tensors}
    if len(slots) != count:
        raise ValueError("it has a tensor twice")
    require_names(slots)
    if torn := next((name for name, slot in slots.items() if slot.stop > size), None):
        raise ValueError(f"its tensor {torn} ends at byte {slots[torn].stop}, the file at {size}")
    return slots


def _fact(cursor: Cursor) -> tuple[str, Any]:
    return cursor.text(), _value(cursor, cursor.number("I"))


def _value(cursor: Cursor, kind: int) -> Any:
    if kind in NUMBERS:
        return cursor.number(NUMBERS[kind])
    if kind == STRING:
        return cursor.text(HEAD)
    inner, count = cursor.number("I"), cursor.number("Q")
    if kind != LIST or count > MOST or inner == LIST:
        raise ValueError("its head has a value that cannot be")
    each: Callable[[], Any] = (lambda: cursor.text(HEAD)) if inner == STRING else (lambda: _value(cursor, inner))
    return [each() for _ in range(count)]


def _tensor(cursor: Cursor) -> tuple[str, list[int], int, int]:
    name, axes = cursor.text(), cursor.number("I")
    if axes > DEEPEST:
        raise ValueError(f"its tensor {name} has {axes} dimensions")
    sides = [cursor.number("Q") for _ in range(axes)]
    return name, sides[::-1], cursor.number("I"), cursor.number("Q")


def _slot(shape: Any, sides: list[int], kind: int, start: int) -> Slot:
    if kind not in BLOCKS:
        raise ValueError(
            f"it has weights of ggml's type {kind}; {', '.join(name for name, *_ in BLOCKS.values())} are read"
        )
    name, weights, width = BLOCKS[kind]
    if (count := weights_in(sides)) % weights or start >= LARGEST:
        raise ValueError(f"it has {count} weights in blocks of {weights}")
    whole = tuple(shape) if isinstance(shape, list) else tuple(sides)
    if weights_in(whole) != count:
        raise ValueError("it gives a tensor two sizes")
    stop = start + count // weights * width
    return Slot(PLAIN.get(name, "float32"), whole, start, stop, packed="" if name in PLAIN else name)
