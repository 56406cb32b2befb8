"""What an output's pictures are called, as ComfyUI calls them: `PREFIX_00001_.png`, by the highest number there is.

A prefix may have folders before it, and names in percent signs: `%width%` and its like, which ComfyUI's server knows,
`%date:yyyy-MM-dd%` and `%KSampler.seed%`, which its page fills in before it sends a prompt.
"""

import posixpath
import re
import time
from collections.abc import Iterable, Mapping
from typing import Any

from handler.api.comfy.shelf import named
from handler.api.dialects.comfy.plan import class_of, title_of
from handler.core.errors import OutsideFolder

PLACEHOLDER = re.compile("%([^%/]{1,100})%")
CLOCK = {"year": "%Y", "month": "%m", "day": "%d", "hour": "%H", "minute": "%M", "second": "%S"}
# By length, so that yyyy is not two times yy.
DATE = {"yyyy": "%Y", "yy": "%y", "MM": "%m", "dd": "%d", "hh": "%H", "HH": "%H", "mm": "%M", "ss": "%S"}
DATES = re.compile("|".join(DATE))
SHORT = 60  # characters of a value
UNNAMED = "ComfyUI"  # where a prefix is nothing
MOST = 12  # placeholders: each may be looked for in all nodes
UNPLAIN = re.compile(r'[/?<>\\:*|"\x00-\x1f\x7f]')


def filled(prefix: str, graph: Mapping[str, Any], size: tuple[int, int], place: int = 0) -> tuple[str, str]:
    """Subfolder and start of the name of the picture of this `size` at this `place` in its batch.

    OutsideFolder, InvalidValue if it leads elsewhere.

    What a placeholder is not known to mean stays as it is.
    """
    known = {"width": str(size[0]), "height": str(size[1]), "batch_num": str(place)}
    known |= {name: time.strftime(form) for name, form in CLOCK.items()}

    def fill(found: re.Match[str]) -> str:
        name = found[1]
        if name.startswith("date:"):
            return UNPLAIN.sub("_", DATES.sub(lambda part: time.strftime(DATE[part[0]]), name.removeprefix("date:")))
        return known.get(name) or _field(name, graph) or found[0]

    whole = posixpath.normpath(PLACEHOLDER.sub(fill, prefix, MOST).replace("\\", "/") or UNNAMED)
    if whole.startswith("/") or whole.split("/")[0] == "..":
        raise OutsideFolder("Saving an image outside the output folder is not allowed.", "filename_prefix")
    subfolder, start = posixpath.split(whole)
    named("output", subfolder, numbered(start, 1))
    return subfolder, start


def _field(name: str, graph: Mapping[str, Any]) -> str:
    """`%NODE.INPUT%`: a value of a node that is called so by title, class or id."""
    node, _, field = name.partition(".")
    for key, one in graph.items():
        inputs = one.get("inputs")
        value = inputs.get(field) if isinstance(inputs, dict) else None
        if isinstance(value, str | int | float) and node in (key, class_of(one), title_of(one)):
            return UNPLAIN.sub("_", str(value)[:SHORT]).lstrip(".")
    return ""


def numbered(start: str, number: int) -> str:
    """The name of one picture."""
    return f"{start}_{number:05}_.png"


def following(start: str, names: Iterable[str]) -> int:
    """The number after the highest among a folder's file names."""
    form = re.compile(rf"{re.escape(start)}_(\d{{1,9}})_")
    return max((int(found[1]) for name in names if (found := form.match(name))), default=0) + 1
