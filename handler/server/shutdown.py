"""How the serving process leaves: told to, with exit code 0, or because its worker failed.

That is 1, 2 if a setting is the reason, 124 if it did not start in time.

Told once (SIGTERM, Ctrl-C) it drains: what was accepted is drawn and answered, for `DRAIN_S`, and who asks then is told
when to come back. Then it closes its sockets and finishes what it writes, and `EXIT_S` after it was told it is gone,
whatever hangs. Told twice it answers all at once and is gone, with the code of the signal: 143 or 130.
"""

import os
import socket
import threading
import time
from collections.abc import Callable
from queue import SimpleQueue
from types import FrameType

import uvicorn

from handler.core import outlet, scratch
from handler.core.deadline import DRAIN_S, Deadline
from handler.core.errors import BudgetExceeded, SettingsError, StartError
from handler.engine.engine import Engine
from handler.worker.ending import EXIT_CODE

ANSWER_S = 2.0  # for answers to reach who waits
TICK_S = 0.1  # as uvicorn has it
STUCK_S = 60.0  # of an event loop that has not come round: longer than any load, and than an exit
BACKLOG = 2048  # connections that wait to be accepted
ABORTED = 128  # and the signal's number, as shells have it


class Server(uvicorn.Server):
    """uvicorn, but it listens until its engine has drained, and leaves when that has failed.

    `hurry` lets whoever still waits be answered with what is there; `busy` says whether something goes on besides.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        engine: Engine,
        hurry: Callable[[], None],
        busy: Callable[[], bool] = lambda: False,
    ) -> None:
        super().__init__(config)
        self._engine, self._hurry, self._busy = engine, hurry, busy
        self.told: list[int] = []  # the signals that came
        self._ticked = time.monotonic()
        self._signals: SimpleQueue[int] = SimpleQueue()
        threading.Thread(target=self._obey, daemon=True).start()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Only pass it on: the thread that is interrupted here may hold any lock, and what is raised may be lost."""
        self.told.append(sig)
        self._signals.put(sig)

    def _obey(self) -> None:
        for act in (self._drain, self._abort):
            self._signals.get()
            threading.Thread(target=act, daemon=True).start()

    async def on_tick(self, counter: int) -> bool:
        """The event loop came round."""
        self._ticked = time.monotonic()
        return await super().on_tick(counter)

    def stuck(self) -> bool:
        """Whether it has not for so long that something holds it for ever."""
        return time.monotonic() - self._ticked > STUCK_S

    def watch(self) -> None:
        """Block until the engine is over, and leave if it has failed."""
        self._engine.over.wait()
        if self._engine.error:
            say(self._engine.error.message)
            self._leave()

    def give_up(self, error: StartError) -> None:
        """The start will not come to its end: whoever waits for it is told so, and has `ANSWER_S` to hear it."""
        self._engine.fail(error)
        end = Deadline.within(ANSWER_S)
        while self.server_state.tasks and end.left_s:
            time.sleep(TICK_S)

    @property
    def code(self) -> int:
        """The exit code."""
        if len(self.told) > 1:
            return ABORTED + self.told[1]
        codes = {BudgetExceeded: EXIT_CODE, SettingsError: 2, StartError: 1}
        return next((code for kind, code in codes.items() if isinstance(self._engine.error, kind)), 0)

    def end(self) -> None:
        """End this process here: the interpreter's own end takes seconds, and joins threads that may hang for ever."""
        outlet.drain()
        if self._engine.booted and not self._engine.error:
            scratch.leave(self.code)
        else:  # a start that may still go on would take files that are gone for damaged ones
            os._exit(self.code)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """What uvicorn does at its start, but the kernel keeps more connections waiting than are accepted at once."""
        await super().startup(sockets)
        for each in sockets or []:
            each.listen(BACKLOG)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """What uvicorn does at its end; it waits no longer for whoever hurries."""
        self._hurry()
        await super().shutdown(sockets)

    def _drain(self) -> None:
        say("stopping; what was accepted is being drawn. Ctrl-C or SIGTERM again stops at once.")
        end = Deadline.within(DRAIN_S)
        self._engine.drain()
        threading.Thread(target=self._guard, daemon=True).start()
        while (self._engine.busy or self._busy() or self.server_state.tasks) and end.left_s:
            time.sleep(TICK_S)
        if self._engine.busy:
            self._engine.abort()
        self._leave(max(ANSWER_S, end.left_s))

    def _guard(self) -> None:
        """End this process when its time is up, whatever it waits for: the interpreter joins what hangs for ever."""
        time.sleep(self._engine.exit.left_s)
        os._exit(self.code)

    def _abort(self) -> None:
        self._engine.abort()
        self._leave()

    def _leave(self, seconds: float = ANSWER_S) -> None:
        """Close the sockets, after at most `seconds` for answers to reach who waits. What failed ends then."""
        self.config.timeout_graceful_shutdown = round(seconds)
        self.should_exit = True
        if self.code:
            time.sleep(seconds)
            self.end()


def say(text: str) -> None:
    """Tell whoever started this process."""
    outlet.ERR.write(f"kindling: {text}\n")
