"""The LoRAs of a request: names, each with a weight. Which files these are, `volume/adapters.py` finds out."""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Annotated, Any

from pydantic import AfterValidator, PlainSerializer, PlainValidator
from pydantic_core import PydanticCustomError

MOST = 4  # in one request
HEAVIEST = 10.0  # times what a LoRA was trained to add, either way
LONGEST = 200  # characters of a name
LONGEST_TEXT = 4096  # of all, where they are one text
SPELLED = re.compile(r"(.+?)(?::([+-]?(?:[0-9]{1,9}(?:\.[0-9]{0,9})?|\.[0-9]{1,9})))?", re.DOTALL)
PIN = re.compile(r"([\w-][\w.-]*)=(\w[\w.-]*/\w[\w.-]*)@([0-9a-f]{40}):([^,]+\.safetensors)", re.ASCII)
SHAPE = "should be a name, NAME:WEIGHT, or an object with name and weight"


@dataclass(frozen=True, slots=True)
class Wanted:
    """A LoRA that a caller asks for: `weight` times what it was trained to add, `clip_weight` in text encoders.

    None there is the same as `weight`.
    """

    name: str
    weight: float = 1.0
    clip_weight: float | None = None

    def told(self) -> str | dict[str, Any]:
        """As a request may have it."""
        return f"{self.name}:{self.weight:g}" if self.clip_weight is None else asdict(self)


def parse(value: object) -> tuple[Wanted, ...]:
    """What a request says: a list of objects or of texts as `spelled` reads them; a form has one text, with commas."""
    if isinstance(value, str) and len(value) > LONGEST_TEXT:
        raise PydanticCustomError("too_long", "Input should have at most {most} characters", {"most": LONGEST_TEXT})
    items = [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value
    if not isinstance(items, list | tuple):
        raise PydanticCustomError("list_type", "Input should be a list of LoRAs")
    if len(items) > MOST:
        most = {"most": MOST, "got": len(items)}
        raise PydanticCustomError("too_long", "Input should have at most {most} LoRAs, got {got}", most)
    return tuple(_one(item, f"LoRA {i}") for i, item in enumerate(items, 1))


Loras = Annotated[
    tuple[Wanted, ...],
    PlainValidator(parse, json_schema_input_type=str | list[str | dict[str, Any]]),
    PlainSerializer(lambda wanted: [one.told() for one in wanted]),
]


@dataclass(frozen=True, slots=True)
class Pin:
    """A LoRA on the hub, which `fetch` brings: what it is called here, and whose file at which commit it is."""

    name: str
    repository: str
    revision: str
    file: str


def pin(text: str) -> Pin:
    """`name=owner/repository@revision:file`."""
    if found := PIN.fullmatch(text):
        return Pin(*found.groups())
    raise ValueError("should be name=owner/repository@revision:file.safetensors, with all 40 digits")


def _pinned(text: str) -> str:
    pin(text)
    return text


Pinned = Annotated[str, AfterValidator(_pinned)]


def spelled(text: str) -> Wanted:
    """`NAME` or `NAME:0.8`."""
    found = SPELLED.fullmatch(text)
    return Wanted(found[1], float(found[2] or 1)) if found else Wanted(text)


def _one(item: object, place: str) -> Wanted:
    if isinstance(item, Wanted):
        return item
    if isinstance(item, str):
        item = {"name": (one := spelled(item)).name, "weight": one.weight}
    if not isinstance(item, Mapping) or not isinstance(item.get("name"), str):
        raise PydanticCustomError("lora_type", "{place} {shape}", {"place": place, "shape": SHAPE})
    if strange := sorted(map(str, item.keys() - {"name", "weight", "clip_weight"})):
        raise ValueError(f"{place} has {strange[0]!r:.40}, and should have just name, weight and clip_weight")
    clip = item.get("clip_weight")
    weights = _weight(item.get("weight", 1.0), place), clip if clip is None else _weight(clip, place, "clip_weight")
    return Wanted(_name(item["name"], place), *weights)


def nameable(name: str) -> bool:
    """Whether a request may name a LoRA so."""
    return 0 < len(name) <= LONGEST and name.isprintable()


def _name(name: str, place: str) -> str:
    if not nameable(name):
        raise ValueError(f"{place} should have a name of 1 to {LONGEST} characters that can be printed")
    return name


def _weight(weight: object, place: str, field: str = "weight") -> float:
    told = {"place": place, "field": field, "most": f"{HEAVIEST:g}"}
    if not isinstance(weight, int | float) or isinstance(weight, bool):
        raise PydanticCustomError("lora_type", "{place}: {field} should be a number", told)
    if not -HEAVIEST <= weight <= HEAVIEST:
        raise PydanticCustomError("lora_range", "{place}: {field} should be -{most} to {most}", told)
    return float(weight)
