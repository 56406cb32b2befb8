"""What the page does to prompts before it sends them: comments go, and of choices in braces one is taken."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

COMMENT: Final = re.compile(r"/\*|//")
TOKEN: Final = re.compile(r"(\\.|[{}|])", re.DOTALL)
ESCAPED: Final = re.compile(r"\\([{}|])")
DEEPEST: Final = 100  # braces in each other


@dataclass(slots=True)
class Open:
    """What stands since a brace: all of it, and its first choice."""

    all: list[str] = field(default_factory=list)
    first: list[str] = field(default_factory=list)
    over: bool = False  # whether the first choice is

    def add(self, text: str) -> None:
        """More of it."""
        self.all.append(text)
        if not self.over:
            self.first.append(text)


def chosen(text: str) -> tuple[str, bool]:
    """A text as the page sends it, where each choice is the first, and whether it had a choice at all.

    The page takes one of them by chance with every prompt.
    """
    opened, free = [Open()], False
    for part in TOKEN.split("".join(_spoken(text))):
        if part == "{" and len(opened) <= DEEPEST:
            opened.append(Open())
        elif part == "}" and len(opened) > 1:
            closed, free = opened.pop(), True
            opened[-1].add("".join(closed.first))
        else:
            opened[-1].over |= part == "|" and len(opened) > 1
            opened[-1].add(part)
    return ESCAPED.sub(r"\1", "{".join("".join(one.all) for one in opened)), free


def _spoken(text: str) -> Iterator[str]:
    """What is no comment."""
    at = 0
    while found := COMMENT.search(text, at):
        ends, mark = found.group() == "/*", found.start()
        end = text.find("*/" if ends else "\n", found.end())
        if end < 0 and ends:
            break
        yield text[at:mark]
        at = len(text) if end < 0 else end + 2 * ends
    yield text[at:]
