"""The values of a step cache: which blocks of which steps are skipped. `model/stepcache.py` skips them."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal

from pydantic import PlainSerializer, PlainValidator
from pydantic_core import PydanticCustomError

BOUNDS = {"Fn": (1, 64), "Bn": (0, 64), "W": (1, 50), "R": (0, 1), "MC": (1, 50), "order": (0, 2)}
DECIMALS = 9  # of R: what is given with more is rounded
SPELLED = re.compile(r"\s*([^\s=]{1,40})\s*=\s*(-?[0-9]{1,9}(?:\.[0-9]{1,9})?)\s*")
LONGEST = 1000  # characters of such a text
SHAPE = "should be off, on, or values such as Fn=1,Bn=0,W=4,R=0.24,MC=3,order=1"


@dataclass(frozen=True, slots=True)
class StepCache:
    """Which blocks of which steps are skipped. The defaults are SGLang's."""

    Fn: int = 1  # first blocks, always computed: they tell how much a step differs from the last full one
    Bn: int = 0  # last blocks, always computed
    W: int = 4  # steps at the start, always computed in full
    R: float = 0.24  # how much, relatively, a step may differ that skips the blocks between; 1: it always does
    MC: int = 3  # steps in a row that may
    order: int = 0  # of TaylorSeer, which extrapolates what is skipped; 0 repeats it

    def __str__(self) -> str:
        """As `parse` takes it."""
        exact = {field.name: f"{getattr(self, field.name):.{DECIMALS}f}" for field in fields(self)}
        return ",".join(f"{name}={number.rstrip('0').rstrip('.')}" for name, number in exact.items())


def parse(value: object) -> StepCache | Literal["off", "on"]:
    """What a setting or a request says: a word, values as text, or an object; what it leaves out has its default."""
    if value == "off" or value == "on" or isinstance(value, StepCache):
        return value
    given = _spelled(value) if isinstance(value, str) else value
    if not isinstance(given, Mapping):
        raise PydanticCustomError("step_cache_type", SHAPE)
    for name, number in given.items():
        _check(name, number)
    return StepCache(**{name: round(number, DECIMALS) for name, number in given.items()})


StepCacheSetting = Annotated[
    StepCache | Literal["off", "on"],
    PlainValidator(parse, json_schema_input_type=str | dict[str, float]),
    PlainSerializer(str),
]


def _spelled(text: str) -> dict[str, Any]:
    """The values in `text`, such as "Fn=1,R=0.24"."""
    if len(text) > LONGEST:
        raise ValueError(SHAPE)
    found = [SPELLED.fullmatch(part) for part in text.split(",")]
    values = {part[1]: float(part[2]) if "." in part[2] else int(part[2]) for part in found if part}
    if len(values) < len(found):  # one is none, or came twice
        raise ValueError(SHAPE)
    return values


def _check(name: str, number: object) -> None:
    if name not in BOUNDS:
        raise ValueError(f"{name!r:.40} is not one of {', '.join(BOUNDS)}")
    low, high = BOUNDS[name]
    kinds = (int, float) if name == "R" else (int,)
    if not isinstance(number, kinds) or isinstance(number, bool):
        raise PydanticCustomError(
            "step_cache_type", f"{name} should be a {'number' if name == 'R' else 'whole number'}"
        )
    if not low <= number <= high:
        raise PydanticCustomError("step_cache_range", f"{name} should be {low} to {high}")
