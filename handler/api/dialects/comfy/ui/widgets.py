"""The values of a node's widgets, by name.

A file keeps them by place. What a place means, the class says (`orders.py`), or, in newer files, the node's own list of
inputs; a widget for seeds takes two places, and a value that is missing is the class's default, as in the page.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from handler.api.dialects.comfy.ui.document import Node, Slot
from handler.api.dialects.comfy.ui.orders import SEEDS, Order, Widget
from handler.api.dialects.comfy.ui.prompts import chosen

CONTROLS: Final = ("fixed", "increment", "decrement", "randomize")  # how a seed changes after each prompt
BUTTONS: Final = ("IMAGEUPLOAD", "AUDIOUPLOAD", "VIDEOUPLOAD")  # have a place, and no value for the server
OF_PAGE: Final = ("control_after_generate", "control_filter_list", "upload")  # names that the server does not know
FREE: Final = "has choices in braces; the first of each is taken."
LORAS: Final = "Power Lora Loader (rgthree)"


@dataclass(slots=True)
class Named:
    """Values by name, and what is said of them. `missing` are widgets without a value, `left` counts values over."""

    values: dict[str, Any] = field(default_factory=dict)
    missing: list[Widget] = field(default_factory=list)
    left: int = 0
    fits: bool = True
    notes: list[str] = field(default_factory=list)

    @property
    def whole(self) -> bool:
        """Whether every widget has a value of its kind, and every value a widget."""
        return self.fits and not self.missing and not self.left


def named(node: Node, order: Order | None) -> Named:
    """A node's; without those that cannot be told, of which a note says so."""
    if node.named or isinstance(node.values, Mapping):
        given = node.named or node.values
        found = Named({name: value for name, value in dict(given).items() if name not in OF_PAGE})
        found.missing = [one for one in order.widgets if one.name not in found.values] if order else []
    elif node.kind == LORAS:
        return Named(_loras(node.values))
    else:
        found = _placed(node, node.values, order)
    _finish(found, order)
    return found


def _placed(node: Node, values: Sequence[Any], order: Order | None) -> Named:
    """By place: as the class says, unless that does not go with the values and the file's own names do."""
    ours = aligned(order.widgets, values) if order else None
    if ours and ours.whole:
        return ours
    theirs = aligned(map(_of_file, (slot for slot in node.inputs if slot.widget)), values)
    if theirs.whole and theirs.values:
        known = {one.name for one in theirs.missing} | theirs.values.keys()
        theirs.missing = [one for one in order.widgets if one.name not in known] if order else []
        return theirs
    if ours and order and ours.fits and (order.certain or not ours.left):
        return ours
    if ours and order and order.certain:
        ours.notes.append("its values do not go with its class as it is known here, so that some may be misread.")
        return ours
    if not values:
        return Named(missing=list(order.widgets) if order else [])
    return Named(notes=["its values have no names in this file, and its class is not known here: they are left out."])


def aligned(widgets: Iterable[Widget], values: Sequence[Any]) -> Named:
    """One value for each widget, in order, and what a choice brings with it next."""
    found, todo, place = Named(), list(widgets)[::-1], 0
    while todo:
        widget = todo.pop()
        if place >= len(values):
            found.missing.append(widget)
            continue
        value, place = values[place], place + 1
        found.fits &= suits(widget, value)
        if widget.type not in BUTTONS and widget.name not in OF_PAGE:
            found.values[widget.name] = value
        todo += reversed(widget.more.get(value, ()) if isinstance(value, str) else ())
        place += _controls(widget, todo, values, place)
    found.left = len(values) - place
    return found


def _controls(widget: Widget, todo: Sequence[Widget], values: Sequence[Any], place: int) -> bool:
    """Whether what follows a widget's value says how it changes; the oldest pages wrote true or false there."""
    left = len(values) - place
    if not left or not (widget.seed or (widget.type == "INT" and left > len(todo))):
        return False
    if isinstance(values[place], bool):
        return widget.seed and not (todo and todo[-1].type == "BOOLEAN")
    return isinstance(values[place], str) and values[place] in CONTROLS


def suits(widget: Widget, value: Any) -> bool:
    """Whether it may be this widget's."""
    match widget.type:
        case "INT" | "FLOAT":
            return isinstance(value, int | float) and not isinstance(value, bool)
        case "STRING":
            return isinstance(value, str)
        case "BOOLEAN":
            return isinstance(value, bool)
    if widget.choices:
        return value in widget.choices or (isinstance(value, str) and isinstance(widget.choices[0], str))
    return True


def _of_file(slot: Slot) -> Widget:
    return Widget(slot.widget, slot.type, seed=slot.widget in SEEDS)


def _finish(found: Named, order: Order | None) -> None:
    """Defaults for what is missing, and texts as the page sends them."""
    filled = [one for one in found.missing if one.default is not None]
    found.values |= {one.name: one.default for one in filled}
    if filled:
        said = ", ".join(f"{one.name} {one.default!r}" for one in filled[:5])
        found.notes.append(f"the file has no value for {said[:200]}: the default is taken.")
    for widget in order.widgets if order else ():
        value = found.values.get(widget.name)
        if widget.dynamic and isinstance(value, str):
            found.values[widget.name], free = chosen(value)
            if free:
                found.notes.append(f"{widget.name} {FREE}")


def _loras(values: Sequence[Any]) -> dict[str, Any]:
    """rgthree's loader: one value for each LoRA, between others that only the page needs."""
    found = [one for one in values if isinstance(one, dict) and "lora" in one]
    return {f"lora_{number}": one for number, one in enumerate(found, 1)}
