"""What others wrote: JSON of files and requests, read under limits. What is wrong with it is one error, `Malformed`.

What passes holds nothing that would fail later, far from here: no number that is none, no half of a character, no depth
that ends somebody's recursion.
"""

import json
import math
import os
import stat
from collections.abc import Callable, Iterable
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, TypeAdapter, ValidationError

T = TypeVar("T")
DEEPEST = 64  # levels of lists and objects
MOST = 1 << 20  # values in all
MARKS = b",:[{"  # beside each value of a JSON text there is one; texts in it have some too
MARKED = 1 << 18  # marks of a text that somebody sends: a graph of ComfyUI's with a thousand nodes has half of that
AT_ONCE = 1 << 20  # bytes that are looked at while no other thread can have its turn
LONGEST = 64 << 20  # bytes of a file
OURS = 4 * MOST  # marks of what is on our own disk, and of what ComfyUI says of its nodes
BITS = 1024  # of a whole number: what a float may hold


class Malformed(ValueError):
    """Why something cannot be understood."""


def _inside(name: str) -> str:
    if "\0" in name or {"", ".", ".."} & {*name.split("/")}:
        raise ValueError("should be a file inside the folder")
    return name


Name = Annotated[str, AfterValidator(_inside)]  # of a file in a folder, with slashes


def _constant(name: str) -> None:
    raise Malformed(f"{name} is not JSON")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """In Python, for between its functions other threads have their turns: reading in C alone lets none."""
    return dict(pairs)


def parse(
    text: bytes | str,
    fraction: Callable[[str], float] = float,
    pairs: Callable[[list[tuple[str, Any]]], dict[str, Any]] = _object,
    constant: Callable[[str], Any] = _constant,
    marks: int = MARKED,
) -> Any:
    """The value of a JSON text. `fraction` reads what has a point or an exponent, `pairs` makes objects of fields.

    `constant` reads NaN and the infinities, which are not JSON. With more than so many `marks` a text is not read: it
    is refused after a hundredth of the time.
    """
    _require_few(text, marks)
    try:
        found = json.loads(text, parse_constant=constant, parse_float=fraction, object_pairs_hook=pairs)
    except RecursionError:
        raise Malformed("it is nested too deeply") from None
    except (Malformed, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise Malformed(str(error)) from None
    except (ValueError, OverflowError):  # of more digits than Python reads
        raise Malformed("it has a number that is too large") from None
    check(found)
    return found


def _require_few(text: bytes | str, most: int) -> None:
    data = text.encode(errors="surrogatepass") if isinstance(text, str) else text
    for start in range(0, len(data), AT_ONCE):
        part = data[start : start + AT_ONCE]
        most -= len(part) - len(part.translate(None, MARKS))
        if most < 0:
            raise Malformed("it has too many values")


def number(text: str) -> float:
    """For `parse`, where a request is read: 7.0 is a whole number, as it is in JSON Schema."""
    return int(value) if (value := float(text)).is_integer() else value


def check(value: object) -> None:
    """Malformed unless `value`, such as a platform's client made of JSON, is as `parse` would give it."""
    level, count = [value], 1
    for _ in range(DEEPEST):
        for each in level:
            _check_one(each)
        nested = [each for each in level if isinstance(each, dict | list | tuple)]
        if not nested:
            return
        count += sum(map(len, nested))
        if count > MOST:
            raise Malformed("it has too many values")
        level = [inner for each in nested for inner in _within(each)]
    raise Malformed("it is nested too deeply")


def _within(value: Any) -> Iterable[Any]:
    return (*value, *value.values()) if isinstance(value, dict) else value


def _check_one(value: object) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise Malformed("it has a number that is too large, or none")
    if isinstance(value, int) and value.bit_length() > BITS:
        raise Malformed("it has a number that is too large")
    if isinstance(value, str) and not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise Malformed("it has half of a character (a lone surrogate)") from None


def load(path: Path, longest: int = LONGEST) -> dict[str, Any]:
    """The JSON object in a file. OSError if it cannot be read, Malformed if it holds none."""
    data = _read(path, longest + 1)
    if len(data) > longest:
        raise Malformed(f"it is longer than {longest} bytes")
    found = parse(data, marks=OURS)
    if not isinstance(found, dict):
        raise Malformed("it is no JSON object")
    return found


def _read(path: Path, most: int) -> bytes:
    """The first `most` bytes of a file; Malformed if it is none, but something that may never end."""
    descriptor, data = os.open(path, os.O_RDONLY | os.O_NONBLOCK), bytearray()  # a FIFO would hold us in open
    try:
        kind = os.fstat(descriptor).st_mode
        if not stat.S_ISREG(kind) and not stat.S_ISDIR(kind):
            raise Malformed("it is no file")
        while got := os.read(descriptor, most - len(data)):
            data += got
    finally:
        os.close(descriptor)
    return bytes(data)


def printed(text: str) -> str:
    """What others wrote, for people: one line without codes that a terminal would obey; what is no text is spelt."""
    spelt = text.encode(errors="backslashreplace").decode()
    return "".join(character for character in spelt if character.isprintable())


def printed_lines(text: str) -> str:
    """The same of several lines."""
    return "\n".join(map(printed, text.split("\n")))


def shaped(kind: Callable[..., T], value: object) -> T:
    """`value` as the dataclass `kind`; Malformed if a field is missing or of another type. Others are passed over."""
    try:
        found: T = _adapter(kind).validate_python(value)
        check(asdict(found))  # type: ignore[call-overload]  # "NaN" is a text, until it is read as a number
        return found
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise Malformed(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)
