"""The kinds of changes: for each kind of node what may stand in its place, so that a test should fail."""

import ast
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import Any

OTHERS: dict[type[ast.AST], type[ast.AST]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.And: ast.Or,
    ast.Or: ast.And,
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
    ast.Pow: ast.Mult,
    ast.BitOr: ast.BitAnd,
    ast.BitAnd: ast.BitOr,
    ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
}
NAMES = {"min": "max", "max": "min", "any": "all", "all": "any", "sorted": "list", "reversed": "list"}
NOTHING = ("None", "False", "[]", "()", "{}", "''")  # what is as false as None; False becomes True, as a constant
NEVER = "ZeroDivisionError"  # in the place of an exception that is caught
LARGE = 1000  # one more of so many is not worth a test; twice as many is
# Keywords of a call that say something to people, or make sure of what is true anyway.
UNSEEN = {"daemon", "description", "flush", "include_input", "include_url", "indent", "name", "repr", "strict", "title"}
TALK = re.compile(r"(log|logging|warnings)\.|(print|say)$")
TYPE = re.compile(r"([A-Z]\w*[a-z]\w*|int|float|str|bytes|bool|None|dict|list|tuple)\b")
Found = tuple[str, ast.AST, ast.AST | str]  # a kind, what is replaced, and by what


def _compare(node: ast.Compare) -> Iterator[Found]:
    for i, op in enumerate(node.ops):
        ops: list[ast.cmpop] = [*node.ops[:i], OTHERS[type(op)](), *node.ops[i + 1 :]]
        yield "compare", node, ast.Compare(node.left, ops, node.comparators)
    for side in (node.left, *node.comparators):
        yield from _word(side)


def _word(node: ast.AST | None) -> Iterator[Found]:
    """A name that somebody compares or looks up."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value:
        yield "word", node, repr(f"{node.value}_")


def _bool(node: ast.BoolOp) -> Iterator[Found]:
    other: ast.boolop = OTHERS[type(node.op)]()
    yield "and/or", node, ast.BoolOp(other, node.values)
    for rest in _without(node.values):
        yield "drop-operand", node, rest[0] if len(rest) == 1 else ast.BoolOp(node.op, rest)


def _without(items: Sequence[Any]) -> list[list[Any]]:
    return [[*items[:i], *items[i + 1 :]] for i in range(len(items))]


def _binary(node: ast.BinOp) -> Iterator[Found]:
    sides = (node.left, node.right)
    texts = any(isinstance(side, ast.JoinedStr) or isinstance(vars(side).get("value"), str | bytes) for side in sides)
    types = isinstance(node.op, ast.BitOr) and any(TYPE.match(ast.unparse(side)) for side in sides)
    if type(node.op) in OTHERS and not texts and not types:
        yield "arithmetic", node, ast.BinOp(node.left, OTHERS[type(node.op)](), node.right)
    if isinstance(node.op, ast.Div):
        yield from _word(node.right)


def _unary(node: ast.UnaryOp) -> Iterator[Found]:
    if isinstance(node.op, ast.Not | ast.USub):
        yield "not" if isinstance(node.op, ast.Not) else "arithmetic", node, node.operand


def _condition(node: ast.If | ast.While | ast.IfExp) -> Iterator[Found]:
    if ast.unparse(node.test) != "TYPE_CHECKING" and "__name__" not in ast.unparse(node.test):
        yield "not", node.test, ast.UnaryOp(ast.Not(), node.test)


def _filter(node: ast.comprehension) -> Iterator[Found]:
    for test in node.ifs:
        yield "not", test, ast.UnaryOp(ast.Not(), test)
        yield "always", test, "True"


def _constant(node: ast.Constant) -> Iterator[Found]:
    match node.value:
        case bool(value):
            yield "constant", node, repr(not value)
        case int(value) | float(value):
            twice = abs(value) >= LARGE or (isinstance(value, float) and value)
            yield "constant", node, repr(value * 2 if twice else value + 1)


def _call(node: ast.Call) -> Iterator[Found]:
    called = ast.unparse(node.func)
    if called in ("sorted", "reversed"):
        yield "order", node, ast.Call(ast.Name("list"), node.args[:1], [])
    elif called in NAMES:
        yield "min/max", node.func, NAMES[called]
    elif called in ("suppress", "contextlib.suppress"):
        yield from (("except", error, NEVER) for error in node.args)
    for gone in (each for each in node.keywords if each.arg and each.arg not in UNSEEN):
        kept = [each for each in node.keywords if each is not gone]
        yield "drop-argument", node, ast.Call(node.func, node.args, kept)


def _part(node: ast.Subscript) -> Iterator[Found]:
    yield from _word(node.slice)
    if isinstance(node.slice, ast.Slice):
        lower, upper, step = node.slice.lower, node.slice.upper, node.slice.step
        for slice_ in (ast.Slice(None, upper, step), ast.Slice(lower, None, step)):
            yield "slice", node, ast.Subscript(node.value, slice_)


def _elements(node: ast.Tuple | ast.List | ast.Set) -> Iterator[Found]:
    stored = isinstance(vars(node).get("ctx"), ast.Store | ast.Del)
    if len(node.elts) > 1 and len(set(map(type, node.elts))) == 1 and not stored:
        yield from (("drop-element", node, type(node)(rest)) for rest in _without(node.elts))


def _entries(node: ast.Dict) -> Iterator[Found]:
    yield from chain.from_iterable(map(_word, node.keys))
    for pairs in _without(list(zip(node.keys, node.values, strict=True))):
        yield "drop-element", node, ast.Dict([key for key, _ in pairs], [value for _, value in pairs])


def _return(node: ast.Return) -> Iterator[Found]:
    if node.value and ast.unparse(node.value) not in NOTHING:
        yield "return", node, "return None"


def _statement(node: ast.stmt) -> Iterator[Found]:
    """One that is left out."""
    value, targets = vars(node).get("value"), vars(node).get("targets", [])
    call = value.value if isinstance(value, ast.Await) else value
    match node:
        case ast.Expr() if not isinstance(call, ast.Call) or TALK.match(ast.unparse(call.func)):
            return
        case ast.Assign() if not isinstance(targets[0], ast.Attribute | ast.Subscript):
            return
        case ast.AugAssign(target, op, value) if type(op) in OTHERS:
            other: ast.operator = OTHERS[type(op)]()
            yield "arithmetic", node, ast.unparse(ast.AugAssign(target, other, value))
    yield f"drop-{type(node).__name__.lower()}", node, "pass"


def _loop(node: ast.Break | ast.Continue) -> Iterator[Found]:
    yield "loop", node, "continue" if isinstance(node, ast.Break) else "break"


def _caught(node: ast.ExceptHandler) -> Iterator[Found]:
    errors = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
    yield from (("except", error, NEVER) for error in errors if error)


def _procedure(node: ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[Found]:
    """One that gives nothing back does nothing."""
    body = [each for each in node.body if not isinstance(each, ast.Expr) or not isinstance(each.value, ast.Constant)]
    parts = chain.from_iterable(map(ast.walk, node.body))
    ends = [each for each in parts if isinstance(each, ast.Return | ast.Yield | ast.YieldFrom)]
    gives = any(each.value or not isinstance(each, ast.Return) for each in ends)
    if len(body) > 1 and not gives:
        yield "empty", body[0], f"return\n{' ' * body[0].col_offset}"


KINDS: dict[type[ast.AST], Callable[..., Iterator[Found]]] = {
    ast.Compare: _compare,
    ast.BoolOp: _bool,
    ast.BinOp: _binary,
    ast.UnaryOp: _unary,
    ast.If: _condition,
    ast.While: _condition,
    ast.IfExp: _condition,
    ast.comprehension: _filter,
    ast.Constant: _constant,
    ast.Call: _call,
    ast.Subscript: _part,
    ast.Tuple: _elements,
    ast.List: _elements,
    ast.Set: _elements,
    ast.Dict: _entries,
    ast.Return: _return,
    **dict.fromkeys((ast.Expr, ast.Assign, ast.AugAssign, ast.Delete, ast.Raise), _statement),
    ast.Break: _loop,
    ast.Continue: _loop,
    ast.ExceptHandler: _caught,
    ast.FunctionDef: _procedure,
    ast.AsyncFunctionDef: _procedure,
}
