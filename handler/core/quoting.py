"""What callers sent, in what they are told of it: little, however much that was."""

import re
from collections.abc import Mapping
from typing import Any

QUOTED, LONGEST = 200, 2000  # characters of a word that a caller may have sent, and of all that is said of it
WORD = re.compile(rf"\S{{{QUOTED + 1},}}")


def brief(text: str, most: int = LONGEST) -> str:
    """`text` with at most `QUOTED` characters of each word, and `most` in all."""
    if len(text) <= QUOTED:
        return text
    text = WORD.sub(lambda word: f"{word[0][: QUOTED - 1]}…", text[: most + LONGEST])
    return text if len(text) <= most else f"{text[: most - 1]}…"


def brief_all(value: Any) -> Any:
    """The same of all texts in a JSON value."""
    if isinstance(value, Mapping):
        return {brief(name, QUOTED): brief_all(each) for name, each in value.items()}
    if isinstance(value, list):
        return [brief_all(each) for each in value]
    return brief(value) if isinstance(value, str) else value
