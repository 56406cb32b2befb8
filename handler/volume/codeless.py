"""What a configuration says that would have a library fetch code, or run a folder's own: refused by name, unread.

A configuration is data that others wrote. transformers would import a folder's Python for `auto_map`, after a question
on the terminal, and download a kernel for an implementation of attention that it does not have.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from handler.core.errors import WeightsCorrupt
from handler.core.untrusted import Malformed, load
from handler.volume.room import inside, reading

OWN_CODE = "auto_map"  # classes of the folder's own
IMPLEMENTATION = re.compile(r"_?\w+_implementation(_internal)?")  # what computes attention, or experts
BUILT_IN = (None, "eager", "sdpa")  # the library's own: any other it looks for on the hub


def require_codeless(folder: Path, remedy: str) -> None:
    """WeightsCorrupt, with the file and the entry, if a configuration in `folder` wants more than classes by name."""
    with reading(folder):
        for path in [path for path in inside(folder) if path.name.endswith("config.json")]:
            try:
                wanted = next(_wanted(load(path)), "")
            except Malformed:
                raise WeightsCorrupt(f"{path} is no JSON object. {remedy}", about=str(path)) from None
            if wanted:
                told = f"{path} has {wanted}, which would run code of others and is refused. {remedy}"
                raise WeightsCorrupt(told, about=str(path))


def _wanted(said: Mapping[str, Any]) -> Iterator[str]:
    for key, value in said.items():
        if key == OWN_CODE and value:
            yield OWN_CODE
        elif IMPLEMENTATION.fullmatch(key):
            each = value.values() if isinstance(value, dict) else [value]
            yield from (f"{key} {one!r:.80}" for one in each if one not in BUILT_IN)
        elif isinstance(value, dict):
            yield from _wanted(value)
