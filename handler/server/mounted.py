"""Below which prefix an app is served, and what is asked of it there: mounted in another app, or behind a proxy."""

import re

from starlette.types import Scope

EDITOR = "/comfy"  # where ComfyUI's page is; it asks for its server below the folder that it lies in itself
PICTURES = "/assets"  # where it looks for some of its own, wherever it lies
ASKED = re.compile(rf"\A{EDITOR}(?=/(?:api|internal)/|/ws\Z)")


def rooted(scope: Scope) -> Scope:
    """A request's scope with its path from the app's own root on, and no `root_path` any more.

    The path is made here, once: routes, who may ask, and what is counted then go by the same. Where the app's root is
    for callers stays in `app_root_path`, which is Starlette's name for it.
    """
    prefix = scope.get("root_path", "").rstrip("/")
    return {**scope, "path": _below(scope["path"], prefix, scope), "root_path": "", "app_root_path": prefix}


def beside(scope: Scope) -> Scope:
    """A request's scope, with what the page asks of its server led to that."""
    return {**scope, "path": ASKED.sub("", scope["path"], 1)}


def _below(path: str, prefix: str, scope: Scope) -> str:
    """`path` without `prefix`. Of that, a proxy may have taken away what lies before the outermost app already."""
    for start in (prefix, prefix.removeprefix(scope.get("app_root_path", ""))):
        if start and f"{path}/".startswith(f"{start}/"):
            return path.removeprefix(start) or "/"
    return path
