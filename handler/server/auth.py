"""Who may ask, from where, and what the head of every answer says. Each class is a layer around an app.

With keys, whoever knows one may, from anywhere. Without, a browser is what lets strangers in: a page of theirs can make
it ask a server on its own machine. So other origins are refused then, and a loopback server answers to no other name,
for a name can be made to lead here.
"""

import hashlib
import hmac
import ipaddress
import os
from functools import lru_cache, partial

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from handler.api.reply import error_reply
from handler.core.errors import ForeignOrigin, RequestError, Unauthorized
from handler.core.settings import Settings
from handler.server.access import response

OPEN_ROUTES = ("/ping", "/health", "/health/live")
# By scripts of an allowed origin, beside the usual.
READABLE = ("x-request-id", "retry-after", "x-should-retry", "idempotent-replayed")
POLICY = 1008  # a WebSocket's code for what is not allowed
DEFAULTS = {  # of every answer that does not say otherwise itself, as a page must of its policy
    "cache-control": "no-store",
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


def guarded(app: ASGIApp, settings: Settings) -> ASGIApp:
    """`app` behind what `settings` ask for."""
    gate = Gate(app, Keys(settings.api_keys) if settings.api_keys else Neighbours(settings))
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
            allow_methods=("GET", "POST"),
            allow_headers=("*",),
            allow_private_network=True,
            expose_headers=READABLE,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        allowed = scope["type"] == "http" and self.is_allowed_origin(Headers(scope=scope).get("origin", ""))
        await (super().__call__ if allowed else self.app)(scope, receive, send)


class Gate:
    """Lets through what `why` has nothing against. `OPEN_ROUTES` are open; whatever else there may be is not."""

    def __init__(self, app: ASGIApp, why: "Keys | Neighbours") -> None:
        self.app, self._why = app, why

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_open = scope["type"] == "lifespan" or scope["path"] in OPEN_ROUTES
        error = None if is_open else self._why(scope)
        if error is None:
            return await self.app(scope, receive, send)
        if scope["type"] == "websocket":
            return await send({"type": "websocket.close", "code": POLICY})
        reply = error_reply(error)
        if error.status == Unauthorized.status:
            reply.headers["www-authenticate"] = "Bearer"
        await response(scope, reply)(scope, receive, send)


class Keys:
    """Asks for a known bearer key. Keeps digests, not keys."""

    def __init__(self, keys: tuple[str, ...]) -> None:
        self._digests = [hashlib.sha256(os.fsencode(key)).digest() for key in keys]

    def __call__(self, scope: Scope) -> RequestError | None:
        """What is wrong with the request's key, if anything; how long this takes tells nothing about the keys."""
        header = dict(scope["headers"]).get(b"authorization", b"")
        scheme, _, key = header.partition(b" ")
        digest = hashlib.sha256(key.strip()).digest()
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        if scheme.lower() == b"bearer" and any(matches):
            return None
        return Unauthorized("Send a valid key as 'Authorization: Bearer KEY'.")


class Neighbours:
    """Where there are no keys: refuses other origins' pages and, on loopback, other names than the machine's own."""

    def __init__(self, settings: Settings) -> None:
        self._origins, self._anyone = settings.cors_origins, settings.allow_open

    def __call__(self, scope: Scope) -> RequestError | None:
        """Why the request looks like a stranger's, if it does."""
        headers = Headers(scope=scope)
        host, origin = headers.get("host", ""), headers.get("origin", "")
        here, _ = scope.get("server") or ("", None)
        if host and not self._anyone and is_loopback(here) and not is_loopback(_name(host)):
            return ForeignOrigin(
                f"This server has no keys and answers to this machine only, not to the name '{host:.80}'. "
                "Set KINDLING_API_KEYS, or KINDLING_ALLOW_OPEN=true."
            )
        if origin and origin.partition("://")[2] != host and not {origin, "*"} & set(self._origins):
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
