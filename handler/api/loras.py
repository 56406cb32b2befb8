"""The LoRAs and embeddings of a request, and the LoRAs that there are: on a volume that may hang, within a deadline."""

import asyncio
import logging
from collections.abc import Callable
from functools import partial
from typing import TypeVar

from handler.api.hands import Hands
from handler.catalog.spec import ModelSpec
from handler.core.deadline import Deadline
from handler.core.errors import DeadlineExceeded
from handler.core.recipe import Embedding, Lora
from handler.core.request import ImageRequest
from handler.core.settings import Settings
from handler.model.text.pieces import embedded, naming
from handler.volume import adapters, embeddings

T = TypeVar("T")
LISTING_S = 2.0  # who asks for the list of models, perhaps whether this worker is well, shall not wait for a volume
SLOW = "The volume did not answer in the time that this request may take; try again."
log = logging.getLogger(__name__)
_hands = Hands(4, 4, "volume")  # reading a large file's hash takes seconds, a dead mount for ever


async def chosen(request: ImageRequest, settings: Settings, deadline: Deadline) -> tuple[Lora, ...]:
    """The files that the names in `request` mean; raises what says which cannot be had."""
    return await looked(partial(adapters.chosen, request.loras, settings.volume), deadline) if request.loras else ()


async def named(
    request: ImageRequest, spec: ModelSpec, settings: Settings, deadline: Deadline
) -> tuple[Embedding, ...]:
    """The files that its prompts mean by `embedding:NAME`; raises what says which cannot be had."""

    def look() -> tuple[Embedding, ...]:
        return embeddings.chosen(embedded(request, spec), settings.volume)

    return await looked(look, deadline) if naming(request, spec) else ()


async def listed(settings: Settings, deadline: Deadline) -> list[adapters.Adapter]:
    """All that are on the volume; none, which is told, if it does not answer in `LISTING_S`."""
    deadline.no_later(LISTING_S)
    try:
        return await looked(partial(adapters.adapters, settings.volume), deadline)
    except DeadlineExceeded:
        log.warning("the list of models is without LoRAs: the volume does not answer")
        return []


async def looked(look: Callable[[], T], deadline: Deadline, hands: Hands = _hands, late: str = SLOW) -> T:
    """What `look`, which asks the volume, gives; DeadlineExceeded, which says `late`, if that is not there in time."""
    looking = hands.run(look)
    try:
        return await deadline.hold(asyncio.wrap_future(looking), late)
    finally:
        hands.forsake(looking)
