"""A server whose model is a fake with faults, chosen by a prompt's first word. Started as `serve` is, by its path.

Every step says so on stderr, as does every upload. `hold` waits in its second step for a line on stdin; with
FAULTY_BOOT=hold so does the boot, and with FAULTY_BOOT=spend its budget is over then. FAULTY_DRAIN_S and FAULTY_EXIT_S
shorten the exit, FAULTY_HELD lessens the room for bodies, FAULTY_JOIN lets the interpreter wait for ever at its end. At
SIGUSR1 its event loop holds, which FAULTY_STUCK_S later is told.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

from fakes import CPU, FakeFamily, raises
from handler import Clock, Picture, Settings, Worker
from handler.__main__ import main
from handler.api.store import Store
from handler.catalog.models import find
from handler.catalog.spec import ModelSpec
from handler.engine import engine
from handler.model.families.schedulers import FLOW
from handler.server import room, shutdown


def hold() -> None:
    """Wait for a line on stdin."""
    print("holding", file=sys.stderr, flush=True)
    sys.stdin.readline()


def hang() -> None:
    """Never come back."""
    threading.Event().wait()


def put(self: Store, picture: Picture, body: Any, put: Callable[[Store, Picture, Any], str] = Store._put) -> str:
    """Say so, and upload."""
    print("uploading", file=sys.stderr, flush=True)
    return put(self, picture, body)


def tick() -> None:
    """Take a moment."""
    threading.Event().wait(0.02)


FAULTS: dict[str, Callable[[], None]] = {
    "oom": raises(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")),
    "lose": raises(RuntimeError("CUDA error: an illegal memory access was encountered")),
    "hang": hang,
    "hold": hold,
    "bug": raises(ZeroDivisionError("a detail that nobody should see")),
}
SPOILED: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "black": torch.zeros_like,
    "nan": lambda pixels: pixels * float("nan"),
    "noise": torch.rand_like,  # no fault, but megabytes of PNG
}


class Faulty(FakeFamily):
    """Fails in its second step, or afterwards, as the prompt says."""

    def __call__(self, prompt: str, **options: Any) -> Any:
        """As a pipeline of diffusers is called."""
        word = prompt.partition(" ")[0]

        def step(number: int) -> None:
            print(f"step {number} of {prompt}", file=sys.stderr, flush=True)
            if word == "slow":
                tick()
            if number == 2:
                FAULTS.get(word, lambda: None)()

        self.at_step = {number: lambda number=number: step(number) for number in range(1, 51)}
        picture = super().__call__(**options)
        picture.images = SPOILED.get(word, lambda pixels: pixels)(picture.images)
        return picture

    def load(self, settings: Settings, spec: ModelSpec, clock: Clock, held: object, ranks: object) -> Worker:
        """In place of `Worker._load`."""
        if boot := os.environ.get("FAULTY_BOOT"):
            hold()
            if boot == "spend":
                clock.ledger.budget_s = 0.0
                clock._watch()
        encode = lambda pipeline, recipe, tokens: {"prompt": recipe.prompt}  # noqa: E731
        family: Any = SimpleNamespace(encode=encode, SCHEDULERS=FLOW)
        return Worker(find(settings.model), CPU, family, self, clock.ledger)


if __name__ == "__main__":
    Worker._load = Faulty().load  # type: ignore[method-assign]
    shutdown.DRAIN_S = float(os.environ.get("FAULTY_DRAIN_S", shutdown.DRAIN_S))
    shutdown.STUCK_S = float(os.environ.get("FAULTY_STUCK_S", shutdown.STUCK_S))
    engine.EXIT_S = float(os.environ.get("FAULTY_EXIT_S", engine.EXIT_S))  # type: ignore[attr-defined]
    room.HELD = int(os.environ.get("FAULTY_HELD", room.HELD))
    Store._put = put  # type: ignore[method-assign]
    signal.signal(signal.SIGUSR1, lambda *_: hold())  # on the main thread, whose the loop is
    if "FAULTY_JOIN" in os.environ:
        threading.Thread(target=hang).start()
    sys.exit(main(["serve", *sys.argv[1:]]))
