"""Bodies of requests: read under limits, as JSON or as a form, and refused unread where that is known before."""

from typing import Any

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect, Request

from handler.api.workflows.service import ROUTE
from handler.core.errors import BodyTooLarge, Cancelled, InvalidJson, UnsupportedMedia
from handler.core.settings import Settings
from handler.core.untrusted import Malformed, number, parse
from handler.server import multipart

JSON = ("application/json", "application/x-www-form-urlencoded", "")  # the second is curl's and urllib's, unless told
GRAPHS = ("text/plain", "application/octet-stream", "image/png", "image/webp", "image/jpeg")  # files that may have one
FORMS = ("/v1/images/edits", *(f"{start}/upload/{kind}" for start in ("", "/api") for kind in ("image", "mask")))


async def read(request: Request, settings: Settings, *also: str) -> bytes:
    """The request's body, refused as soon as it is known to be too large, or to be neither JSON nor a form.

    `also` are more media types that JSON may come as.
    """
    edits = request.url.path in FORMS
    # With images in base64.
    roomy = edits or (request.method == "POST" and f"{request.url.path}/".startswith(f"{ROUTE}/"))
    _check_media(request.headers, (*JSON, *also, *([multipart.MEDIA] if edits else [])))
    limits = [(settings.max_body_mb, "KINDLING_MAX_BODY_MB"), (settings.max_edit_mb, "KINDLING_MAX_EDIT_MB")]
    limit_mb, name = max(limits if roomy else limits[:1])
    limit = int(limit_mb * 1e6)
    error = BodyTooLarge(f"The body may be at most {limit_mb:g} MB here. {name} says how many.")
    if int(request.headers.get("content-length", "0")) > limit:
        raise error
    body = bytearray()
    try:
        async for chunk in request.stream():
            body += chunk
            if len(body) > limit:
                raise error
    except ClientDisconnect:
        raise Cancelled("The client went away.") from None
    return bytes(body)


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
    """Strict JSON: no NaN or Infinity, no key twice."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise Malformed("a key appears twice")
        return found

    try:
        return parse(body, number, unique)
    except Malformed as error:
        raise InvalidJson(f"The body is not valid JSON: {error}") from None
