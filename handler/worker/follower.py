"""A follower: a process that draws, on a GPU of its own, its part of each picture that `ranks.py`'s leader draws.

It talks to the leader alone, keeps nothing, and ends when the leader's end of the line is closed, whatever it does.
"""

import contextlib
import sys
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any

from handler.catalog.attention import KernelChoice
from handler.catalog.models import find
from handler.core import scratch
from handler.core.errors import KindlingError
from handler.core.recipe import Preview
from handler.core.settings import Settings
from handler.model import attention, imports
from handler.model.hardware import expected
from handler.volume import pages
from handler.volume.autoencoder import vae_source
from handler.worker.clock import Clock
from handler.worker.orders import Bind, Done, Draw, Failed, InStep, Join, Load, Over, Step
from handler.worker.outlook import outlook
from handler.worker.preload import libraries
from handler.worker.ranks import enter
from handler.worker.spawn import attend
from handler.worker.worker import Worker


class GivenUp(Exception):
    """The leader draws this picture no further."""


class Follower:
    """Does what the leader tells it, one after another."""

    def __init__(self, line: Connection) -> None:
        self._line, self._over = line, True
        self._worker: Worker | None = None
        self._settings: Settings

    def serve(self) -> None:
        """Until the line ends."""
        with contextlib.suppress(EOFError, OSError):
            while True:
                self._line.send(self._done(self._line.recv()))

    def _done(self, told: object) -> Done | Failed:
        try:
            return ORDERS[type(told)](self, told)
        except Exception as error:
            message = error.message if isinstance(error, KindlingError) else str(error)
            return Failed(type(error).__name__, message or type(error).__name__)

    def load(self, told: Load) -> Done:
        """The model, alone."""
        if self._worker:
            self._worker.close()
        settings, clock = told.settings, Clock.anew(told.settings.cold_start_budget_s)
        seen = outlook(settings, find(settings.model), expected(settings), without=told.without)
        vae = vae_source(settings.vae, settings.volume) if settings.vae else None
        self._settings, (self._worker, _) = settings, Worker.built(seen, vae, clock, None, None, told.rank)
        return Done()

    def join(self, told: Join) -> Done:
        """The others."""
        attention.use(self.worker.denoiser, KernelChoice(told.kernel, "the leader's"))
        self.worker.memory = replace(self.worker.memory, tile_above=told.tile_above)
        enter(told.rank, self._settings, self.worker, told.store)
        return Done()

    def bind(self, told: Bind) -> Done:
        """Compiled code to the model, or take it off."""
        self.worker.bind(told.package)
        return Done()

    def draw(self, told: Draw) -> Done:
        """This rank's part of pictures, step by step with the leader."""
        self._over = False
        outcomes = self.worker.draw_some(told.recipes, [self._step] * len(told.recipes))
        while not self._over:  # a run that failed here first
            self._over = isinstance(self._line.recv(), Over)
        return Done(tuple(type(each).__name__ if isinstance(each, BaseException) else "" for each in outcomes))

    def in_step(self, told: InStep) -> Done:
        """Say so to all ranks."""
        from handler.model import split

        split.in_step(told.number, told.seconds)
        return Done()

    @property
    def worker(self) -> Worker:
        """The model, which the leader lets load first."""
        assert self._worker
        return self._worker

    def _step(self, done: int, preview: Preview) -> None:
        told = Over() if self._over else self._line.recv()
        self._over = isinstance(told, Over)
        if told != Step(goes_on=True):
            raise GivenUp


ORDERS: dict[type, Callable[[Follower, Any], Done]] = {
    Load: Follower.load,
    Join: Follower.join,
    Bind: Follower.bind,
    Draw: Follower.draw,
    InStep: Follower.in_step,
}


def main(model: str, number: int) -> None:
    """Follow the leader at the other end of the line `number`, a file descriptor; `model` is what it will load."""
    [line] = attend(number)
    pages.share()
    with imports.uncollected(), imports.lean():
        libraries(find(model))
    Follower(line).serve()
    scratch.leave(0)  # of a group whose leader is gone nothing can be undone


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
