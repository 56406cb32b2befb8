"""Which widgets a class has, in the page's order: what the places of a node's values mean.

Known from a ComfyUI's own `/object_info`, where that is at hand, or else from our table.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

from handler.api.dialects.comfy.node import Input, Node
from handler.api.dialects.comfy.table import ALIASES, TABLE
from handler.api.dialects.comfy.ui.document import mapping, records, text
from handler.core.request import MAX_SEED

PLAIN: Final = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")  # types that a page has widgets for
SEEDS: Final = ("seed", "noise_seed")
PROMPTS: Final = ("CLIPTextEncode", "TextEncode")  # how classes begin whose texts may have {this|that}
DYNAMIC: Final = "COMFY_DYNAMICCOMBO_V3"


@dataclass(frozen=True, slots=True)
class Widget:
    """`more` are the widgets that a choice brings with it. `seed` has a second one, that says how it changes.

    `dynamic` texts may have {this|that}. `choices` are empty where any word goes, as for files.
    """

    name: str
    type: str
    default: Any = None
    choices: tuple[Any, ...] = ()
    seed: bool = False
    dynamic: bool = False
    more: Mapping[str, tuple["Widget", ...]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Order:
    """A class's widgets; `certain` if these are all that it has, in ComfyUI's own order."""

    widgets: tuple[Widget, ...]
    title: str
    certain: bool = True


def order(kind: str, classes: Mapping[str, Any]) -> Order | None:
    """A class's, by `classes`, the answer of an `/object_info`, or by our table; None if it is in neither."""
    if said := mapping(classes.get(kind)):
        return Order(tuple(_said(said)), text(said.get("display_name")) or kind)
    if row := TABLE.get(kind):
        widgets = tuple(_listed(row))
        return Order(widgets, row.title or kind, bool(widgets) and kind not in ALIASES and not row.rest)
    return None


def _listed(row: Node) -> Iterator[Widget]:
    """Of a row: those that are required first, as `/object_info` has them."""
    for name, wanted in sorted(row.inputs.items(), key=lambda one: not one[1].required):
        kind = wanted.type if isinstance(wanted.type, str) else "COMBO"
        if kind in PLAIN:
            seed = name in SEEDS or (kind == "INT" and wanted.high == MAX_SEED)
            yield Widget(name, kind, wanted.default, _choices(wanted), seed, has_choices(row, wanted))


def has_choices(row: Node, wanted: Input) -> bool:
    """Whether {this|that} in a text of this class is for the page to choose from."""
    return wanted.type == "STRING" and wanted.multiline and row.name.startswith(PROMPTS)


def _choices(wanted: Input) -> tuple[str, ...]:
    return () if isinstance(wanted.type, str) or wanted.folder else wanted.type


def _said(said: Mapping[str, Any]) -> Iterator[Widget]:
    """Of a class of an `/object_info`."""
    groups, orders = mapping(said.get("input")), mapping(said.get("input_order"))
    for group in ("required", "optional"):
        inputs = mapping(groups.get(group))
        named = orders.get(group)
        for name in named if isinstance(named, list) else inputs:
            match inputs.get(name) if isinstance(name, str) else None:
                case [kind, *more]:
                    yield from _one(name, kind, mapping(more[0]) if more else {})


def _one(name: str, kind: Any, options: Mapping[str, Any]) -> Iterator[Widget]:
    """An input's widget, unless it takes links alone."""
    choices = kind if isinstance(kind, list) else options.get("options")
    if options.get("forceInput"):
        return
    if kind == DYNAMIC:
        yield _of_choices(name, options)
    elif isinstance(kind, list) or kind == "COMBO":
        listed = tuple(choices) if isinstance(choices, list) else ()
        default = options.get("default", listed[0] if listed else None)
        files = any(key.endswith("_upload") for key in options)
        yield Widget(name, "COMBO", default, () if files else listed, bool(options.get("control_after_generate")))
    elif kind in PLAIN:
        seed = bool(options.get("control_after_generate")) or (kind == "INT" and name in SEEDS)
        yield Widget(name, kind, options.get("default"), (), seed, bool(options.get("dynamicPrompts")))


def _of_choices(name: str, options: Mapping[str, Any]) -> Widget:
    """A widget whose choice brings others, which have its name before theirs."""
    more = {}
    for one in records(options.get("options")):
        inner = _said({"input": one.get("inputs")})
        more[text(one.get("key"))] = tuple(replace(each, name=f"{name}.{each.name}") for each in inner)
    return Widget(name, "COMBO", next(iter(more), None), more=more)
