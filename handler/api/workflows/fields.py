"""The fields of a kept workflow: where in its graph each value belongs, what it may be, and what is wrong with one."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from handler.api.dialects.openai import SIDES, parse
from handler.core.attachments import one
from handler.core.errors import InvalidType, InvalidValue, MissingParameter, OutOfRange, RequestError, UnknownParameter
from handler.core.request import MAX_PROMPT, ImageRequest

Kind = Literal["string", "integer", "number", "boolean", "image"]
TRANSPORT = ("stream", "partial_images", "progress", "response_format", "output_format", "output_compression")
SIZE = "size"
RESERVED = (*TRANSPORT, SIZE, "model", "images", "workflow", "async", "webhook")  # which no node's title makes a field
ALPHA = "alpha"  # what a mask replaces
TYPES: Mapping[Kind, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "image": (str, bytes),
}
WORDS: Mapping[Kind, str] = {
    "string": "a string",
    "integer": "a whole number",
    "number": "a number",
    "boolean": "true or false",
    "image": "a string, with an image file in base64 or as a data URL",
}
assert TYPES.keys() == WORDS.keys() == {*get_args(Kind)}


@dataclass(frozen=True, slots=True)
class Place:
    """An input of a node; `key` is inside it where it is an object, and `ALPHA` of an image's file."""

    node: str
    input: str
    key: str = ""


@dataclass(frozen=True, slots=True)
class Field:
    """One field. `default` is the graph's own value; None of an image, and of a `seed` that is drawn at random.

    Numbers are `low` to `high`, texts one of `choices` where there are some. `kept` is the file that the graph names:
    an image that can be left out only where the worker has that.
    """

    name: str
    kind: Kind
    places: tuple[Place, ...]
    default: Any = None
    low: float | None = None
    high: float | None = None
    choices: tuple[str, ...] = ()
    kept: str | None = None
    seed: bool = False
    about: str = ""

    @property
    def masks(self) -> bool:
        """Whether it is a mask on an image that another field may send."""
        return any(place.key == ALPHA for place in self.places)

    def of(self, graph: Mapping[str, Any]) -> Any:
        """The value that `graph` has in the first of its places."""
        place = self.places[0]
        found = graph[place.node]["inputs"].get(place.input)
        return found.get(place.key) if place.key else found

    @property
    def schema(self) -> dict[str, Any]:
        """As JSON Schema has it."""
        said: dict[str, Any] = {"type": "string" if self.kind == "image" else self.kind}
        if self.kind == "image":
            said["format"] = "picture"
        elif self.kind == "string" and not self.choices:
            said["maxLength"] = MAX_PROMPT
        limits = {"minimum": self.low, "maximum": self.high, "enum": list(self.choices) or None}
        more = {"default": self.default, "description": self.about or None}
        return said | {name: value for name, value in (limits | more).items() if value is not None}

    def checked(self, value: Any) -> Any:
        """`value` if it may be this field's, an image as its bytes; raises why not."""
        if not isinstance(value, TYPES[self.kind]) or (isinstance(value, bool) and self.kind != "boolean"):
            raise InvalidType(f"{self.name} should be {WORDS[self.kind]}.", self.name)
        if self.kind == "image":
            return self._image(value)
        if isinstance(value, str):
            self._check_text(value)
        elif isinstance(value, int | float):
            self._check_number(value)
        return value

    def _image(self, value: Any) -> bytes:
        try:
            return one(value)
        except ValueError as error:
            raise InvalidValue(f"{self.name}: {error}.", self.name) from None

    def _check_text(self, value: str) -> None:
        if self.choices and value not in self.choices:
            raise InvalidValue(f"{self.name} should be one of {', '.join(self.choices)}.", self.name)
        if len(value) > MAX_PROMPT:
            raise OutOfRange(f"{self.name} has {len(value)} characters; at most {MAX_PROMPT} are read.", self.name)

    def _check_number(self, value: float) -> None:
        low, high = self.low, self.high
        if (
            (isinstance(value, float) and not math.isfinite(value))
            or (low is not None and value < low)
            or (high is not None and value > high)
        ):
            least = "" if low is None else f" at least {low}"
            most = "" if high is None else f" at most {high}"
            raise OutOfRange(
                f"{self.name} should be{' and'.join(filter(None, (least, most))) or ' finite'}.", self.name
            )


@dataclass(frozen=True, slots=True)
class FieldValues:
    """A request to a workflow, checked: `values` by field, and how it shall be answered, as `transport` has it."""

    values: Mapping[str, Any]
    transport: ImageRequest
    model: str = ""  # as OpenAI's route was asked for it


def asked(fields: Sequence[Field], payload: Mapping[str, Any]) -> FieldValues:
    """Read a body of /workflows/NAME; null counts as not sent. Raises the RequestError that names the first bad field.

    Which images have to be sent is for who knows what files there are.
    """
    given = {name: value for name, value in payload.items() if value is not None}
    transport = {name: given.pop(name) for name in TRANSPORT if name in given}
    return FieldValues(checked(fields, _sized(fields, given)), ImageRequest.parse({"prompt": "-", **transport}))


def checked(fields: Sequence[Field], given: Mapping[str, Any]) -> dict[str, Any]:
    """`given` by field, each as it should be."""
    known = {field.name: field for field in fields}
    for name in given:
        if name not in known:
            raise _unknown(name, known)
    return {name: known[name].checked(value) for name, value in given.items()}


def require(fields: Sequence[Field], values: Mapping[str, Any], files: Sequence[str]) -> None:
    """MissingParameter for the first image that was not sent, where the graph's own is none of `files`."""
    for field in fields:
        if field.kept is not None and field.name not in values and field.kept not in files:
            raise MissingParameter(f"Missing required parameter: '{field.name}', an image.", field.name)


def _sized(fields: Sequence[Field], given: Mapping[str, Any]) -> dict[str, Any]:
    """With `size` as width and height, where the workflow has these."""
    found = dict(given)
    if SIZE not in found or not {field.name for field in fields}.issuperset(SIDES):
        return found
    request = parse({"prompt": "-", SIZE: found.pop(SIZE), **{side: given[side] for side in SIDES if side in given}})
    return found | {side: getattr(request, side) for side in SIDES if getattr(request, side) is not None}


def _unknown(name: str, known: Mapping[str, Field]) -> RequestError:
    size = (SIZE,) if known.keys() >= {*SIDES} else ()
    return UnknownParameter(
        f"Unknown parameter: '{name:.80}'. This workflow has {_listed((*known, *size))}.", name[:80]
    )


def _listed(names: Sequence[str]) -> str:
    return f"the fields {', '.join(names)}" if names else "no fields"
