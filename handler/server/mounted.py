"""Below which prefix an app is served, and what is asked of it there: mounted in another app, or behind a proxy."""

from starlette.types import Scope


def rooted(scope: Scope) -> Scope:
    """A request's scope with its path from the app's own root on, and no `root_path` any more.

    The path is made here, once: routes, who may ask, and what is counted then go by the same. Where the app's root is
    for callers stays in `app_root_path`, which is Starlette's name for it.
    """
    prefix = scope.get("root_path", "").rstrip("/")
    return {**scope, "path": _below(scope["path"], prefix, scope), "root_path": "", "app_root_path": prefix}


def _below(path: str, prefix: str, scope: Scope) -> str:
    """`path` without `prefix`. Of that, a proxy may have taken away what lies before the outermost app already."""
    for start in (prefix, prefix.removeprefix(scope.get("app_root_path", ""))):
        if start and f"{path}/".startswith(f"{start}/"):
            return path.removeprefix(start) or "/"
    return path
