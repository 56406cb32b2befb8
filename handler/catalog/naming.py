"""Naming: which of a model's tensors, as diffusers and transformers call them, a tensor of a single file is.

It may be several, whose rows it holds one after another. That is most of any conversion, so a file can be read as if
diffusers had written it, with no copy made. A few tensors are also turned.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Literal

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]
Turn = Literal["", "swap", "transpose"]
LEAVES = {"weight": "weight", "bias": "bias", "scale": "weight"}  # FLUX calls the weight of a norm its scale
NUMBERED = re.compile(r"((?:blocks|layers|norms|blk)\.)(\d+)(?=\.)")


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows `first` to `last` of the file's tensor `source` are the model's `name`, of this shape.

    `turn`: "swap" exchanges the halves of the rows (shift and scale), "transpose" the two axes.
    """

    source: str
    name: str
    shape: Shape
    first: int
    last: int
    turn: Turn = ""


@dataclass(frozen=True, slots=True)
class To:
    """What one tensor becomes: the names that get its rows, as many equal shares as `shares` says each."""

    names: tuple[str, ...]
    shares: tuple[int, ...] = ()
    turn: Turn = ""
    flat: bool = False  # a convolution of one pixel is a matrix here


Rules = Mapping[str, To]  # by the name without its leaf, # for each number; where the leaf is none of these, by all
Rule = str | tuple[str, ...] | To  # one name; several that share the rows alike; all there is to say
Naming = Callable[[Shapes], Callable[[str], To | None]]


def pieces(naming: Naming, shapes: Shapes) -> tuple[list[Piece], list[str]]:
    """All that a file's tensors of these names and shapes become, and the names that this naming does not know."""
    told = naming(shapes)
    found, strange = list[Piece](), list[str]()
    for source, shape in shapes.items():
        if (to := told(source)) is None:
            strange.append(source)
        elif to.names:
            found += _cut(source, shape, to)
    return found, strange


def _cut(source: str, shape: Shape, to: To) -> Iterator[Piece]:
    rows, tail = (shape[0], shape[1:2] if to.flat else shape[1:]) if shape else (1, ())
    shares = to.shares or (1,) * len(to.names)
    ends = [rows * end // sum(shares) for end in accumulate(shares, initial=0)]
    for name, (first, last) in zip(to.names, pairwise(ends), strict=True):
        whole = (last - first, *tail) if shape else ()
        yield Piece(source, name, whole[::-1] if to.turn == "transpose" else whole, first, last, to.turn)


def by(rules: Rules) -> Naming:
    """The naming of a table."""
    return lambda shapes: lambda name: looked_up(name, rules)


def looked_up(name: str, rules: Rules) -> To | None:
    numbers = [number for _, number in NUMBERED.findall(name)]
    plain = NUMBERED.sub(r"\1#", name)
    stem, _, leaf = plain.rpartition(".")
    if to := rules.get(plain):
        return _numbered(to, numbers, "")
    return _numbered(to, numbers, f".{LEAVES[leaf]}") if leaf in LEAVES and (to := rules.get(stem)) else None


def _numbered(to: To, numbers: list[str], leaf: str) -> To:
    names = []
    for name in to.names:
        for number in numbers:
            name = name.replace("#", number, 1)
        names.append(name + leaf)
    return replace(to, names=tuple(names))


def rules(**groups: Mapping[str, Rule]) -> dict[str, To]:
    """One table of several."""
    told = [item for group in groups.values() for item in group.items()]
    return {name: _to(rule) for name, rule in told}


def _to(rule: Rule) -> To:
    match rule:
        case To():
            return rule
        case str():
            return To((rule,))
        case _:
            return To(rule)


def within(old: str, new: str, rules: Mapping[str, str]) -> dict[str, str]:
    return {f"{old}{a}": f"{new}{b}" for a, b in rules.items()}
