"""Names: what nodes' titles call a value, and a field for each, under a name that no other has."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from handler.api.dialects.comfy.plan import title_of
from handler.api.workflows.fields import ALPHA, RESERVED, Field, Kind, Place
from handler.api.workflows.search import KINDS, Found, Search, literal, row_of, slug, takes
from handler.core.loras import HEAVIEST
from handler.core.request import MAX_SEED, MAX_SIDE, MIN_SIDE
from handler.core.sampling import MAX_STEPS

NAMED = re.compile(r"(?<!\S)\$([A-Za-z]\w*)(?:\.(\w+))?")
SPELLED = re.compile(r"(?:input\s*:\s*|input\s+|prompt\s*:\s*)(\S.*)", re.IGNORECASE)
FILES = ("image", "mask")
ORDER = ("prompt", "negative_prompt", *FILES, "width", "height", "n", "seed", "steps", "guidance", "cfg", "denoise")
LIMITS: Mapping[str, tuple[float, float]] = {
    "width": (MIN_SIDE, MAX_SIDE),
    "height": (MIN_SIDE, MAX_SIDE),
    "seed": (-1, MAX_SEED),
    "steps": (1, MAX_STEPS),
    "cfg": (1, 100),
    "lora": (-HEAVIEST, HEAVIEST),
}
ABOUT = {
    "prompt": "What the picture should show.",
    "negative_prompt": "What to avoid; at a guidance of 1 it changes nothing.",
    "seed": "Left out, or -1, it is drawn at random; the answer names it.",
    "n": "How many pictures.",
    "denoise": "How much of the image is drawn anew.",
    "image": "An image file in base64 or as a data URL.",
    "mask": "An image file of the image's size, transparent where it is to be drawn anew; without it the image's own.",
    "lora": "How much of the LoRA is added.",
}


def titled(search: Search, nodes: list[str]) -> None:
    """Call what the titles of `nodes` name as they say."""
    for node, said, name in _titled(search.graph, [node for node in nodes if not row_of(search.graph, node).output]):
        _rename(search, node, said, name)


def _titled(graph: Mapping[str, Any], nodes: list[str]) -> Iterator[tuple[str, str, str]]:
    """What titles name: a node, an input of it or none in particular, and the field's name."""
    for node in nodes:
        title = title_of(graph[node])
        yield from ((node, wanted, slug(name)) for name, wanted in NAMED.findall(title))
        if spelled := SPELLED.fullmatch(title.strip()):
            yield node, "", slug(spelled[1])


def _rename(search: Search, node: str, said: str, name: str) -> None:
    """Give what a title means the name that it says. Of a node of which nothing was found that is its first value."""
    all_places = (place for one in search.found for place in one.places)
    places = {place for place in all_places if place.node == node and place.key != ALPHA}
    theirs = [one for one in search.found if places.intersection(one.places)]
    inputs = [each for each in row_of(search.graph, node).inputs if literal(search.graph, node, each)]
    if said and (Place(node, said) in places or said not in inputs):
        _split(search, [one for one in theirs if Place(node, said) in one.places], [Place(node, said)], name)
    elif said or (inputs and not theirs):
        search.add("titled", [Place(node, said or inputs[0])], name)
    elif len(theirs) == 1:
        _split(search, theirs, [*places], name)


def _split(search: Search, found: list[Found], ours: list[Place], name: str) -> None:
    """Take a titled node's values out of those that happen to be equal."""
    for one in found:
        mine, one.places = (
            [each for each in one.places if each in ours],
            [each for each in one.places if each not in ours],
        )
        at = search.found.index(one)
        named = Found(one.role, name, one.value, takes(search.graph, mine[0]), mine)
        search.found[at : at + 1] = [named, one] if one.places else [named]


def numbered(search: Search, max_n: int) -> Iterator[Field]:
    """Fields under names of their own; `max_n` is the worker's KINDLING_MAX_N."""
    told = any(one.role == "guidance" for one in search.found)
    names = set(RESERVED)
    for one in sorted(search.found, key=lambda one: ORDER.index(one.role) if one.role in ORDER else len(ORDER)):
        called = {"cfg": "cfg" if told else "guidance"}.get(one.name, one.name)
        name, number = called, 1
        while name in names:
            number += 1
            name = f"{called}_{number}"
        names.add(name)
        yield _field(one, name, number == 1, max_n)


def _field(one: Found, name: str, first: bool, max_n: int) -> Field:
    kind, wanted = _kind(one), one.wanted
    low, high = {**LIMITS, "n": (1, max_n)}.get(one.role, (wanted.low, wanted.high))
    if kind not in ("integer", "number"):
        low = high = None
    choices = wanted.type if isinstance(wanted.type, tuple) and not wanted.folder else ()
    seed = one.role == "seed"
    default = None if kind == "image" or (seed and first) else one.value
    kept = one.value if one.role == "image" and wanted.folder else None
    about = ABOUT.get(one.role, "") if not seed or first else ""
    return Field(name, kind, tuple(one.places), default, low, high, choices, kept, seed, about)


def _kind(one: Found) -> Kind:
    if one.role in FILES:
        return "image"
    wanted = one.wanted.type
    return KINDS.get(wanted, "string") if isinstance(wanted, str) else "string"
