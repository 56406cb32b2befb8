"""A pipeline without a model, and its family: what diffusers' pipelines look like from here, with switchable faults.

It runs under the real `Worker` and `Engine`, so everything but the drawing is the product's own code.
"""

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from handler import Clock, Engine, ImageRequest, Settings, Worker
from handler.catalog.models import find
from handler.model.families.schedulers import EPSILON, FLOW
from handler.model.hardware import Hardware

CPU = Hardware("cpu", "fake", "fp32", "a fake")
RECIPE = find("spark").recipe(ImageRequest(prompt="x", seed=1))


@dataclass
class FakeFamily:
    """Paints the seed. `at_step[i]` is called before step i ends; `gate`, if set, must open before each step."""

    at_step: dict[int, Callable[[], None]] = field(default_factory=dict)
    gate: threading.Event | None = None
    entered: threading.Event = field(default_factory=threading.Event)
    steps_run: int = 0
    drawn: list[int] = field(default_factory=list)
    batches: list[int] = field(default_factory=list)
    broken: set[int] = field(default_factory=set)
    scheduler: Any = field(default_factory=FlowMatchEulerDiscreteScheduler)
    num_timesteps: int = 0
    vae: Any = field(default_factory=type("Vae", (), {"encode": None, "dtype": None, "to": lambda self, dtype: self}))
    vae_scale_factor: int = 8

    def __call__(
        self,
        width: int,
        height: int,
        num_inference_steps: int,
        generator: torch.Generator | list[torch.Generator],
        callback_on_step_end: Callable[..., Any],
        output_type: str,
    ) -> Any:
        """As a pipeline of diffusers is called."""
        self.num_timesteps = num_inference_steps
        self.scheduler.set_timesteps(num_inference_steps)
        generators = generator if isinstance(generator, list) else [generator]
        self.batches.append(len(generators))
        latents = self.prepare_latents(len(generators), height, width, torch.float32, "cpu", generators)
        for step, timestep in enumerate(self.scheduler.timesteps):
            self.entered.set()
            if self.gate:
                assert self.gate.wait(120)
            self.at_step.get(step + 1, lambda: None)()
            self.steps_run += 1
            latents, *_ = self.scheduler.step(latents, timestep, latents, return_dict=False)
            callback_on_step_end(self, step, timestep, {"latents": latents})
        seeds = [each.initial_seed() for each in generators]
        self.drawn += seeds
        return SimpleNamespace(
            images=torch.stack([torch.full((3, height, width), self.colour(seed)) for seed in seeds])
        )

    def prepare_latents(
        self, batch_size: int, height: int, width: int, dtype: torch.dtype, device: str, generator: Any
    ) -> torch.Tensor:
        """As pipelines of diffusers have it, whose noise is nothing."""
        return torch.zeros(batch_size, 4, height // 8, width // 8, dtype=dtype)

    def colour(self, seed: int) -> float:
        return math.nan if seed in self.broken else (seed % 255 + 1) / 255

    def boot(self, settings: Settings, clock: Clock) -> Worker:
        """In place of `Worker.boot`."""
        clock.finish("ready")
        spec = find(settings.model)
        flows = "flow-match-euler" in spec.schedulers
        family: Any = SimpleNamespace(encode=lambda *_: {}, SCHEDULERS=FLOW if flows else EPSILON)
        return Worker(spec, CPU, family, self, clock.ledger)

    @contextmanager
    def engine(self, **settings: Any) -> Iterator[Engine]:
        """An engine that is ready to draw with this; in the end it is stopped, and what is held let go."""
        engine = Engine(Settings(**settings), boot=self.boot)
        engine.start()
        engine.wait_booted()
        yield engine
        if self.gate:
            self.gate.set()
        engine.stop()


class Editor(FakeFamily):
    """A fake that takes images too; it paints the seed all the same."""

    config: ClassVar[dict[str, Any]] = {}
    components: ClassVar[dict[str, Any]] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        images = ("image", "strength", "mask_image", "image_reference")
        return super().__call__(*args, **{name: value for name, value in kwargs.items() if name not in images})

    def set_progress_bar_config(self, disable: bool) -> None:
        """As diffusers' pipelines have it."""

    def boot(self, settings: Settings, clock: Clock) -> Worker:
        """With what edits need."""
        worker = super().boot(settings, clock)
        worker._family.INPAINT = worker._family.IMAGE_TO_IMAGE = Editor
        worker._family.MASK_CELL = 1
        return worker


def raises(error: BaseException) -> Callable[[], None]:
    """A step that fails with `error`."""

    def fail() -> None:
        raise error

    return fail
