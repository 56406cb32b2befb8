"""What ComfyUI's clients are told where something is wrong: with a prompt before it is drawn, or while it is."""

import errno
import logging
from typing import Any

from handler.api.reply import Reply, error_reply
from handler.core.errors import GraphRefused, Internal, KindlingError
from handler.core.tracebacks import let_go, outline

FULL = (errno.ENOSPC, errno.EDQUOT)
log = logging.getLogger(__name__)


def refused(kind: str, message: str, details: str) -> GraphRefused:
    """A prompt that is refused as a whole, in ComfyUI's words for the kind."""
    error = {"type": kind, "message": message, "details": details, "extra_info": {}}
    return GraphRefused(f"{message}: {details}", {"error": error, "node_errors": {}})


def reply(error: KindlingError) -> Reply:
    """An error as ComfyUI's clients read it, and OpenAI's too: both have an `error` with a `message` and a `type`."""
    found = error_reply(error)
    said = {"details": "", "extra_info": {}, **found.content["error"]}
    node_errors: Any = {}
    if isinstance(error, GraphRefused):
        said, node_errors = said | error.answer["error"], error.answer["node_errors"]
    return Reply(found.status, {"error": said, "node_errors": node_errors}, found.headers, found.fatal)


def understood(error: Exception) -> KindlingError:
    """What a prompt failed of, in a sentence; what was not foreseen is logged."""
    if isinstance(error, KindlingError):
        let_go(error)
        return error
    if isinstance(error, OSError):
        why = "the volume is full" if error.errno in FULL else error.strerror or type(error).__name__
        return Internal(f"The picture was drawn, but could not be saved: {why}.")
    log.error("a prompt failed\n%s", outline(error))
    return Internal("Something went wrong on our side; the log has the details.")


def told(error: KindlingError) -> dict[str, Any]:
    """What a prompt's history says of its failure."""
    return {
        "exception_message": error.message,
        "exception_type": type(error).__name__,
        "traceback": [],
        "current_inputs": {},
        "current_outputs": [],
    }
