"""A family without a model: satisfies the contract of `handler.families` and has switchable faults.

It runs under the real `Worker` and `Lane`, so everything but the drawing is the product's own code.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np

from handler import Clock, Recipe, Settings, Worker
from handler.catalog import find
from handler.hardware import Hardware

CPU = Hardware("cpu", "fake", "fp32", "a fake")


@dataclass
class FakeFamily:
    """Paints the seed. `at_step[i]` is called before step i ends; `gate`, if set, must open before each step."""

    at_step: dict[int, Callable[[], None]] = field(default_factory=dict)
    gate: threading.Event | None = None
    entered: threading.Event = field(default_factory=threading.Event)
    steps_run: int = 0
    drawn: list[int] = field(default_factory=list)

    def encode(self, pipeline: Any, recipe: Recipe, tokens: int) -> str:
        return recipe.prompt

    def run(
        self,
        pipeline: Any,
        prompt: str,
        recipe: Recipe,
        multiple: int,
        on_step: Callable[[int], None],
        on_decode: Callable[[], None],
    ) -> Any:
        for step in range(1, recipe.steps + 1):
            self.entered.set()
            if self.gate:
                assert self.gate.wait(30)
            self.at_step.get(step, lambda: None)()
            self.steps_run += 1
            on_step(step)
        on_decode()
        self.drawn.append(recipe.seed)
        width, height = recipe.size
        return np.full((height, width, 3), recipe.seed % 255 + 1, np.uint8)

    def boot(self, settings: Settings, clock: Clock) -> Worker:
        """In place of `Worker.boot`."""
        clock.finish("ready")
        namespace: Any = SimpleNamespace(encode=self.encode, run=self.run)
        return Worker(find(settings.model), CPU, namespace, None, clock.ledger)


def raises(error: BaseException) -> Callable[[], None]:
    """A step that fails with `error`."""

    def fail() -> None:
        raise error

    return fail
