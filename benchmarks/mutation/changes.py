"""What can be changed in a module, one thing at a time, so that a test of it should fail; and a sample of that.

Left alone is what only says things or types them: docstrings, messages, log lines, annotations, decorators, asserts.
"""

import ast
import random
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest

from mutation.kinds import KINDS, TALK, UNSEEN

A_LINE = 2  # changes at most


@dataclass(frozen=True, slots=True)
class Change:
    """Bytes `start` to `stop` of a file, from its `line`, become `text`."""

    kind: str
    line: int
    start: int
    stop: int
    text: str

    def made(self, source: bytes) -> bytes:
        """The file with this change."""
        return source[: self.start] + self.text.encode() + source[self.stop :]

    def told(self, source: bytes) -> tuple[str, str]:
        """The lines it touches, before and after, each with single spaces: what finds them again in a later version."""
        first, last = source.rfind(b"\n", 0, self.start) + 1, source.find(b"\n", self.stop)
        lines, more = source[first:last], len(self.made(source)) - len(source)
        after = self.made(source)[first : last + more]
        return " ".join(lines.decode().split()), " ".join(after.decode().split())


def pick(path: str, source: bytes, n: int, seed: int) -> list[Change]:
    """`n` changes of a file: of each kind in turn, and few of a line."""
    chance, kinds, lines, picked = random.Random(f"{seed} {path}"), defaultdict(list), Counter[int](), list[Change]()
    for change in changes(source):
        kinds[change.kind].append(change)
    for group in kinds.values():
        chance.shuffle(group)
    for change in chain(*zip_longest(*chance.sample(list(kinds.values()), len(kinds)))):
        if change and len(picked) < n and lines[change.line] < A_LINE and _differs(source, change):
            lines[change.line] += 1
            picked.append(change)
    return sorted(picked, key=lambda change: change.start)


def changes(source: bytes) -> Iterator[Change]:
    """All of a file; a few may make no difference, or no Python."""
    tree, starts = ast.parse(source), [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    ends = {id(part) for each in ast.walk(tree) if isinstance(each, ast.Try) for part in _all(each.finalbody)}
    for node in _walk(tree):
        for kind, old, new in KINDS.get(type(node), lambda _: ())(node):
            at = vars(old)
            start = starts[at["lineno"] - 1] + at["col_offset"]
            stop = start if kind == "empty" else starts[at["end_lineno"] - 1] + at["end_col_offset"]
            text = new if isinstance(new, str) else f"({ast.unparse(new)})"
            cleanup = id(old) in ends and text == "pass"
            yield Change("cleanup" if cleanup else kind, at["lineno"], start, stop, text)


def _differs(source: bytes, change: Change) -> bool:
    try:
        return ast.dump(ast.parse(change.made(source))) != ast.dump(ast.parse(source))
    except SyntaxError:
        return False


def _all(nodes: Sequence[ast.AST]) -> Iterator[ast.AST]:
    return chain.from_iterable(map(ast.walk, nodes))


def _walk(node: ast.AST) -> Iterator[ast.AST]:
    yield node
    for child in _within(node):
        yield from _walk(child)


def _within(node: ast.AST) -> Sequence[ast.AST]:
    """What of `node` is looked at."""
    match node:
        case ast.JoinedStr() | ast.arg() | ast.Assert() | ast.Expr(ast.Constant()):
            return ()
        case ast.Expr(ast.Call(called)) if TALK.match(ast.unparse(called)):
            return ()
        case ast.keyword(arg) if arg in UNSEEN:
            return ()
        case ast.Subscript(ast.Name("Literal" | "Callable")):
            return ()
        case ast.Return(ast.Tuple(elements)) | ast.Assign([ast.Tuple()], ast.Tuple(elements)):
            return elements
        case ast.AnnAssign(value=value):
            return (value,) if value else ()
        case ast.FunctionDef() | ast.AsyncFunctionDef():
            return (node.args, *node.body)
        case ast.ClassDef() | ast.ExceptHandler():
            return node.body
    return list(ast.iter_child_nodes(node))
