"""Below which prefix an app is served, and what is asked of it there: mounted in another app, or behind a proxy."""

import re
from urllib.parse import quote

from starlette.types import Scope

from handler.core.settings import Settings

HOST = re.compile(rb"(?:[A-Za-z0-9._-]{1,253}|\[[0-9A-Fa-f:.]{2,45}\])(?::[0-9]{1,5})?")
EDITOR = "/comfy"  # where ComfyUI's page is; it asks for its server below the folder that it lies in itself
PLAYGROUND = "/playground"  # where the files of our own page are, which is at the root
PICTURES = "/assets"  # where it looks for some of its own, wherever it lies
ASKED = re.compile(rf"\A{EDITOR}(?=/(?:api|internal)/|/ws\Z)")


def rooted(scope: Scope) -> Scope:
    """A request's scope with its path from the app's own root on, and no `root_path` any more.

    The path is made here, once: routes, who may ask, and what is counted then go by the same. Where the app's root is
    for callers stays in `app_root_path`, which is Starlette's name for it. A line feed stays as it was sent, for a
    route's pattern matches a path that ends in one too, which is another path to all else.
    """
    prefix = scope.get("root_path", "").rstrip("/")
    path = _below(scope["path"], prefix, scope).replace("\n", "%0A")
    return {**scope, "path": path, "root_path": "", "app_root_path": prefix}


def beside(scope: Scope) -> Scope:
    """A request's scope, with what the page asks of its server led to that."""
    return {**scope, "path": ASKED.sub("", scope["path"], 1)}


def _below(path: str, prefix: str, scope: Scope) -> str:
    """`path` without `prefix`. Of that, a proxy may have taken away what lies before the outermost app already."""
    for start in (prefix, prefix.removeprefix(scope.get("app_root_path", ""))):
        if start and f"{path}/".startswith(f"{start}/"):
            return path.removeprefix(start) or "/"
    return path


def base(scope: Scope, settings: Settings) -> str:
    """Where callers find the app's root, without a slash at its end: where KINDLING_PUBLIC_URL says, or else as the
    request came. Its scheme is the server's to know, which believes proxies' headers only where it is told to.

    What this gives, whoever sent the Host header gets back, and nobody else.
    """
    if settings.public_url:
        return settings.public_url
    host = dict(scope["headers"]).get(b"host", b"")
    if not HOST.fullmatch(host):  # a name that could end up anywhere in a URL
        name, port = scope.get("server") or ("localhost", None)
        host = (f"[{name}]" if ":" in name else name).encode() + (f":{port}" if port else "").encode()
    return f"{scope.get('scheme', 'http')}://{host.decode()}{quote(scope['app_root_path'])}"
