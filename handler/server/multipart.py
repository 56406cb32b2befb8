"""Forms with files (multipart/form-data), as clients send images to edit: read under limits, and never to disk."""

import re
from collections.abc import AsyncGenerator
from typing import Any

from starlette.datastructures import FormData, Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from handler.core.attachments import MAX_REFERENCES
from handler.core.errors import InvalidValue
from handler.core.request import ImageRequest
from handler.core.untrusted import Malformed, number, parse

MEDIA = "multipart/form-data"
FILES = MAX_REFERENCES + 1  # and a mask
FIELDS = 64
LISTS = ("image", "images")  # what may come more than once, also as image[] or image[0]
INDEX = re.compile(r"\[[0-9]{0,9}\]$")
JOINED = "loras"  # what may come as one text with commas, or more than once
MEANT = ("prompt", "negative_prompt")  # what says something though it is empty
NUMBERS = {  # the fields that are no text
    name
    for name, field in ImageRequest.model_fields.items()
    if field.annotation in (int, float, bool, int | None, float | None)
}


class Parser(MultiPartParser):
    """Starlette's, which takes a form that was cut short for a whole one."""

    def __init__(self, headers: Headers, body: bytes) -> None:
        super().__init__(headers, self._whole(body), max_files=FILES, max_fields=FIELDS, max_part_size=len(body))
        self.spool_max_size = len(body)  # so no file leaves memory
        self._ended = False

    def on_end(self) -> None:
        """The last boundary came."""
        self._ended = True

    async def _whole(self, body: bytes) -> AsyncGenerator[bytes, None]:
        yield body
        if body and not self._ended:
            raise MultiPartException("it was cut short, for its last boundary is missing.")


async def parsed(headers: Headers, body: bytes) -> FormData:
    """A form, with its files in memory; InvalidValue if it is none."""
    if "boundary=" not in headers.get("content-type", ""):
        raise InvalidValue(f"Send a form, as {MEDIA} with its boundary.")
    try:
        return await Parser(headers, body).parse()
    except MultiPartException as error:
        raise InvalidValue(f"The form cannot be read: {error.message}") from None
    except ValueError:  # its charset's
        raise InvalidValue("The form cannot be read: send it as UTF-8.") from None


async def read(headers: Headers, body: bytes) -> dict[str, Any]:
    """The fields of a form as JSON would have them: files as bytes, numbers as numbers. InvalidValue if it is none.

    Browsers and form builders send empty fields and files for what was left out; so these count as not sent.
    """
    form = await parsed(headers, body)
    try:
        return await _fields(form)
    finally:
        await form.close()


async def _fields(form: FormData) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for spelled, part in form.multi_items():
        name = INDEX.sub("", spelled)
        value = await part.read() if isinstance(part, UploadFile) else typed(name, part)
        if not value and isinstance(value, str | bytes) and name not in MEANT:
            continue
        if name in LISTS:
            fields.setdefault(name, []).append(value)
        elif name == JOINED and isinstance(value, str):
            fields[name] = f"{fields[name]},{value}" if name in fields else value
        elif name in fields:
            raise InvalidValue(f"'{name:.80}' appears twice.", name[:80])
        else:
            fields[name] = value
    return fields


def typed(name: str, text: str) -> Any:
    """`text` as the type that the field has; as it is where that fails, for the field's check to refuse it by name."""
    if name not in NUMBERS:
        return text
    try:
        return parse(text.lower(), number)  # some clients spell True
    except Malformed:
        return text
