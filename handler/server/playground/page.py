"""The playground's files: plain HTML, styles and modules, open to all, for they hold nobody's data.

The page is at `/`, all else of it beside that in `PLAYGROUND`. Whatever it asks for goes by the same routes as all
else, with a key where the worker has keys. It loads nothing from anywhere else, and runs no script but its files.
"""

import gzip
import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import BaseRoute, Route

from handler.server.mounted import PLAYGROUND

ASSETS = Path(__file__).with_name("assets")
INDEX = "index.html"
TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
GZIP = re.compile(r"(?:^|,)\s*gzip\s*(?!;\s*q=0(?:\.0*)?\s*(?:,|$))(?:;|,|$)", re.IGNORECASE)  # q=0 is a refusal
HEADERS = {
    "content-security-policy": POLICY,
    "cache-control": "no-cache",  # kept, but asked for each time: an update is whole at once
    "cross-origin-opener-policy": "same-origin",
}


@dataclass(frozen=True, slots=True)
class Asset:
    """A file as it is sent."""

    media: str
    data: bytes
    packed: bytes
    tag: str


def routes() -> list[BaseRoute]:
    """All but the page itself, which shares its route with others."""
    return [Route(PLAYGROUND + "/{name}", _asset)]


def index(request: Request) -> Response:
    """The page; without a slash at its end a path is led to the one with it, below which it looks for its files."""
    path: bytes = request.scope.get("raw_path") or b"/"
    if not path.endswith(b"/"):
        return RedirectResponse(path.decode().rpartition("/")[2] + "/", 308, {"vary": "accept"})
    return _sent(INDEX, request.headers, "accept, accept-encoding")


async def _asset(request: Request) -> Response:
    name = request.path_params["name"]
    if name == INDEX or name not in assets():
        raise HTTPException(404)
    return _sent(name, request.headers, "accept-encoding")


@lru_cache(1)
def assets() -> Mapping[str, Asset]:
    """All files, by name."""
    return {path.name: _read(path) for path in ASSETS.iterdir() if path.suffix in TYPES}


def _read(path: Path) -> Asset:
    data = path.read_bytes()
    return Asset(TYPES[path.suffix], data, gzip.compress(data, mtime=0), f'"{hashlib.sha256(data).hexdigest()[:16]}"')


def _sent(name: str, asked: Mapping[str, str], varies: str) -> Response:
    """A file, unless who asks has it; in fewer bytes if they can be read."""
    asset = assets()[name]
    headers = {**HEADERS, "etag": asset.tag, "vary": varies}
    if asset.tag in asked.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    packs = GZIP.search(asked.get("accept-encoding", ""))
    packing = {"content-encoding": "gzip"} if packs else {}
    return Response(asset.packed if packs else asset.data, headers=headers | packing, media_type=asset.media)
