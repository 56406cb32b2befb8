"""Images are decoded by a few threads of their own: who sends what takes long holds up none who sends no image."""

import asyncio
import os
from collections.abc import Callable
from contextvars import ContextVar
from typing import TypeVar

from handler.api.hands import Hands
from handler.api.loras import looked
from handler.core.deadline import Deadline

T = TypeVar("T")
MOST, SPARE = max(2, min(4, os.cpu_count() or 1)), 2
_hands = Hands(MOST, SPARE, "images")
_until: ContextVar[Deadline] = ContextVar("until", default=Deadline())  # noqa: B039 - which nobody changes
_none: ContextVar[bool] = ContextVar("none", default=False)  # whether there is to be nothing to decode


class Decodes(BaseException):
    """There is something to decode after all; no fault, which no `except Exception` may take for one."""


async def apart(act: Callable[[], T], deadline: Deadline) -> T:
    """What `act`, which decodes images, gives; DeadlineExceeded if that is not there in time.

    Nor does it begin with another image then, or once nobody waits any more.
    """
    until = Deadline(deadline.at)

    def decode() -> T:
        _until.set(until)
        return act()

    try:
        return await looked(decode, deadline, _hands)
    finally:
        until.at = 0.0


async def perhaps(act: Callable[[], T], deadline: Deadline) -> T:
    """The same for what may have images: begun again where it has, for who has none shall not wait for who does."""

    def read() -> T:
        _none.set(True)
        return act()

    try:
        return await deadline.hold(asyncio.to_thread(read))
    except Decodes:
        return await apart(act, deadline)


def begin() -> float:
    """Before each image: the seconds that are left for it. Raises DeadlineExceeded if none are, or Decodes."""
    if _none.get():
        raise Decodes
    until = _until.get()
    until.require_time()
    return until.left_s
