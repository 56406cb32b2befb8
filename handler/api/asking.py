"""A request to draw that was understood: what is asked for, in which dialect, and where its answer will be read."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Self, TypeVar

from handler.api import served
from handler.api.workflows.calling import Call
from handler.core.deadline import Deadline
from handler.core.errors import InvalidJson, InvalidType
from handler.core.request import ImageRequest
from handler.core.untrusted import Malformed, check
from handler.engine.engine import Engine

T = TypeVar("T")
# Characters that are looked at sooner than another thread would begin to, and as how many another value counts.
LIGHT, VALUE = 16 << 10, 16


@dataclass(frozen=True, slots=True, eq=False)
class Asked:
    """A request, and the dialect that it came in and is answered in.

    `base` is where callers find the server that answers, if there is one: pictures can have URLs there. `call` is what
    is asked of a kept workflow, if it is one that is asked.
    """

    dialect: ModuleType
    request: ImageRequest
    base: str | None = None
    call: Call | None = None

    @classmethod
    def of(
        cls,
        dialect: ModuleType,
        payload: dict[str, Any],
        engine: Engine,
        streams: bool,
        base: str | None,
        call: Call | None,
    ) -> Self:
        """`payload` in `dialect`, as this engine serves it; `streams` says whether events can be sent."""
        request: ImageRequest = call.request if call else dialect.parse(payload)
        served.require(request, engine.spec, engine.settings, streams)
        return cls(dialect, request, base, call)


async def understood(act: Callable[[], T], payload: Any, deadline: Deadline) -> T:
    """What `act` makes of `payload`, in time; on another thread if there is much of it, such as images in base64."""
    return act() if _is_light(payload) else await deadline.hold(asyncio.to_thread(act))


def _is_light(payload: Any) -> bool:
    left, waiting = LIGHT, [payload]
    while waiting and left > 0:
        value = waiting.pop()
        several = isinstance(value, dict | list | tuple)
        left -= len(value) * VALUE if several else len(value) if isinstance(value, str | bytes) else 0
        if several and left > 0:
            waiting += value.values() if isinstance(value, dict) else value
    return left > 0


def fields_of(payload: Any) -> dict[str, Any]:
    """`payload`, if it is an object of what JSON has: no transport should have let anything else through."""
    if not isinstance(payload, dict):
        raise InvalidType("The body should be a JSON object.")
    try:
        check(payload)
    except Malformed as error:
        raise InvalidJson(f"The request cannot be understood: {error}.") from None
    return payload
