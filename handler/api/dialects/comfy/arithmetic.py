"""Sums that a node's text asks for, such as `a*16`: read by Python's parser, computed by a table, never executed."""

import ast
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

Number = int | float
LONGEST = 200  # characters
LARGEST = 1e15
TWO: dict[type[ast.operator], Callable[[Any, Any], Number]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
CALLS: dict[str, Callable[..., Number]] = {
    "min": min,
    "max": max,
    "round": round,
    "abs": abs,
    "int": int,
    "floor": math.floor,
    "ceil": math.ceil,
    "sqrt": math.sqrt,
}


def compute(text: str, names: Mapping[str, Number]) -> Number:
    """What `text` comes to; ValueError or ArithmeticError where it is no sum of these names and numbers."""
    if len(text) > LONGEST:
        raise ValueError(f"it is longer than {LONGEST} characters")
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except (SyntaxError, RecursionError, MemoryError):
        raise ValueError("it is no sum") from None
    return _of(tree.body, names)


def _of(node: ast.expr, names: Mapping[str, Number]) -> Number:
    match node:
        case ast.Constant(value=int() | float() as found):
            return _small(found)
        case ast.Name(id=name) if name in names:
            return names[name]
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_of(operand, names)
        case ast.BinOp(left=left, op=kind, right=right) if type(kind) in TWO:
            return _small(TWO[type(kind)](_of(left, names), _of(right, names)))
        case ast.Call(func=ast.Name(id=name), args=[_, *_] as args, keywords=[]) if name in CALLS:
            return _small(CALLS[name](*(_of(arg, names) for arg in args)))
    raise ValueError("it is no sum of numbers, a, b and c")


def _small(found: Number) -> Number:
    if not abs(found) <= LARGEST:
        raise ValueError("it is too large")
    return found
