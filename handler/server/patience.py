"""How long a caller waits: as it says in the head of its request, counted from the first byte of that."""

import math
import re

from starlette.datastructures import Headers
from starlette.requests import Request

from handler.core.deadline import Deadline
from handler.core.errors import InvalidValue
from handler.server.record import Seen

DEADLINE, HANGS_UP = "x-deadline-s", "x-stainless-read-timeout"
SECONDS = r"0*[1-9][0-9]*(\.[0-9]+)?|0+\.0*[1-9][0-9]*"  # more than none


def patience(headers: Headers) -> float:
    """In seconds; any number if it does not say."""
    said = headers.get(DEADLINE)
    if said is None:
        return math.inf
    if not re.fullmatch(SECONDS, said):
        raise InvalidValue(f"{DEADLINE} should be seconds, such as 30 or 2.5.", DEADLINE)
    return float(said)


def until(request: Request) -> Deadline:
    """By when this request is to be answered, its body read too; in KINDLING_DEADLINE_S at the latest."""
    seen: Seen = request.state.seen
    if seen.deadline is None:
        longest: float = request.app.state.engine.settings.deadline_s
        seen.deadline = Deadline.within(min(patience(request.headers), longest), seen.start)
    return seen.deadline
