"""Who may ask, from where, and what the head of every answer says. Each class is a layer around an app.

With keys, whoever knows one may, from anywhere. Without, a browser is what lets strangers in: a page of theirs can make
it ask a server on its own machine. So other origins are refused then, and a loopback server answers to no other name,
for a name can be made to lead here.
"""

import base64
import contextlib
import hashlib
import hmac
import ipaddress
import os
import re
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from urllib.parse import parse_qs

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from handler.api.dispatch import TOKENS
from handler.api.links import LINKS_ROUTE
from handler.api.reply import error_reply
from handler.core.errors import ForeignOrigin, RequestError, Unauthorized
from handler.core.settings import Settings
from handler.server.accept import TOLD, prefers
from handler.server.access import response
from handler.server.health import PROBES
from handler.server.mounted import EDITOR, PICTURES, PLAYGROUND

OPEN_ROUTES = tuple(PROBES)
# By scripts of an allowed origin, beside the usual.
READABLE = ("x-request-id", "retry-after", "x-should-retry", "idempotent-replayed", TOKENS, *TOLD, "location")
# Whose URL may have the key in it: browsers send nothing else for an image or a websocket.
BY_URL = ("/ws", "/api/ws", "/view", "/api/view")
LINK, READS = re.compile(LINKS_ROUTE.replace("{image_id}", "[^/]+")), ("GET", "HEAD")
Why = Callable[[Scope], RequestError | None]
QUERY, FIELDS = 4096, 64  # bytes and fields of a URL's query that are looked at
CHALLENGE = 'Basic realm="Kindling: any name, and a key as the password", charset="UTF-8"'
POLICY = 1008  # a WebSocket's code for what is not allowed
DEFAULTS = {  # of every answer that does not say otherwise itself, as a page must of its policy
    "cache-control": "no-store",
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


def guarded(app: ASGIApp, settings: Settings) -> ASGIApp:
    """`app` behind what `settings` ask for."""
    why = Keys(settings.api_keys, Neighbours(settings).foreign) if settings.api_keys else Neighbours(settings)
    gate = Gate(app, why, settings.comfy_ui)
    return Head(Cors(gate, settings.cors_origins) if settings.cors_origins else gate)


class Head:
    """Adds `DEFAULTS`."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.app(scope, receive, partial(_sent, send))


async def _sent(send: Send, message: Message) -> None:
    if message["type"] == "http.response.start":
        headers = MutableHeaders(scope=message)
        for name, value in DEFAULTS.items():
            headers.setdefault(name, value)
    await send(message)


class Cors(CORSMiddleware):
    """Lets pages of `origins` ask, and read the answers, errors too; a preflight of theirs needs no key.

    Another origin's preflight is a request like any other, and refused as such.
    """

    def __init__(self, app: ASGIApp, origins: tuple[str, ...]) -> None:
        super().__init__(
            app,
            allow_origins=origins,
            allow_methods=("GET", "POST", "PUT", "DELETE"),
            allow_headers=("*",),
            allow_private_network=True,
            expose_headers=READABLE,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        allowed = scope["type"] == "http" and self.is_allowed_origin(Headers(scope=scope).get("origin", ""))
        await (super().__call__ if allowed else self.app)(scope, receive, send)


class Gate:
    """Lets through what `why` has nothing against. `OPEN_ROUTES` and the playground's files, which have no data, are
    open; whatever else there may be is not.

    Where there is an `editor`, a browser that comes for it is told to ask for a password, which is a key.
    """

    def __init__(self, app: ASGIApp, why: "Keys | Neighbours", editor: bool = False) -> None:
        self.app, self._why, self._editor = app, why, editor

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_open = scope["type"] == "lifespan" or scope["path"] in OPEN_ROUTES or _shows_page(scope)
        error = None if is_open else self._why(scope)
        if error is None:
            return await self.app(scope, receive, send)
        if scope["type"] == "websocket":
            return await send({"type": "websocket.close", "code": POLICY})  # a server answers 403 then
        reply = error_reply(error)
        if error.status == Unauthorized.status:
            shown = self._editor and scope["path"].startswith((EDITOR, PICTURES))
            reply.headers["www-authenticate"] = CHALLENGE if shown else "Bearer"
        await response(scope, reply)(scope, receive, send)


def wants_page(scope: Scope) -> bool:
    """Whether who asks for the root is a browser, which shows a page rather than a text."""
    reads = scope["path"] == "/" and scope.get("method") in READS
    return reads and prefers(", ".join(Headers(scope=scope).getlist("accept")), "text/html", "text/plain")


def _shows_page(scope: Scope) -> bool:
    """Whether the answer is the playground's page, or another file of it."""
    within = scope.get("method") in READS and scope["path"].startswith(f"{PLAYGROUND}/")
    return within or wants_page(scope)


class Keys:
    """Asks for a known key. Keeps digests, not keys."""

    def __init__(self, keys: tuple[str, ...], foreign: Why = lambda scope: None) -> None:
        self._digests = [hashlib.sha256(os.fsencode(key)).digest() for key in keys]
        self._foreign = foreign

    def __call__(self, scope: Scope) -> RequestError | None:
        """What is wrong with the request's key, if anything; how long this takes tells nothing about the keys.

        One that a browser adds unasked, to what any page asks, proves nothing of a page that is `foreign`. A picture's
        URL is its own key.
        """
        if scope.get("method") in READS and LINK.fullmatch(scope["path"]):
            return None
        known = [name for name, key in _keys(scope) if self._knows(key)]
        if not known:
            return Unauthorized("Send a valid key as 'Authorization: Bearer KEY'.")
        return self._foreign(scope) if known == ["basic"] else None

    def _knows(self, key: bytes) -> bool:
        digest = hashlib.sha256(key).digest()
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        return any(matches)


def _keys(scope: Scope) -> Iterator[tuple[str, bytes]]:
    """Where a request may have a key, and what it has there."""
    headers = dict(scope["headers"])
    scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
    if scheme.lower() in (b"bearer", b"key"):  # fal's clients say Key
        yield "bearer", key.strip()
    if scheme.lower() == b"basic":
        with contextlib.suppress(ValueError):  # it is no base64
            yield "basic", base64.b64decode(key.strip(), validate=True).partition(b":")[2]
    if b"x-api-key" in headers:
        yield "header", headers[b"x-api-key"].strip()
    if scope.get("path") in BY_URL:
        with contextlib.suppress(ValueError):  # it has too many fields
            query = parse_qs(scope["query_string"][:QUERY], max_num_fields=FIELDS)
            yield from (("url", key) for key in query.get(b"token", ())[:1])


class Neighbours:
    """Where there are no keys: refuses other origins' pages and, on loopback, other names than the machine's own."""

    def __init__(self, settings: Settings) -> None:
        # Where there are keys this is asked of what a browser adds unasked, and not for any page in the world.
        known = set(settings.cors_origins) - ({"*"} if settings.api_keys else set())
        own = "/".join(settings.public_url.split("/")[:3])  # of its own pages, behind a proxy that says another Host
        self._origins, self._anyone = known | {own}, settings.allow_open

    def __call__(self, scope: Scope) -> RequestError | None:
        """Why the request looks like a stranger's, if it does."""
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        here, _ = scope.get("server") or ("", None)
        if host and not self._anyone and is_loopback(here) and not is_loopback(_name(host)):
            return ForeignOrigin(
                f"This server has no keys and answers to this machine only, not to the name '{host:.80}'. "
                "Set KINDLING_API_KEYS, or KINDLING_ALLOW_OPEN=true."
            )
        return self.foreign(scope)

    def foreign(self, scope: Scope) -> RequestError | None:
        """What is wrong with the page that asks, if one does."""
        headers = Headers(scope=scope)
        host, origin = headers.get("host", ""), headers.get("origin", "")
        if origin and origin.partition("://")[2] != host and not {origin, "*"} & self._origins:
            return ForeignOrigin(
                f"Pages of '{origin:.80}' may not ask this server. Name it in KINDLING_CORS_ORIGINS to let them."
            )
        return None


@lru_cache(64)
def is_loopback(host: str) -> bool:
    """Whether an address, or the name of one, is this machine's own."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def _name(host: str) -> str:
    """Of a Host header, without the port."""
    return host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
