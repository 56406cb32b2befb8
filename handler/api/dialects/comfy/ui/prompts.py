"""What the page does to prompts before it sends them: comments go, and of choices in braces one is taken."""

import re
from typing import Final

COMMENT: Final = re.compile(r"/\*.*?\*/|//[^\n]*", re.DOTALL)
CHOICE: Final = re.compile(r"(?<!\\)\{((?:[^{}\\]|\\.)*)\}", re.DOTALL)  # the innermost
ESCAPED: Final = re.compile(r"\\([{}|])")
MOST: Final = 1000  # choices in a text


def chosen(text: str) -> tuple[str, bool]:
    """A text as the page sends it, where each choice is the first, and whether it had a choice at all.

    The page takes one of them by chance with every prompt.
    """
    text, free = COMMENT.sub("", text), False
    for _ in range(MOST):
        text, count = CHOICE.subn(lambda found: re.split(r"(?<!\\)\|", found[1], maxsplit=1)[0], text)
        free = free or bool(count)
        if not count:
            break
    return ESCAPED.sub(r"\1", text), free
