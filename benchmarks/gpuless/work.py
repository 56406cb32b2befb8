"""What a piece of GPU code does, in numbers that no GPU is needed for: launches, bytes, and its heavy operations.

An operation is a line of text: kernel, type, sizes. Products are `mm float8_e4m3fn 1x4096x9216x3072` (matrices, rows,
columns, inner length); convolutions `conv bfloat16 1x512x512x9x16384` (pictures, channels out and in, pixels of the
kernel, pixels out); attention `cudnn bfloat16 1x24x4352x4352x128` (pictures, heads, queries, keys, a head's width), of
which `wide` is no fused kernel: two products, with a softmax of scores in memory between them.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

BYTES = {"float32": 4, "float8_e4m3fn": 1, "int8": 1, "float4_e2m1fn_x2": 0.5}  # of a value; any other type has two
SCORE = 20  # bytes of a score of `wide`: written, normalised and rounded in fp32, read again in 16 bits
RESULT = 2  # bytes of a value of what comes out: 16-bit floats, everywhere
Region = tuple[Any, int]  # of a buffer: where its first value is, if that is known, and how many it has


@dataclass(slots=True)
class Work:
    """`kernels` is how many different ones were generated, `launches` how many are started, extern ones included.

    `triton_bytes` is what the generated (eagerly: the light) kernels move, `extern_bytes` what the others do; `casts`
    how many 8-bit (or 4-bit) activations products take, `activations` how many different ones there are to round.
    """

    kernels: int = 0
    launches: int = 0
    triton_bytes: int = 0
    extern_bytes: int = 0
    casts: int = 0
    activations: int = 0
    operations: dict[str, int] = field(default_factory=dict)

    def add(self, operation: str) -> None:
        """Count a heavy operation."""
        self.launches += 1
        self.extern_bytes += moved(operation)
        self.operations[operation] = self.operations.get(operation, 0) + 1


@dataclass(frozen=True, slots=True)
class Operation:
    """A line of `Work.operations`, taken apart."""

    kernel: str
    dtype: str
    sizes: tuple[int, ...]


def values(regions: Iterable[Region]) -> int:
    """How many values of a buffer these regions are, those inside another not counted again.

    One of every n values of a region begins among its first n, as do the even and the odd halves that rotations read.
    """
    found = set(regions)
    return sum(count for start, count in found if not any(_inside(start, count, *other) for other in found))


def _inside(start: int, count: int, whole: int, many: int) -> bool:
    after = start - whole
    return count < many and isinstance(after, int) and 0 <= after < many // count


def operation(line: str) -> Operation:
    """The parts of the line."""
    kernel, dtype, sizes = line.split()
    return Operation(kernel, dtype, tuple(map(int, sizes.split("x"))))


def line(kernel: str, dtype: str, *sizes: int) -> str:
    """What `operation` takes apart."""
    return f"{kernel} {dtype} {'x'.join(map(str, sizes))}"


def flop(text: str) -> int:
    """Multiplications and additions; attention's are those of its two products."""
    it = operation(text)
    return (2 if it.kernel in ("mm", "conv") else 4) * math.prod(it.sizes)


def moved(text: str) -> int:
    """Bytes, each operand and the result once. A convolution's input is as large as its output, channels apart."""
    it = operation(text)
    width = BYTES.get(it.dtype, 2)
    if it.kernel == "mm":
        many, rows, columns, inner = it.sizes
        return int(many * (width * inner * (rows + columns) + RESULT * rows * columns))
    if it.kernel == "conv":
        many, out, into, kernel, pixels = it.sizes
        return int(width * (many * pixels * (out + into) + out * into * kernel))
    many, heads, queries, keys, head = it.sizes
    scores = SCORE * many * heads * queries * keys if it.kernel == "wide" else 0
    return int(width * many * heads * head * 2 * (queries + keys)) + scores
