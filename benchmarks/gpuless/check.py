"""What `lower.py --check` says of rows that were made again: where they are worse than those in the file."""

from collections.abc import Iterable, Mapping
from typing import Any

MORE = 1.01  # how much of anything is no worse: rounding
COUNTED = ("launches", "triton_bytes", "extern_bytes", "casts", "layer_bytes")
Row = Mapping[str, Any]


def key(row: Row) -> tuple[str, ...]:
    """What a row is of."""
    return tuple(row[name] for name in ("model", "capability", "group", "part", "precision", "plan", "name"))


def worse(before: Iterable[Row], after: Iterable[Row]) -> list[str]:
    """A line for each figure of `after` that has grown, each row that failed or was not there, each other kernel."""
    known = {(*key(row), row["count"]): row for row in before}
    told = []
    for row in after:
        name, old = " ".join(key(row)), known.get((*key(row), row["count"]))
        if "error" in row:
            told.append(f"{name}: {row['error']}")
        elif old is None or "error" in old:
            told.append(f"{name}: not in the file; run make lower")
        else:
            grown = [f for f in COUNTED if row.get(f, 0) > MORE * old.get(f, 0)]
            told += [f"{name}: {figure} was {old.get(figure, 0)}, is {row[figure]}" for figure in grown]
            told += [f"{name}: {kernel} is new" for kernel in sorted(kernels(row) - kernels(old))]
    return told


def kernels(row: Row) -> set[str]:
    """The kinds of its heavy operations, with the width of a head where that is large: such attention is slow."""
    return {" ".join(line.split()[:2]) + (" of wide heads" if wide(line) else "") for line in row["operations"]}


def wide(line: str) -> bool:
    """Whether this is attention by a fused kernel, with heads that no fast one takes."""
    kernel, _, sizes = line.split()
    return kernel not in ("mm", "conv", "wide") and int(sizes.split("x")[-1]) > 256
