"""What a replica tells, event by event, of a request that it draws for who is elsewhere; all of it can be pickled."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

from handler.api.dispatch import Api
from handler.api.showing import OnRequestStep
from handler.core.caller import CALLER
from handler.core.deadline import Deadline
from handler.core.errors import Internal, KindlingError
from handler.core.recipe import Picture
from handler.core.request import ImageRequest
from handler.core.tracebacks import let_go, outline
from handler.engine.queue import OnBegin

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Accepted:
    """A replica has the request; its own start took so many seconds."""

    cold_start_s: float


@dataclass(frozen=True, slots=True)
class Began:
    """One of its pictures is being drawn."""


@dataclass(frozen=True, slots=True)
class Stepped:
    """So many steps are done; `preview` is a small picture, uint8 (height, width, 3), if the request wants any."""

    done: int
    of: int
    preview: Any = None


@dataclass(frozen=True, slots=True)
class Finished:
    """All its pictures, encoded."""

    pictures: list[Picture]


@dataclass(frozen=True, slots=True)
class Failed:
    """Why there are none."""

    error: KindlingError


Event = Accepted | Began | Stepped | Finished | Failed


class Lost(Exception):
    """The replica that had a request is no more, or soon will be, for the reason that it gave."""

    def __init__(self, reason: KindlingError | None = None) -> None:
        super().__init__()
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Look:
    """How many replicas of a model are ready, and why none can be, if that is known."""

    replicas: int
    failure: str = ""


class Replicas(Protocol):
    """The replicas of one model."""

    def draw(self, request: ImageRequest, left_s: float, caller: bytes) -> AsyncIterator[Event]:
        """What `draw_events` tells, at one of them. Raises Lost; QueueFull if no more may wait; StartError."""

    async def look(self) -> Look:
        """How they are."""


async def draw_events(api: Api, request: ImageRequest, left_s: float, caller: bytes) -> AsyncIterator[Event]:
    """Draw `request` in `left_s` seconds for the `caller` of elsewhere: Accepted comes first, Finished or Failed last.

    Closing the iterator ends the drawing.
    """
    CALLER.set(caller)
    loop, told = asyncio.get_running_loop(), asyncio.Queue[Event]()

    def say(event: Event) -> None:
        loop.call_soon_threadsafe(told.put_nowait, event)

    shows = bool(request.partial_images or request.sampling)

    def step(done: int, of: int, preview: Callable[[], Any]) -> None:
        say(Stepped(done, of, preview() if shows else None))

    async def draw() -> None:
        told.put_nowait(await _ended(api, request, step, Deadline.within(left_s), lambda: say(Began())))

    drawing = asyncio.create_task(draw())
    try:
        yield Accepted(api.engine.ledger.total_s)
        while not isinstance(event := await told.get(), Finished | Failed):
            yield event
        yield event
    finally:
        drawing.cancel()


async def _ended(
    api: Api, request: ImageRequest, step: OnRequestStep, deadline: Deadline, begun: OnBegin
) -> Finished | Failed:
    try:
        pictures = await api.draw(request, step, deadline, begun)
    except KindlingError as error:
        let_go(error)
        return Failed(error.anew())
    except Exception as error:
        log.error("a request failed\n%s", outline(error))
        return Failed(Internal("Something went wrong on our side; the log has the details."))
    return Finished([_light(picture) for picture in pictures])


def _light(picture: Picture) -> Picture:
    """Without the pixels that it was made of, which whoever asked has."""
    recipe = picture.recipe
    images = tuple(replace(image, rgb=None) for image in recipe.images)
    return replace(picture, recipe=replace(recipe, images=images, mask=recipe.mask and replace(recipe.mask, kept=None)))
