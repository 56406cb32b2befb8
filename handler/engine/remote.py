"""A worker in a process of its own, as an engine has it: the same to whoever draws with it as one that is in here.

After each step the process waits for one word: so a picture that nobody wants goes no further, and a preview is made
only if somebody looks. By then the GPU has its next step to do.
"""

import contextlib
import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Self

from handler.core.deadline import Deadline
from handler.core.errors import BudgetExceeded, DeviceLost, StartError
from handler.core.recipe import OnStep, Pixels, Recipe
from handler.core.settings import Settings
from handler.model.given_gpus import gpu_count
from handler.model.hardware import Hardware
from handler.model.runner import DrawOutcome
from handler.volume.receipts import Gains, Receipt
from handler.worker.clock import GRACE_S, Clock, Ledger
from handler.worker.ending import EXIT_CODE
from handler.worker.orders import Draw, Look, Ready, Rendered, Step, Stepped
from handler.worker.sharing import visible, without_keys
from handler.worker.spawn import END_S, Child

LATER_S = 5 * GRACE_S  # than its budget is over, a process that still says nothing is ended
ASK_S, AGAIN_S = 1.0, 1.0  # for what its device tells; what it told is new for so long
ENDED = "The process of this worker {}. Try again."


class Remote:
    """Worker `number` of several, in a process of its own. Make one with `boot`."""

    unpublished = False  # its process leaves by itself what it compiled

    def __init__(self, child: Child, clock: Clock) -> None:
        self._child, self._clock, self._closed, self._hung_up = child, clock, False, False
        self._asking, self._asked, self._told = threading.Lock(), -math.inf, dict[str, float]()
        self._owing = False  # an answer
        self.peak_bytes = 0
        self.hardware: Hardware  # these as `Loaded` has them, once it is ready
        self.receipt: Receipt | None
        self.facts: dict[str, str]
        self.gains: Gains

    @classmethod
    def boot(cls, number: int, begun: Callable[[Self], object], settings: Settings, clock: Clock) -> Self:
        """Begin the process, and follow its start by `clock`; a StartError of its, or why it has ended.

        `begun` gets this as soon as there is a process, which `hang_up` ends.
        """
        on_gpus = settings.device != "cpu" and gpu_count()
        sees = visible(number * settings.ranks, settings.ranks) if on_gpus else {}
        remote = cls(Child("handler.engine.child", [str(number)], sees, lines=2), clock)
        begun(remote)
        try:
            with clock.start(settings.model):
                remote._load(settings)
        except BaseException:
            if not remote._hung_up:
                remote.kill()
            remote.close()  # whoever keeps the error keeps this
            raise
        return remote

    def _load(self, settings: Settings) -> None:
        line, end = self._child.line, Deadline.within(settings.cold_start_budget_s + LATER_S)
        try:
            line.send(without_keys(settings))
            while line.poll(end.left_s):
                told = line.recv()
                if isinstance(told, StartError):
                    raise told
                if isinstance(told, Ready):
                    self.hardware, self.receipt = told.hardware, told.receipt
                    self.facts, self.gains = told.facts, told.gains
                    return
                self._clock.follow(told)
        except (OSError, EOFError):
            ended = self._child.ended
            if self._child.process.poll() == EXIT_CODE:
                raise BudgetExceeded(self.ledger.over) from None
            raise StartError(f"A worker's process {ended} as it started, in phase '{self.ledger.phase}'.") from None
        raise BudgetExceeded(self.ledger.over)

    @property
    def ledger(self) -> Ledger:
        """Of its start."""
        return self._clock.ledger

    def draw_some(self, recipes: Sequence[Recipe], on_steps: Sequence[OnStep]) -> list[DrawOutcome | None]:
        """As `Runner.draw_some`, in the process."""
        given_up = dict[int, BaseException]()
        line = self._child.line
        try:
            line.send(Draw(tuple(recipes)))
            while isinstance(told := line.recv(), Stepped):
                line.send(Step(goes_on=self._stepped(told, on_steps, given_up)))
        except (OSError, EOFError):
            lost = self._lost()
            self.kill()
            return [lost] * len(recipes)
        except BaseException:  # the process is somewhere in this picture
            self.kill()
            raise
        self.peak_bytes = told.peak_bytes
        outcomes = zip(recipes, told.outcomes, strict=True)
        return [given_up.get(i) or self._outcome(recipe, one) for i, (recipe, one) in enumerate(outcomes)]

    def _stepped(self, told: Stepped, on_steps: Sequence[OnStep], given_up: dict[int, BaseException]) -> bool:
        """Whether this picture goes on."""
        try:
            on_steps[told.picture](told.done, self._look)
        except Exception as error:  # also of a process that is gone, which the next word to it meets
            given_up[told.picture] = error
        return told.picture not in given_up

    def _look(self) -> Any:
        self._child.line.send(Look())
        seen = self._child.line.recv()
        if isinstance(seen, BaseException):
            raise seen
        return seen

    def _outcome(self, recipe: Recipe, told: Rendered | BaseException | None) -> DrawOutcome | None:
        if not isinstance(told, Rendered):
            return told
        drawn = replace(recipe, revision=told.revision)
        return Pixels(told.rgb, drawn, told.batch, told.tokens, self), told.stages

    def readings(self) -> dict[str, float]:
        """What the process and its device tell right now, as `model/readings.py` has it; nothing if it is silent."""
        with self._asking:
            if time.monotonic() >= self._asked + AGAIN_S:
                self._told, self._asked = self._ask(), time.monotonic()
            return self._told

    def _ask(self) -> dict[str, float]:
        """What it says within `ASK_S`. One that never answers is not asked again: the line holds only so much."""
        line = self._child.lines[1]
        with contextlib.suppress(OSError, EOFError):
            if self._owing and line.poll():  # too late for who asked
                line.recv()
                self._owing = False
            if not self._owing:
                line.send(None)
                self._owing = True
            if line.poll(ASK_S):
                told: dict[str, float] = line.recv()
                self._owing = False
                return told
        return {}

    def watch(self, alarm: Callable[[DeviceLost], object]) -> None:
        """Call `alarm`, on another thread, as soon as the process has ended, be anything drawn or not."""
        threading.Thread(target=self._wait, args=[alarm], name="worker-process", daemon=True).start()

    def _wait(self, alarm: Callable[[DeviceLost], object]) -> None:
        self._child.process.wait()
        if not self._closed:
            alarm(self._lost())

    def _lost(self) -> DeviceLost:
        return DeviceLost(ENDED.format(self._child.ended))

    def hang_up(self) -> None:
        """Let a process that starts end, from any thread; it has `END_S` to leave word of that."""
        self._hung_up = True
        self._child.hang_up()

    def kill(self) -> None:
        """End the process at once: it may hang, so deep in a driver that only who waits for its word can be told."""
        self._child.process.kill()
        self._child.hang_up()

    def close(self, seconds: float = END_S) -> None:
        """Let the process end, which publishes before what it has compiled, and has so long for that."""
        self._closed = True
        self._child.close(seconds)
