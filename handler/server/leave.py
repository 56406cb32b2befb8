"""How the serving process leaves: told to, with exit code 0, or because its worker failed.

That is 1, 2 if a setting is the reason, 124 if it did not start in time.

Told once (SIGTERM, Ctrl-C) it drains: what was accepted is drawn, for as long as platforms wait, and who asks then is
told when to come back. Told twice it answers all at once and is gone, with the code of the signal: 143 or 130.
"""

import contextlib
import os
import sys
import threading
import time
from queue import SimpleQueue
from types import FrameType

import uvicorn

from handler.clock import EXIT_CODE
from handler.errors import BudgetExceeded, SettingsError, StartError
from handler.lane import Lane

DRAIN_S = 25.0  # a platform kills what has not left about 30 s after it was told to
ANSWER_S = 3.0  # for answers to reach who waits
TICK_S = 0.1  # as uvicorn has it
ABORTED = 128  # and the signal's number, as shells have it


class Server(uvicorn.Server):
    """uvicorn, but it listens until its lane has drained, and leaves when that has failed."""

    def __init__(self, config: uvicorn.Config, lane: Lane) -> None:
        super().__init__(config)
        self._lane = lane
        self.told: list[int] = []  # the signals that came
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

    def watch(self) -> None:
        """Block until the lane is over, and leave if it has failed."""
        self._lane.over.wait()
        if self._lane.error:
            say(self._lane.error.message)
            self._leave()

    @property
    def code(self) -> int:
        """The exit code."""
        if len(self.told) > 1:
            return ABORTED + self.told[1]
        codes = {BudgetExceeded: EXIT_CODE, SettingsError: 2, StartError: 1}
        return next((code for kind, code in codes.items() if isinstance(self._lane.error, kind)), 0)

    def end(self) -> None:
        """End this process here if it failed, or if the lane's thread is in native code, out of Python's reach."""
        if self.code or self._lane.alive:
            sys.stdout.flush()
            os._exit(self.code)

    def _drain(self) -> None:
        say("stopping; what was accepted is being drawn. Ctrl-C or SIGTERM again stops at once.")
        end = time.monotonic() + DRAIN_S
        self._lane.drain()
        while self._lane.busy and time.monotonic() < end:
            time.sleep(TICK_S)
        if self._lane.busy:
            self._lane.abort()
        self._leave(max(ANSWER_S, end - time.monotonic()))

    def _abort(self) -> None:
        self._lane.abort()
        self._leave()

    def _leave(self, seconds: float = ANSWER_S) -> None:
        """Close the sockets, after at most `seconds` for answers to reach who waits. What failed ends then."""
        self.config.timeout_graceful_shutdown = round(seconds)
        self.should_exit = True
        if self.code:
            time.sleep(seconds)
            self.end()


def say(text: str) -> None:
    """Tell whoever started this process, if anybody still listens: what follows is done all the same."""
    with contextlib.suppress(BrokenPipeError):
        print(f"kindling: {text}", file=sys.stderr, flush=True)
