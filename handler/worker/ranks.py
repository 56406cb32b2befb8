"""The processes that draw each picture together, on a GPU each: the worker leads, those of `follower.py` follow.

The leader alone talks to anybody. It hands every recipe on, and after each step what becomes of the picture, so that
all give up at the same step. Whoever ends, hangs or fails apart from the others cannot be brought back into step: then
the device counts as lost, also while nothing is drawn, the pictures fail once, and this worker is replaced. Followers
end when their leader does.
"""

import contextlib
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Self

from handler.core.errors import DeviceLost, StartError
from handler.core.recipe import OnStep, Preview, Recipe
from handler.core.scratch import Scratch
from handler.core.settings import Settings
from handler.model import upstream
from handler.model.hardware import Hardware, expected
from handler.model.runner import DrawOutcome, InTurn
from handler.volume import pages
from handler.worker.orders import Bind, Done, Draw, Failed, InStep, Join, Load, Over, Step, require_done
from handler.worker.sharing import require_exact, require_ring, shared_by, visible, without_keys
from handler.worker.spawn import Child, heard

APART = "A process that draws with this one {}."
REPLACED = "This worker is being replaced. Try again."
SETTLE_S = 10.0  # for all ranks to say that they are in step again


class Ranks(InTurn):
    """The followers of this process, as a context that ends them. Draws together with them once all have joined."""

    def __init__(self, settings: Settings) -> None:
        """Start them: they import what they need."""
        if (seen := expected(settings)).device == "cpu":
            require_ring(seen, settings)
        upstream.shared()
        pages.share()
        self._settings, self._loads, self._number, self._joined = settings, 0, 0, False
        self._lost, self._closed = "", False
        self._followers = list[Child]()
        self._meeting = Scratch()
        with contextlib.ExitStack() as unless_begun:
            unless_begun.enter_context(self)
            for rank in range(1, settings.ranks):
                self._followers.append(Child("handler.worker.follower", [settings.model], visible(rank)))
            unless_begun.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def told(self) -> str:
        """How they share a picture."""
        size = self._settings.tp_size
        return shared_by(self._settings) + (f", text encoders by {size}" if size > 1 else "")

    def load(self, hardware: Hardware, mode: str, without: Mapping[Path, str]) -> None:
        """Let all load what this worker loads, as it has decided; returns at once. Of several calls the last counts."""
        from handler.model import split

        split.require_alone()
        split.require_devices(hardware.device, self._settings.ranks)
        require_ring(hardware, self._settings)
        require_exact(hardware, self._settings)
        decided = {"precision": hardware.precision, "device": hardware.device, "compile": "off"}
        decided["offload"] = "off" if mode == "resident" else mode
        self._loads += 1
        settings = without_keys(self._settings).model_copy(update=decided)
        self._tell(*(Load(rank, settings, dict(without)) for rank in range(1, self._settings.ranks)))

    def join(self, worker: Any, runner: InTurn) -> None:
        """Wait until all have loaded, and share what a `Loaded` does, whose `runner` draws; a StartError of theirs."""
        answers = [self._answers(self._settings.cold_start_budget_s) for _ in range(self._loads)]
        require_done(answers[-1])
        store = self._meeting.path / "store"
        decided = store, worker.hardware.attention, worker.memory.tile_above
        self._tell(*(Join(rank, *decided) for rank in range(1, self._settings.ranks)))
        enter(0, self._settings, worker, store)
        self._joined = True
        require_done(self._answers(self._settings.hang_s))
        self._runner = runner

    def bind(self, package: Path | None) -> None:
        """Let all others run what is compiled in `package`, or nothing; StartError if one cannot: then none does."""
        self._tell(Bind(package))
        try:
            require_done(self._answers(self._settings.cold_start_budget_s))
        except StartError:
            if package:
                self.bind(None)
            raise

    def watch(self, alarm: Callable[[DeviceLost], object]) -> None:
        """Call `alarm`, on another thread, as soon as a follower has ended, be anything drawn or not."""
        for follower in self._followers:
            threading.Thread(target=self._wait, args=[follower, alarm], name="follower", daemon=True).start()

    def _wait(self, follower: Child, alarm: Callable[[DeviceLost], object]) -> None:
        code = follower.process.wait()
        if not self._closed:
            alarm(self._lose(APART.format(f"has ended (exit code {code})")))

    def restore(self) -> None:
        """Of this rank alone."""
        self._runner.restore()

    def draw_some(self, recipes: Sequence[Recipe], on_steps: Sequence[OnStep]) -> list[DrawOutcome | None]:
        """As `Runner.draw_some`, by all ranks."""
        if self._lost:
            return [DeviceLost(self._lost)] * len(recipes)
        given_up = set[int]()
        try:
            self._tell(Draw(tuple(recipes)))
            told = [partial(self._step, i, on_step, given_up) for i, on_step in enumerate(on_steps)]
            outcomes = self._runner.draw_some(recipes, told)
            self._tell(Over())
            faults = [_faults(answer) for answer in self._answers(self._settings.hang_s)]
            own = [isinstance(outcome, BaseException) for outcome in outcomes]
            if any(any(of_one) for i, of_one in enumerate(zip(own, *faults, strict=True)) if i not in given_up):
                self._settle()
        except StartError as error:
            return [self._lose(error.message)] * len(recipes)
        except BaseException:  # Ctrl-C, in a notebook: the others are somewhere in this picture
            self._lose(APART.format("was left in the middle of a picture"))
            raise
        return outcomes

    def _lose(self, why: str) -> DeviceLost:
        """From now on nothing is drawn."""
        self._lost = f"{why} {REPLACED}"
        return DeviceLost(self._lost)

    def _step(self, i: int, on_step: OnStep, given_up: set[int], done: int, preview: Preview) -> None:
        """A step of picture `i`, of which the others are told."""
        try:
            on_step(done, preview)
        except BaseException:
            given_up.add(i)
            self._tell(Step(goes_on=False))
            raise
        self._tell(Step(goes_on=True))

    def _settle(self) -> None:
        """After a run that somebody did not finish: StartError unless all can draw the next one together."""
        from handler.model import split

        self._number += 1
        self._tell(InStep(self._number, SETTLE_S))
        if not split.in_step(self._number, SETTLE_S):
            raise StartError(APART.format("is not in step any more"))
        require_done(self._answers(SETTLE_S))

    def _tell(self, *orders: object) -> None:
        """One order for all, or one for each; StartError if one has ended."""
        each = orders * len(self._followers) if len(orders) == 1 else orders
        for follower, order in zip(self._followers, each, strict=True):
            try:
                follower.line.send(order)
            except OSError:
                raise _ended(follower) from None

    def _answers(self, seconds: float) -> list[Done | Failed]:
        """What each says to the first order that it has not answered; StartError of one that has ended or is silent."""
        return [_answer(follower, seconds) for follower in self._followers]

    def close(self) -> None:
        """End the followers, by force if need be, and the group."""
        self._closed = True
        for follower in self._followers:
            follower.leave()
        for follower in self._followers:
            follower.close()
        self._followers = []
        self._meeting.close()
        if self._joined:
            from handler.model import split

            self._joined = False
            split.leave()


def enter(rank: int, settings: Settings, worker: Any, store: Path) -> None:
    """Become `rank` of those that meet in `store`, and compute only its part of what a `Loaded` does.

    That is of the denoiser, of a VAE's tiles and, with KINDLING_TP_SIZE, of the text encoders.
    """
    from handler.model import split, tensor_parallel, tiles

    device = worker.hardware.device
    with split.at_home():
        split.join(rank, settings.ranks, device, store, settings.hang_s)
        try:
            split.split(worker.denoiser, settings.ulysses_degree, settings.ring_degree, device, settings.hang_s)
            tiles.share(worker.autoencoder)
            if settings.tp_size > 1:
                tensor_parallel.together(worker.encoders, settings.tp_size, settings.hang_s)
        except BaseException:
            split.leave()
            raise


def _faults(answer: Done | Failed) -> tuple[str, ...]:
    """Of each picture, why there is none; of what failed as a whole only the kind is told, for prompts are in work."""
    if isinstance(answer, Failed):
        raise StartError(APART.format(f"has failed ({answer.kind})"))
    return answer.faults


def _answer(follower: Child, seconds: float) -> Done | Failed:
    try:
        if heard(follower.line, seconds):
            answer: Done | Failed = follower.line.recv()
            return answer
    except (OSError, EOFError):
        raise _ended(follower) from None
    raise StartError(APART.format(f"has said nothing for {seconds:g} s"))


def _ended(follower: Child) -> StartError:
    return StartError(APART.format(follower.ended))
