"""The files inside a request: bytes, data URLs or base64, forgiven as browsers do. A file is known by its own bytes.

The rules are WHATWG's (infra.spec.whatwg.org/#forgiving-base64-decode, fetch.spec.whatwg.org/#data-urls), and the URL's
alphabet (RFC 4648, 5) is taken too. What is at a URL was fetched before, if that is allowed; here it is refused.
"""

import base64
import re
from typing import Annotated
from urllib.parse import unquote_to_bytes

from pydantic import BeforeValidator
from pydantic_core import PydanticCustomError

MAX_REFERENCES = 16
SPACE = b"\t\n\f\r "
ALPHABET = bytes.maketrans(b"-_", b"+/")
DATA_URL = re.compile(r"data:[^,]{0,500}?;[ ]*base64,", re.ASCII | re.IGNORECASE)
ESCAPED = (b"%2B", b"%2F", b"%3D", b"%0A", b"%0D", b"%2b", b"%2f", b"%3d", b"%0a", b"%0d", b"%20")  # in URLs
MOST_OTHERS = 10_000  # escapes of what needs none, for each of them takes its time
FETCHED = re.compile(r"https?:", re.ASCII | re.IGNORECASE)


def several(value: object) -> tuple[bytes, ...]:
    """The bytes of each image file of a list; counted before any is decoded."""
    if not isinstance(value, list | tuple):
        raise PydanticCustomError("list_type", "Input should be a list of images")
    if len(value) > MAX_REFERENCES:
        most = {"most": MAX_REFERENCES, "got": len(value)}
        raise PydanticCustomError("too_long", "Input should have at most {most} images, got {got}", most)
    return tuple(_file(item, f"image {i}") for i, item in enumerate(value, 1))


def one(value: object) -> bytes:
    """The bytes of a mask."""
    return _file(value, "the file")


Images = Annotated[tuple[bytes, ...], BeforeValidator(several)]
Mask = Annotated[bytes, BeforeValidator(one)]


def _file(value: object, name: str) -> bytes:
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str):
        raise PydanticCustomError("string_type", "{name} should be a string", {"name": name})
    text = value.lstrip()
    if FETCHED.match(text):
        raise ValueError(f"{name} is a URL, fetched only from hosts in KINDLING_FETCH_HOSTS; send a data URL or base64")
    head = DATA_URL.match(text)
    if not head and text[:5].lower() == "data:":
        raise ValueError(f"{name} should have ;base64, before its data if it is a data URL")
    try:
        data = text[head.end() if head else 0 :].encode("ascii")
        return decoded(_unescaped(data) if head and b"%" in data else data)
    except ValueError:
        raise ValueError(f"{name} is not valid base64") from None


def _unescaped(data: bytes) -> bytes:
    for escaped in ESCAPED:
        data = data.replace(escaped, unquote_to_bytes(escaped))
    if data.count(b"%") > MOST_OTHERS:
        raise ValueError("too many escapes")
    return unquote_to_bytes(data)


def decoded(text: bytes) -> bytes:
    """What `text` says in base64, wherever its lines break, padded or not, in either alphabet. ValueError if none."""
    digits = text.translate(ALPHABET, SPACE)
    bare = digits.rstrip(b"=")
    if len(digits) - len(bare) > 2:
        raise ValueError("too much padding")
    return base64.b64decode(bare + b"=" * (-len(bare) % 4), validate=True)
