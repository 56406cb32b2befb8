"""Images are decoded by a few threads of their own: who sends what takes long holds up none who sends no image."""

import asyncio
import os
from collections.abc import Callable
from contextvars import ContextVar
from typing import TypeVar

from handler.api.hands import Hands
from handler.api.isolated import NICE
from handler.api.loras import looked
from handler.core.deadline import Deadline

T = TypeVar("T")
SLOW = "The images could not be read in the time that this request may take. Send smaller ones, or allow more."
MOST, SPARE = max(2, min(4, os.cpu_count() or 1)), 2
NOTHING, PLAIN, ISOLATED = range(3)  # to decode; each of the others has hands, so that HEIC holds up no JPEG either
_hands = {kind: Hands(MOST, SPARE, "images", NICE) for kind in (PLAIN, ISOLATED)}
_until: ContextVar[Deadline] = ContextVar("until", default=Deadline())  # noqa: B039 - which nobody changes
_may: ContextVar[int] = ContextVar("may", default=ISOLATED)


class Decodes(BaseException):
    """There is more to decode than may be there; no fault, which no `except Exception` may take for one."""


async def apart(act: Callable[[], T], deadline: Deadline, kind: int = PLAIN) -> T:
    """What `act`, which decodes images, gives; DeadlineExceeded if that is not there in time.

    Nor does it begin with another image then, or once nobody waits any more. Where one of them is to be decoded in a
    process, all is begun again in other hands.
    """
    until = Deadline(deadline.at)

    def decode() -> T:
        _until.set(until)
        _may.set(kind)
        return act()

    try:
        return await looked(decode, deadline, _hands[kind], SLOW)
    except Decodes:
        return await apart(act, deadline, ISOLATED)
    finally:
        until.at = 0.0


async def perhaps(act: Callable[[], T], deadline: Deadline) -> T:
    """The same for what may have images: begun again where it has, for who has none shall not wait for who does."""

    def read() -> T:
        _may.set(NOTHING)
        return act()

    try:
        return await deadline.hold(asyncio.to_thread(read))
    except Decodes:
        return await apart(act, deadline)


def begin(kind: int = PLAIN) -> Deadline:
    """Before each image: until when it may take. Raises DeadlineExceeded if none are, or Decodes."""
    if kind > _may.get():
        raise Decodes
    until = _until.get()
    until.require_time()
    return until
