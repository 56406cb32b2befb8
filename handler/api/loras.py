"""The LoRAs of a request, and those that there are: looked for on a volume that may hang, within a deadline."""

import asyncio
from collections.abc import Callable
from functools import partial
from typing import TypeVar

from handler.api.hands import Hands
from handler.core.deadline import Deadline
from handler.core.recipe import Lora
from handler.core.request import ImageRequest
from handler.core.settings import Settings
from handler.volume import adapters

T = TypeVar("T")
_hands = Hands(4, 4, "volume")  # reading a large file's hash takes seconds, a dead mount for ever


async def chosen(request: ImageRequest, settings: Settings, deadline: Deadline) -> tuple[Lora, ...]:
    """The files that the names in `request` mean; raises what says which cannot be had."""
    return await looked(partial(adapters.chosen, request.loras, settings.volume), deadline) if request.loras else ()


async def listed(settings: Settings, deadline: Deadline) -> list[adapters.Adapter]:
    """All that are on the volume."""
    return await looked(partial(adapters.adapters, settings.volume), deadline)


async def looked(look: Callable[[], T], deadline: Deadline) -> T:
    """What `look`, which asks the volume, gives; DeadlineExceeded if that is not there in time."""
    looking = _hands.run(look)
    try:
        return await deadline.hold(asyncio.wrap_future(looking))
    finally:
        _hands.forsake(looking)
