"""One model that replicas draw: an `Api` like any other, over an engine that never starts."""

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from handler.api.dispatch import Api
from handler.api.elsewhere.events import Accepted, Began, Event, Failed, Finished, Lost, Replicas, Stepped
from handler.api.links import Links
from handler.api.showing import OnRequestStep
from handler.core.caller import CALLER
from handler.core.deadline import Deadline
from handler.core.errors import RETRY_S, DeadlineExceeded, NotReady, QueueFull, StartError
from handler.core.recipe import Picture
from handler.core.request import ImageRequest
from handler.core.settings import Settings
from handler.engine.engine import Engine
from handler.engine.queue import OnBegin, Queue, crowded

LOOK_S = 2.0  # between two looks at whether there can be a replica at all
TRIES = 2  # of a request whose replica was lost: one that is the end of replicas shall not end all of them
BODIES = 10_000  # that may come at once: their bytes have a bound of their own, and each model's queue is its own
RECENT = 16  # requests whose seconds say how long others will take
log = logging.getLogger(__name__)
Told = asyncio.Queue[Event | Exception]


class Gateway(Engine):
    """In the place of an engine: always ready to pass on what is asked. It is never started."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self.begun, self.state = True, "ready"
        self.queue = Queue(BODIES, settings.queue_s)
        self.served: Sequence[Replicated] = ()

    @property
    def drawing(self) -> int:
        """How many requests replicas have."""
        return sum(api.drawing for api in self.served)

    @property
    def waiting(self) -> int:
        """How many wait for one."""
        return sum(api.waiting for api in self.served)


class Replicated(Api):
    """Answers payloads with the pictures of `replicas`. What these would refuse is refused here, and wakes none."""

    def __init__(
        self,
        engine: Engine,
        counts: Callable[[Picture], object],
        uploaded: Callable[[float], object],
        links: Links | None,
        replicas: Replicas,
    ) -> None:
        super().__init__(engine, counts, uploaded, links)
        self._replicas = replicas
        self.waiting = self.drawing = 0
        self._cold_s, self._seconds = 0.0, deque[float](maxlen=RECENT)

    async def drawn(
        self, request: ImageRequest, on_step: OnRequestStep, deadline: Deadline, on_begin: OnBegin, admitted: bool
    ) -> list[Picture]:
        """All of a request's pictures, by a replica; by another one if that is lost, once. NotReady if both are.

        What is `admitted` waits for as long as it takes.
        """
        self.validate(request)
        request = request.model_copy(update={"response_format": "b64_json"})  # it is delivered from here
        for _ in range(TRIES):
            try:
                return await self._patiently(request, on_step, deadline, on_begin, admitted)
            except Lost as lost:
                log.warning("a replica of %s was lost while it had a request", self.engine.spec.id)
                reason = lost.reason
        raise reason or NotReady("The workers that drew this were lost; try again.", retry_s=self._cold_s or RETRY_S)

    async def _patiently(
        self, request: ImageRequest, on_step: OnRequestStep, deadline: Deadline, on_begin: OnBegin, admitted: bool
    ) -> list[Picture]:
        while True:
            try:
                if not admitted and self.waiting >= self.engine.settings.queue:
                    raise QueueFull(crowded(self.waiting), retry_s=await self._retry_s())
                return await self._sent(request, on_step, deadline, on_begin)
            except QueueFull as error:
                if not admitted:
                    raise
                await asyncio.sleep(min(error.retry_s, deadline.left_s))
                deadline.require_time()

    async def _retry_s(self) -> float:
        """In how many seconds the replicas will have taken what waits; if there is none, its start counts too."""
        replicas = (await self._replicas.look()).replicas
        each = sum(self._seconds) / len(self._seconds) if self._seconds else RETRY_S
        return (self.waiting + 1) * each / max(1, replicas) + (0 if replicas else self._cold_s or RETRY_S)

    async def _sent(
        self, request: ImageRequest, on_step: OnRequestStep, deadline: Deadline, on_begin: OnBegin
    ) -> list[Picture]:
        told = Told()
        hearing = asyncio.create_task(self._hear(told, request, deadline.left_s))
        try:
            await self._taken(told, deadline)
            self.drawing += 1
            try:
                return await deadline.hold(self._pictures_of(told, on_step, on_begin))
            finally:
                self.drawing -= 1
        finally:
            hearing.cancel()

    async def _hear(self, told: Told, request: ImageRequest, left_s: float) -> None:
        """Put all that a replica tells of a request into `told`, an error last; cancelled, it ends what is drawn."""
        try:
            async for event in self._replicas.draw(request, left_s, CALLER.get()):
                told.put_nowait(event)
            told.put_nowait(Lost())
        except TimeoutError:  # the network's, or Ray's, which is not the caller's time that is up
            told.put_nowait(Lost())
        except Exception as error:
            told.put_nowait(error)

    async def _taken(self, told: Told, deadline: Deadline) -> None:
        """Wait until a replica has the request. StartError says why none ever will, NotReady that none was in time."""
        self.waiting += 1
        try:
            accepted = await deadline.hold(self._first(told))
        except DeadlineExceeded:
            if (await self._replicas.look()).replicas:
                raise
            raise NotReady(
                f"No worker with {self.engine.spec.id} has started yet; try again.", retry_s=self._cold_s or RETRY_S
            ) from None
        finally:
            self.waiting -= 1
        assert isinstance(accepted, Accepted)
        self._cold_s = accepted.cold_start_s

    async def _first(self, told: Told) -> Event:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_S):
                    return await _next(told)
            look = await self._replicas.look()
            if look.failure and not look.replicas:
                raise StartError(f"{self.engine.spec.id} cannot start: {look.failure}")

    async def _pictures_of(self, told: Told, on_step: OnRequestStep, on_begin: OnBegin) -> list[Picture]:
        while True:
            match await _next(told):
                case Began():
                    on_begin()
                case Stepped(done, of, preview):
                    on_step(done, of, partial(_same, preview))
                case Finished(pictures):
                    self._seconds.append(sum(_busy(picture) for picture in pictures))
                    return pictures
                case Failed(error):
                    raise Lost(error) if error.fatal else error


async def _next(told: Told) -> Event:
    event = await told.get()
    if isinstance(event, Exception):
        raise event
    return event


def _same(preview: Any) -> Any:
    """It was made there."""
    return preview


def _busy(picture: Picture) -> float:
    """For how many seconds a worker drew it."""
    return sum(seconds for stage, seconds in picture.stages.items() if stage != "queue")
