"""Bodies of requests: read under limits, as JSON or as a form, and refused unread where that is known before."""

import asyncio
import re
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect, Request

from handler.api.hands import Hands
from handler.api.workflows.service import ROUTE
from handler.core.deadline import Deadline
from handler.core.errors import BodyTooLarge, Cancelled, InvalidJson, InvalidValue, UnsupportedMedia
from handler.core.settings import Settings
from handler.core.untrusted import Malformed, number, parse
from handler.server import multipart
from handler.server.patience import until
from handler.server.record import Seen
from handler.server.room import Room

T = TypeVar("T")
JSON = ("application/json", "application/x-www-form-urlencoded", "")  # the second is curl's and urllib's, unless told
GRAPHS = ("text/plain", "application/octet-stream", "image/png", "image/webp", "image/jpeg")  # files that may have one
FORMS = ("/v1/images/edits", *(f"{start}/upload/{kind}" for start in ("", "/api") for kind in ("image", "mask")))
EXPLAINED = ("/explain", "/api/explain")  # which take pictures that have a graph, as workflows do
SLOW = "The body of the request did not come in the time that the request may take."
UNREAD = "The body of the request could not be read in the time that the request may take; try again."
AT_ONCE = 16 << 10  # bytes that are understood sooner than another thread would begin to
_hands = Hands(1, 1, "reading")  # one at a time: each has Python's lock nearly always, and this loop needs it too


async def read(request: Request, *also: str) -> bytes:
    """The request's body, refused as soon as it is known to be too large, or to be neither JSON nor a form.

    `also` are more media types that JSON may come as. DeadlineExceeded if it is not there in the request's time.
    """
    settings: Settings = request.app.state.engine.settings
    limit, error = _limit(request, settings, also)
    return await until(request).hold(_read(request, limit, error), SLOW)


def _limit(request: Request, settings: Settings, also: tuple[str, ...]) -> tuple[int, BodyTooLarge]:
    """How many bytes it may have, and what is said of more; raises what its head alone is refused for."""
    edits = request.url.path in FORMS
    # With images, in base64 or as files.
    roomy = edits or request.url.path in EXPLAINED or f"{request.url.path}/".startswith(f"{ROUTE}/")
    _check_media(request.headers, (*JSON, *also, *([multipart.MEDIA] if edits else [])))
    limits = [(settings.max_body_mb, "KINDLING_MAX_BODY_MB"), (settings.max_edit_mb, "KINDLING_MAX_EDIT_MB")]
    limit_mb, name = max(limits if roomy else limits[:1])
    limit = int(limit_mb * 1e6)
    error = BodyTooLarge(f"The body may be at most {limit_mb:g} MB here. {name} says how many.")
    length = request.headers.get("content-length", "0")
    if not re.fullmatch("[0-9]{1,19}", length):  # other servers than ours may let it through
        raise InvalidValue("Content-Length should be a whole number of bytes.", "Content-Length")
    if int(length) > limit:
        raise error
    return limit, error


async def _read(request: Request, limit: int, error: BodyTooLarge) -> bytes:
    room: Room = request.app.state.room
    seen: Seen = request.state.seen
    body = bytearray()
    try:
        async for chunk in request.stream():
            body += chunk
            if len(body) > limit:
                raise error
            room.take(seen, len(body))
    except ClientDisconnect:
        raise Cancelled("The client went away.") from None
    return bytes(body)


async def understood(read: Callable[[bytes], T], body: bytes, deadline: Deadline) -> T:
    """What `read` makes of a body, large ones one after another on a thread of their own."""
    if len(body) <= AT_ONCE:
        return read(body)
    reading = _hands.run(partial(read, body))
    try:
        return await deadline.hold(asyncio.wrap_future(reading), UNREAD)
    finally:
        _hands.forsake(reading)


def _check_media(headers: Headers, allowed: tuple[str, ...]) -> None:
    coding = headers.get("content-encoding") or "identity"
    if coding.lower() != "identity":
        raise UnsupportedMedia(f"Content-Encoding '{coding:.40}' is not understood here; send the body as it is.")
    if media(headers) not in allowed:
        other = f", or as {multipart.MEDIA}" if multipart.MEDIA in allowed else ""
        other = ", or the file itself, as 'curl --data-binary @FILE' does" if GRAPHS[0] in allowed else other
        raise UnsupportedMedia(f"Send the body as JSON, with the header 'Content-Type: application/json'{other}.")


def media(headers: Headers) -> str:
    return headers.get("content-type", "").partition(";")[0].strip().lower()


def decode(body: bytes) -> Any:
    """Strict JSON: no NaN or Infinity, no key twice. InvalidJson if it is none."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise Malformed("a key appears twice")
        return found

    return _json(partial(parse, body, number, unique))


def decode_loosely(body: bytes) -> Any:
    """JSON as ComfyUI's server reads it: a key may come twice, and 7.0 is no whole number."""
    return _json(partial(parse, body))


def _json(read: Callable[[], Any]) -> Any:
    try:
        return read()
    except Malformed as error:
        raise InvalidJson(f"The body is not valid JSON: {error}") from None
