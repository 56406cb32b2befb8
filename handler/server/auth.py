"""Who may ask, from where, and what the head of every answer says. Each class is a layer around an app.

With keys, whoever knows one may, from anywhere. Without, a browser is what lets strangers in: a page of theirs can make
it ask a server on its own machine. So other origins are refused then, and a loopback server answers to no other name,
for a name can be made to lead here.
"""

import re
from functools import partial

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from handler.api.dispatch import TOKENS
from handler.api.reply import error_reply
from handler.core.errors import ForeignOrigin, RequestError, Unauthorized
from handler.core.loopback import is_loopback
from handler.core.settings import Settings
from handler.server.accept import TOLD, prefers
from handler.server.access import request_id, response
from handler.server.health import PROBES
from handler.server.keys import LINK, READS, Keys, twice
from handler.server.mounted import EDITOR, PICTURES, PLAYGROUND

OPEN_ROUTES = tuple(PROBES)
# By scripts of an allowed origin, beside the usual.
READABLE = ("x-request-id", "retry-after", "x-should-retry", "idempotent-replayed", TOKENS, *TOLD, "location")
# What a proxy adds: who asks through one is not on this machine. Some add nothing but where that is, by their own name.
FORWARDED = re.compile(rb"forwarded|via|x-real-ip|x-forwarded-.+|(true|x|x-cluster|fastly|fly)-client-?ip|cf-.+")
HOST = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([A-Za-z0-9._-]+))(?::[0-9]{1,5})?")
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
    keys, near = settings.api_keys, Neighbours(settings)
    why = Keys(keys, near.foreign, settings.admin_keys) if keys else near
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


async def _varied(send: Send, message: Message) -> None:
    """Tells caches, a browser's too, that pages of another origin may get another answer."""
    if message["type"] == "http.response.start":
        MutableHeaders(scope=message).add_vary_header("Origin")
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
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        if self.is_allowed_origin(Headers(scope=scope).get("origin", "")):
            return await super().__call__(scope, receive, send)
        await self.app(scope, receive, send if self.allow_all_origins else partial(_varied, send))


class Gate:
    """Lets through what `why` has nothing against. `OPEN_ROUTES` and the playground's files, which have no data, are
    open; whatever else there may be is not.

    Where there is an `editor`, a browser that comes for it is told to ask for a password, which is a key.
    """

    def __init__(self, app: ASGIApp, why: "Keys | Neighbours", editor: bool = False) -> None:
        self.app, self._why, self._editor = app, why, editor

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_open = scope["type"] == "lifespan" or scope["path"] in OPEN_ROUTES or _shows_page(scope)
        error = None if is_open else twice(scope) or self._why(scope)
        if error is None:
            if not is_open and (seen := scope.get("state", {}).get("seen")):
                seen.let_in(request_id(scope))
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


class Neighbours:
    """Where there are no keys: refuses other origins' pages and, on loopback, other names than the machine's own."""

    def __init__(self, settings: Settings) -> None:
        # Where there are keys this is asked of what a browser adds unasked, and not for any page in the world.
        known = set(settings.cors_origins) - ({"*"} if settings.api_keys else set())
        own = "/".join(settings.public_url.split("/")[:3])  # of its own pages, behind a proxy that says another Host
        self._origins, self._anyone, self._hosts = known | {own}, settings.allow_open, {*settings.hosts}
        self._shown = bool(known)  # to pages of others, whose pictures say nothing of whose they are

    def __call__(self, scope: Scope) -> RequestError | None:
        """Why the request looks like a stranger's, if it does."""
        headers = Headers(scope=scope)
        here, _ = scope.get("server") or ("", None)
        alone = is_loopback(here) and not self._anyone
        if "host" in headers and not self._answers_to(headers["host"], alone):
            other = "KINDLING_ALLOW_OPEN=true" if alone else "KINDLING_HOSTS"
            only = "to this machine" if alone else "as KINDLING_HOSTS says"
            return ForeignOrigin(
                f"This server has no keys and answers {only} only, not to the name '{headers['host']:.80}'. "
                f"Set KINDLING_API_KEYS, or {other}."
            )
        if alone and (name := next((name for name, _ in scope["headers"] if FORWARDED.fullmatch(name)), None)):
            return ForeignOrigin(
                f"This server has no keys and answers to this machine only, and {name.decode()} says that a proxy asks "
                "for others. Set KINDLING_API_KEYS, or KINDLING_ALLOW_OPEN=true."
            )
        return self.foreign(scope)

    def _answers_to(self, host: str, alone: bool) -> bool:
        """Whether a Host header has one of its names; a name that is none is nobody's."""
        name = _name(host)
        if {name.lower(), host.lower()} & self._hosts:
            return True
        return is_loopback(name) if alone or is_loopback(name) else bool(name) and not self._hosts

    def foreign(self, scope: Scope) -> RequestError | None:
        """What is wrong with the page that asks, if one does."""
        headers = Headers(scope=scope)
        host, origin = headers.get("host", ""), headers.get("origin", "")
        if origin and origin.partition("://")[2] != host and not {origin, "*"} & self._origins:
            return ForeignOrigin(
                f"Pages of '{origin:.80}' may not ask this server. Name it in KINDLING_CORS_ORIGINS to let them."
            )
        linked = scope.get("method") in READS and LINK.fullmatch(scope["path"])
        if not (origin or linked or self._shown) and headers.get("sec-fetch-site") == "cross-site":
            return ForeignOrigin("Pages of other sites may not ask this server. KINDLING_CORS_ORIGINS lets them.")
        return None


def _name(host: str) -> str:
    """Of a Host header, without the port; of what is none, nothing."""
    found = HOST.fullmatch(host)
    return (found[1] or found[2]) if found else ""
