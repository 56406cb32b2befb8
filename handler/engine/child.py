"""The process of one of several workers: boots it, draws what the server's `remote.py` hands it, and ends with that."""

import contextlib
import gc
import logging
import os
import sys
import threading
from collections.abc import Sequence
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

from handler.core import outlet, scratch
from handler.core.deadline import EXIT_S
from handler.core.errors import DeviceLost, KindlingError, StartError
from handler.core.recipe import Preview
from handler.core.settings import Settings
from handler.core.tracebacks import let_go, outline
from handler.engine.publisher import Publisher
from handler.engine.triage import fault
from handler.model.readings import readings
from handler.model.runner import DrawOutcome
from handler.model.upstream import dedicated
from handler.volume import pages
from handler.worker.clock import Clock
from handler.worker.orders import Draw, Drew, Fault, Look, Outcome, Ready, Rendered, Step, Stepped
from handler.worker.spawn import attend
from handler.worker.worker import Worker

log = logging.getLogger(__name__)


class GivenUp(Exception):
    """Nobody wants this picture any more."""


class Attendant:
    """Tells the server, over `line`, of its start and of what it draws."""

    def __init__(self) -> None:
        self.line: Connection
        self.clock: Clock
        self.publisher, self._telling = Publisher(), threading.Lock()

    def tell(self, told: object) -> None:
        """From any thread, for a start is watched over by another one; a server that is gone hears nothing."""
        with self._telling, contextlib.suppress(OSError):
            self.line.send(told)

    def boot(self, settings: Settings) -> Worker:
        """As `serve` does it alone."""
        clock = Clock(settings.cold_start_budget_s, announce=lambda _: self.tell(clock.ledger), publish=self.tell)
        self.clock = clock
        worker = Worker.boot(settings, clock)
        if settings.publish and worker.unpublished:
            self.publisher.begin(partial(worker.publish, settings.volume))
        return worker

    def serve(self, worker: Worker) -> None:
        """Draw until the line ends, and this with it."""
        while told := self._next():
            steps = [partial(self._step, i) for i in range(len(told.recipes))]
            outcomes: Sequence[DrawOutcome | None]
            try:
                outcomes = worker.draw_some(told.recipes, steps)
            except BaseException as error:  # also a library that wants to end this process
                outcomes = [error] * len(told.recipes)
            self.tell(Drew(packed(outcomes), worker.peak_bytes))

    def _next(self) -> Draw | None:
        with contextlib.suppress(EOFError, OSError):
            told: Draw = self.line.recv()
            return told
        return None

    def _step(self, picture: int, done: int, preview: Preview) -> None:
        self.tell(Stepped(picture, done))
        while isinstance(told := self.line.recv(), Look):
            self.tell(_seen(preview))
        if told != Step(goes_on=True):
            raise GivenUp

    def end(self) -> None:
        """The server wants no more of this process: a start is stopped, what was compiled is left for others."""
        clock: Clock | None = getattr(self, "clock", None)
        if not clock or clock.finish("stopped", f"told to stop in phase '{clock.ledger.phase}'"):
            outlet.drain()
            os._exit(0)  # whatever it does: a start goes no further
        self.publisher.join(EXIT_S)


def _seen(preview: Preview) -> Any:
    try:
        return preview()
    except Exception as error:
        return _packed(error)


def packed(outcomes: Sequence[DrawOutcome | None]) -> tuple[Outcome, ...]:
    """Those of a run as they go over the line: pictures that failed together have the same error there too."""
    each = {key: _packed(outcome) for key, outcome in {id(outcome): outcome for outcome in outcomes}.items()}
    return tuple(each[id(outcome)] for outcome in outcomes)


def _packed(outcome: DrawOutcome | None) -> Outcome:
    """Of errors that are not ours nothing but what makes two the same fault."""
    if outcome is None:
        return None
    if not isinstance(outcome, BaseException):
        pixels, stages = outcome
        return Rendered(pixels.rgb, pixels.recipe.revision, pixels.batch, pixels.tokens, stages)
    told = outcome if isinstance(outcome, KindlingError) else Fault(fault(outcome))
    cause = outcome.__cause__ if told is outcome else outcome
    if cause and not isinstance(cause, GivenUp):
        log.error("drawing failed\n%s", outline(cause))
    let_go(outcome)
    return told


def _answer(asks: Connection, worker: Worker) -> None:
    """What somebody who looks on wants to know, while the other thread draws."""
    with contextlib.suppress(EOFError, OSError):
        while True:
            asks.recv()
            asks.send(readings(worker.hardware.device))


def _leave(lost: DeviceLost) -> None:
    """End this process, whose followers are not all there any more: the server sees that, and begins another."""
    log.error("%s", lost.message)
    outlet.drain()
    scratch.leave(1)


def main(number: str, *lines: int) -> None:
    """Be worker `number` of the server at the other ends of `lines`: one for what it draws, one for who looks on."""
    attendant = Attendant()
    attendant.line, asks = attend(*lines, last=attendant.end)
    try:
        settings: Settings = attendant.line.recv()
    except EOFError:  # it was not to start after all
        return
    outlet.install()
    logging.basicConfig(level=settings.log_level.upper(), format=f"%(levelname)s worker {number} %(name)s: %(message)s")
    dedicated()
    pages.share()
    try:
        worker = attendant.boot(settings)
    except StartError as error:
        let_go(error)
        outlet.drain()
        attendant.tell(error)  # the server then ends this process
        return
    worker.watch(_leave)
    threading.Thread(target=_answer, args=[asks, worker], name="readings", daemon=True).start()
    attendant.tell(Ready(worker.hardware, worker.receipt, worker.facts, worker.gains))
    gc.freeze()  # as a server does with what a worker has
    attendant.serve(worker)
    attendant.end()
    outlet.drain()
    scratch.leave(0)  # the interpreter's own end takes seconds


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
