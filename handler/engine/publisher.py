"""Leaves what a worker compiled for later ones, off the request path: they can do without."""

import logging
import threading
from collections.abc import Callable
from pathlib import Path

from handler.core.errors import StartError
from handler.core.tracebacks import outline

FAILED = "compile artifacts are not published: %s"
log = logging.getLogger(__name__)


class Publisher:
    """A thread for one act of publishing, if there is any."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None

    def begin(self, publish: Callable[[], Path]) -> None:
        """Let `publish` run; where it put something, or why it could not, is logged."""
        self._thread = threading.Thread(target=self._run, args=(publish,), name="publish", daemon=True)
        self._thread.start()

    def join(self, timeout_s: float) -> None:
        """Wait for it, but no longer than that."""
        if self._thread:
            self._thread.join(timeout_s)

    def _run(self, publish: Callable[[], Path]) -> None:
        try:
            log.info("published compile artifacts in %s", publish())
        except StartError as error:
            log.warning(FAILED, error.message)
        except BaseException as error:  # a bug, or a library that wants to exit: the worker draws all the same
            log.warning(FAILED + "\n%s", type(error).__name__, outline(error))
