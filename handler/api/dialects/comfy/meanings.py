"""What a node means here, in a sentence, with its own values: from the table of sentences beside this file."""

import tomllib
from collections.abc import Iterator, Mapping
from functools import cache
from importlib import resources
from string import Formatter
from typing import Any

from handler.api.dialects.comfy.plan import class_of
from handler.api.dialects.comfy.table import TABLE, like
from handler.core.untrusted import printed

SHORT = 60  # characters of a value


@cache
def sentences() -> Mapping[str, str]:
    """By class; those that aliases are like have theirs."""
    return tomllib.loads(resources.files(__package__).joinpath("meanings.toml").read_text("utf-8"))


def fields(sentence: str) -> Iterator[str]:
    """The inputs that a sentence names."""
    return (name for _, name, _, _ in Formatter().parse(sentence) if name)


def meaning(body: Mapping[str, Any]) -> str:
    """Of a node, in one line; empty of a class that is not in the table."""
    kind = class_of(body)
    if kind not in TABLE:
        return ""
    plain, theirs = like(kind)
    given = body.get("inputs")
    inputs = given if isinstance(given, dict) else {}
    sentence = sentences()[plain]
    return sentence.format_map({name: _value(kind, theirs.get(name, name), inputs) for name in fields(sentence)})


def _value(kind: str, name: str, inputs: Mapping[str, Any]) -> str:
    """One input's for people; `kind` may fix it, and then has none of that name."""
    wanted = TABLE[kind].inputs.get(name)
    value = inputs.get(name, wanted.default if wanted else None)
    if isinstance(value, list):
        return f"(from node {shortened(str(value[0]))})" if value else "(nothing)"
    if value is None or isinstance(value, dict):
        return "(nothing)"
    if isinstance(value, float):
        return f"{value:.6g}"
    return f'"{shortened(str(value))}"' if wanted and wanted.type == "STRING" else shortened(str(value))


def shortened(text: str, longest: int = SHORT) -> str:
    """In one line, of no more than so many characters, without what a terminal would obey."""
    line = printed(" ".join(text[: 4 * longest].split()))
    return line if len(line) <= longest and len(text) <= 4 * longest else f"{line[: longest - 3]}..."
