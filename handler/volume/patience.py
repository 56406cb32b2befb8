"""Waiting for a volume no longer than anyone likes to: a dead mount must not hang who looks at it."""

import threading
from collections.abc import Callable
from typing import Any, TypeVar

from handler.core.errors import KindlingError

T = TypeVar("T")
PATIENCE_S = 10.0  # a volume that hangs must not hang who looks at it


def patiently(examine: Callable[..., T], *given: Any, otherwise: Callable[[str], T], where: str = "the volume") -> T:
    """What `examine` finds; else `otherwise` of why not: it failed, or it hangs, as reads from a dead mount do."""
    found: list[T] = []
    failed: list[Exception] = []

    def run() -> None:
        try:
            found.append(examine(*given))
        except Exception as error:
            failed.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(PATIENCE_S)
    if found:
        return found[0]
    return otherwise(cause(failed[0]) if failed else f"{where} does not answer within {PATIENCE_S:g} s")


def cause(error: Exception) -> str:
    """An error in a few words."""
    if isinstance(error, KindlingError):
        return error.message
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return f"{type(error).__name__}: {error}"
