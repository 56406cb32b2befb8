"""ComfyUI's own editor at /comfy/, where its package is installed: its page and what that is made of.

The files are those that the package had when the app was made; no request reaches another. They hold no data of
anybody's, and what the page asks for is answered by the same routes as all else.
"""

import asyncio
import base64
import gzip
import hashlib
import importlib.util
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import BaseRoute, Route

from handler.core.errors import SettingsError
from handler.server.mounted import EDITOR, PICTURES

PACKAGE = "comfyui_frontend_package"
INDEX = "index.html"
TYPES = {  # of files by suffix; no other is shown, maps of the sources among them
    "css": "text/css; charset=utf-8",
    "eot": "application/vnd.ms-fontobject",
    "html": "text/html; charset=utf-8",
    "ico": "image/x-icon",
    "js": "text/javascript; charset=utf-8",
    "json": "application/json",
    "png": "image/png",
    "svg": "image/svg+xml",
    "ttf": "font/ttf",
    "txt": "text/plain; charset=utf-8",
    "wasm": "application/wasm",
    "webm": "video/webm",
    "webp": "image/webp",
    "woff": "font/woff",
    "woff2": "font/woff2",
}
PACKED = (".css", ".js", ".json", ".svg")  # which are large, and much smaller with gzip
# What the page asks for whether there is one or not: a person's own style, and ComfyUI's list of examples.
ABSENT = re.compile(r"user\.css|templates/index[\w.-]*\.json")
HASHED = re.compile(r"assets/.+-[A-Za-z0-9_-]{8}\.\w+")  # whose name changes with what is in it
KEPT, ASKED = "private, max-age=31536000, immutable", "private, no-cache"
SCRIPT = re.compile(r"<script>(.*?)</script>", re.DOTALL)
# What the page may load and whom it may ask: this server and no other, though it would.
POLICY = (
    "default-src 'self'; script-src 'self' 'wasm-unsafe-eval' {scripts}; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; "
    "font-src 'self' data:; connect-src 'self' data: blob:; media-src 'self' data: blob:; worker-src 'self' blob:; "
    "frame-src 'none'; object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'none'"
)


@dataclass(frozen=True, slots=True)
class Page:
    """The package's files by their names in it, and the policy under which they run."""

    files: dict[str, Path]
    policy: str


def page() -> Page:
    """That of the installed package. SettingsError where there is none."""
    spec = importlib.util.find_spec(PACKAGE)
    roots = [Path(each) / "static" for each in spec.submodule_search_locations or ()] if spec else []
    root = next((each for each in roots if (each / INDEX).is_file()), None)
    if root is None:
        raise SettingsError(
            "KINDLING_COMFY_UI is on, but ComfyUI's editor is not installed: pip install comfyui-frontend-package.",
            "KINDLING_COMFY_UI",
        )
    found = (path for path in root.rglob("*") if path.suffix.removeprefix(".") in TYPES and path.is_file())
    own = SCRIPT.findall((root / INDEX).read_text())
    return Page({path.relative_to(root).as_posix(): path for path in found}, POLICY.format(scripts=_allowed(own)))


def _allowed(scripts: list[str]) -> str:
    """The scripts in the page itself, by their hashes."""
    digests = (base64.b64encode(hashlib.sha256(each.encode()).digest()).decode() for each in scripts)
    return " ".join(f"'sha256-{each}'" for each in digests)


def routes(shown: Page) -> list[BaseRoute]:
    """The page's; some of its images it looks for at the root. What it asks of a server is led to that before, by
    `mounted.beside`."""
    return [
        Route(EDITOR, _to_page),
        Route(EDITOR + "/{name:path}", partial(_file, shown, "")),
        Route(PICTURES + "/{name:path}", partial(_file, shown, f"{PICTURES[1:]}/")),
    ]


async def _to_page(request: Request) -> Response:
    return RedirectResponse("comfy/", 308)  # as the caller sees it, below whatever prefix


async def _file(shown: Page, folder: str, request: Request) -> Response:
    name = folder + request.path_params["name"] or INDEX
    media = TYPES.get(name.rpartition(".")[2])
    if name in shown.files:
        return await asyncio.to_thread(_read, shown, name, request.headers, media)
    if ABSENT.fullmatch(name):
        return Response(b"[]" if name.endswith("json") else b"", media_type=media)
    raise HTTPException(404)


def _read(shown: Page, name: str, asked: Mapping[str, str], media: str | None) -> Response:
    """A file, unless who asks has it; in fewer bytes if they can be read."""
    path = shown.files[name]
    found = path.stat()
    tag = f'"{found.st_mtime_ns:x}-{found.st_size:x}"'
    headers = {"content-security-policy": shown.policy, "etag": tag, "vary": "accept-encoding"}
    headers["cache-control"] = KEPT if HASHED.fullmatch(name) else ASKED
    if tag in asked.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    data = path.read_bytes()
    if path.suffix in PACKED and "gzip" in asked.get("accept-encoding", ""):
        data = gzip.compress(data, 1)
        headers["content-encoding"] = "gzip"
    return Response(data, headers=headers, media_type=media)
