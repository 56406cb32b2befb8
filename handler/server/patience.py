"""How long a caller waits, as it says in the head of its request."""

import math
import re

from starlette.datastructures import Headers

from handler.core.errors import InvalidValue
from handler.server.openapi.document import SECONDS
from handler.server.openapi.operations import DEADLINE


def patience(headers: Headers) -> float:
    """In seconds; any number if it does not say."""
    said = headers.get(DEADLINE)
    if said is None:
        return math.inf
    if not re.fullmatch(SECONDS, said):
        raise InvalidValue(f"{DEADLINE} should be seconds, such as 30 or 2.5.", DEADLINE)
    return float(said)
