"""The engine in somebody's own program: a context, and pictures for prompts.

What is asked goes the way of every request: `Api` checks it, makes recipes, waits in the queue, and encodes.
"""

import asyncio
import logging
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

from handler.api.dispatch import Api
from handler.api.hands import Hands
from handler.core.deadline import DRAIN_S
from handler.core.recipe import Picture
from handler.core.request import ImageRequest
from handler.core.settings import Settings
from handler.engine import engine
from handler.worker.clock import Clock
from handler.worker.worker import Worker

log = logging.getLogger(__name__)
_hands = Hands(8, 0, "embedded")  # starts and ends take long, and no interpreter should wait for them as it ends


class Engine(engine.Engine):
    """One model and its queue: `async with Engine(settings) as engine`, then `generate` from that event loop.

    The context starts the engine and is entered once it is ready; a StartError says why it cannot be. At its end
    nothing new is accepted, what was asked of `generate` is drawn, for `DRAIN_S` at most, and the memory is given back.
    An error that ends it stops what is being drawn at its next step. What takes longer than `EXIT_S` gives the memory
    back when it ends, and so does a start that is given up. An engine starts once; RuntimeError the next time.
    """

    def __init__(
        self, settings: Settings, clock: Clock | None = None, boot: Callable[..., Worker] = Worker.boot
    ) -> None:
        super().__init__(settings, clock, boot)
        self._api, self._asked = Api(self), set[asyncio.Task[list[Picture]]]()

    async def generate(self, prompt: str, **fields: Any) -> list[Picture]:
        """Draw and encode what an `ImageRequest` of these fields asks for; picture i has seed + i.

        Raises the KindlingError that says why not: a RequestError names the field, QueueFull and NotReady are worth
        another try, DeadlineExceeded comes after KINDLING_DEADLINE_S. Cancelling the task ends its pictures.
        """
        if not self.begun:
            raise RuntimeError("This engine has not been started: use it inside `async with engine`.")
        request = ImageRequest.parse({"prompt": prompt, **fields})
        work = asyncio.ensure_future(self._api.generate(request))
        self._asked.add(work)
        work.add_done_callback(self._asked.discard)
        return await work

    async def __aenter__(self) -> Self:
        if self.begun:
            raise RuntimeError("This engine was started before: make a new Engine.")
        self.start()
        try:
            await _elsewhere(self.wait_booted)
        except BaseException:
            await _elsewhere(self._end)
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            (self.abort if kind else self.drain)()
            if self._asked:
                await asyncio.wait(self._asked, timeout=DRAIN_S)
        finally:
            await _elsewhere(self._end)

    def _end(self) -> None:
        self.stop()
        tidying = threading.Thread(target=self._tidy, name="tidy", daemon=True)
        tidying.start()
        if self.booted and not self.error:  # else it may yet load a model, or hang, and nobody waits for that
            tidying.join(self.exit.left_s)

    def _tidy(self) -> None:
        """Give the memory back once nothing is drawn: a last step, or a start that was given up, takes its time."""
        self._thread.join()
        if self.worker:
            try:
                self.worker.close()
            except Exception:
                log.exception("the memory of %s could not be given back", self.spec.id)


async def _elsewhere(act: Callable[[], None]) -> None:
    """Run what blocks beside this event loop."""
    await asyncio.wrap_future(_hands.run(act))
