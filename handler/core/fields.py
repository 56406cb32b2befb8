"""What a setting's value may be where pydantic has no such type, and pydantic's complaints in our words."""

import base64
import difflib
import os
import re
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import AfterValidator, Field

from handler.core.errors import SettingsError

MAX_PORT = 65_535
PathLike = TypeVar("PathLike", str, Path)
ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/\s,*]+")
ENDPOINT = re.compile(r"https?://(?:[A-Za-z0-9.-]+|\[[0-9a-fA-F:.]+\])(?::[0-9]{1,5})?/?")
HOST = re.compile(r"(?:[A-Za-z0-9][A-Za-z0-9._-]*|\[[0-9a-fA-F:.]+\])(?::[0-9]{1,5})?")
SECRET = re.compile(r"whsec_(?:[A-Za-z0-9+/]{4})*(?:[A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?")  # standardwebhooks.com
PUBLIC = re.compile(ENDPOINT.pattern.removesuffix("/?") + "(?:/[A-Za-z0-9._~/-]*)?")
SHORTEST = 16  # characters of a key that nobody guesses
WORDS = {  # for an error of pydantic's, by its name for it
    "bool_parsing": "should be true or false",
    "finite_number": "should be a finite number",
    "float_parsing": "should be a number",
    "int_parsing": "should be a whole number",
    "int_parsing_size": "is too large",
    "string_pattern_mismatch": "has characters that no such name has",
    "string_unicode": "should be text in UTF-8",
}


def _origin(value: str) -> str:
    if value != "*" and not ORIGIN.fullmatch(value):
        raise ValueError("should be * or origins such as https://a.example or http://localhost:3000, without a path")
    return value


Origin = Annotated[str, AfterValidator(_origin)]


def _endpoint(value: str) -> str:
    if value and not ENDPOINT.fullmatch(value):
        raise ValueError("should be http:// or https:// and a host, without a path; the bucket's name is a setting too")
    return value


Endpoint = Annotated[str, AfterValidator(_endpoint)]


def _public(value: str) -> str:
    if value and not PUBLIC.fullmatch(value):
        raise ValueError("should be http:// or https://, a host, and a path if there is one")
    return value.rstrip("/")


PublicUrl = Annotated[str, AfterValidator(_public)]


def _host(value: str) -> str:
    if not HOST.fullmatch(value):
        raise ValueError("should be hosts such as images.example or 10.0.0.5:9000, without a scheme or a path")
    return value.lower()


Host = Annotated[str, AfterValidator(_host)]


def _secret(value: str) -> str:
    if value and not (SECRET.fullmatch(value) and 24 <= len(base64.b64decode(value.removeprefix("whsec_"))) <= 64):
        raise ValueError("should be whsec_ and 24 to 64 random bytes in base64")
    return value


WebhookSecret = Annotated[str, AfterValidator(_secret)]


def _key(value: str) -> str:
    """Without the line's end that a secret has where it was made of a file."""
    key = value.strip()
    if value and (len(key) < SHORTEST or not key.isprintable()):
        raise ValueError(f"should have {SHORTEST} characters or more, such as openssl rand -hex 32 prints")
    return key


VolumeKey = Annotated[str, AfterValidator(_key)]


def home() -> Path:
    """This user's; SettingsError, with what to set, where nobody can tell."""
    try:
        return Path.home()
    except RuntimeError:
        told = f"KINDLING_VOLUME: name a folder, for user {os.getuid()} has no home here, and HOME is not set."
        raise SettingsError(told, "KINDLING_VOLUME") from None


def _at_home(value: Path) -> Path:
    try:
        return value.expanduser()  # which only a shell does, and not in an .env file
    except RuntimeError:
        raise ValueError("begins with ~, and whose home that is cannot be told; give the whole path") from None


def _nameable(value: PathLike) -> PathLike:
    """What a file system can be asked for at all."""
    try:
        if b"\0" not in os.fsencode(value):
            return value
    except UnicodeEncodeError:
        pass
    raise ValueError("has characters that no path has")


Name = Annotated[str, AfterValidator(_nameable)]
Workers = Literal["auto"] | Annotated[int, Field(ge=1, le=64)]
ModelName = Annotated[str, Field(max_length=200, pattern=r"^[!-~]+$")]  # as requests may send it; printable, no space
Folder = Annotated[Path, AfterValidator(_at_home), AfterValidator(_nameable)]


def words(kind: str, told: str) -> str:
    """What is wrong, in our words: pydantic speaks of an input, of strings and of patterns."""
    return WORDS.get(kind) or re.sub(r"^(Value error, |Input |String )", "", told)


def not_known(name: str, names: set[str]) -> str:
    """That `name` is none of the settings, and which of their `names` may be meant."""
    near = difflib.get_close_matches(name, names, 1)
    meant = f" Did you mean {near[0]}?" if near else ""
    return f"{name} is not a setting.{meant} 'python -m handler doctor' lists them all."
