"""Keys: which of them a request has, whose it is then, and which routes want one of KINDLING_ADMIN_KEYS.

Of keys only digests are kept. How long it takes to compare them tells nothing about them.
"""

import base64
import contextlib
import hashlib
import hmac
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from urllib.parse import parse_qs

from starlette.types import Scope

from handler.api.dispatch import RECEIPT_ROUTE
from handler.api.links import LINKS_ROUTE
from handler.core.caller import CALLER
from handler.core.errors import AdminsOnly, InvalidValue, RequestError, Unauthorized
from handler.core.settings import Settings

# Whose URL may have the key in it: browsers send nothing else for an image or a websocket.
BY_URL = ("/ws", "/api/ws", "/view", "/api/view")
ADMIN = ("/metrics", "/v1/status", "/health/ready", RECEIPT_ROUTE)  # what tells of the worker, not of the caller
LINK, READS = re.compile(LINKS_ROUTE.replace("{image_id}", "[^/]+")), ("GET", "HEAD")
ONCE = (b"authorization", b"x-api-key", b"host", b"origin", b"idempotency-key")  # what says who asks, and from where
QUERY, FIELDS = 4096, 64  # bytes and fields of a URL's query that are looked at
SHORT = 16  # characters of a key that can be guessed
Why = Callable[[Scope], RequestError | None]


def twice(scope: Scope) -> RequestError | None:
    """What is wrong with a request that says two things of who asks: others may have believed the other one."""
    count = Counter(name for name, _ in scope["headers"])
    if name := next((name.decode() for name in ONCE if count[name] > 1), None):
        return InvalidValue(f"The header {name} came {count[name.encode()]} times; send it once.", name)
    return None


def weak(settings: Settings) -> str:
    """A warning if a key could be guessed; else nothing."""
    short = sum(len(key) < SHORT for key in {*settings.api_keys, *settings.admin_keys})
    told = f"{short} of the keys {'has' if short == 1 else 'have'} fewer than {SHORT} characters and can be guessed"
    return f"{told}: make one with 'openssl rand -hex 16'." if short else ""


class Keys:
    """Asks for a known key, of `admins` on the routes that are `ADMIN`, if there are any."""

    def __init__(self, keys: tuple[str, ...], foreign: Why = lambda scope: None, admins: tuple[str, ...] = ()) -> None:
        self._digests = [hashlib.sha256(os.fsencode(key)).digest() for key in (*keys, *admins)]
        self._admins = {*self._digests[len(keys) :]}
        self._foreign = foreign

    def __call__(self, scope: Scope) -> RequestError | None:
        """What is wrong with the request's key, if anything; how long this takes tells nothing about the keys.

        One that a browser adds unasked, to what any page asks, proves nothing of a page that is `foreign`. A picture's
        URL is its own key. Whoever is let in is the `CALLER` from now on.
        """
        if scope.get("method") in READS and LINK.fullmatch(scope["path"]):
            return None
        known = {name: digest for name, key in _keys(scope) if (digest := self._known(key))}
        if not known:
            return Unauthorized("Send a valid key as 'Authorization: Bearer KEY'.")
        if self._admins and scope.get("path") in ADMIN and self._admins.isdisjoint(known.values()):
            return AdminsOnly("This key is good for other routes; this one wants one of KINDLING_ADMIN_KEYS.")
        CALLER.set(next(iter(known.values())))
        return self._foreign(scope) if [*known] == ["basic"] else None

    def _known(self, key: bytes) -> bytes:
        """The digest of a key that is known; else nothing."""
        digest = hashlib.sha256(key).digest()
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        return digest if any(matches) else b""


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
