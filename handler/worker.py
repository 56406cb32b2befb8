"""The worker: boots one model once, then draws. The only holder of a model.

`boot` is the cold start, one timed phase per line. `generate` draws one picture. Both must run on one thread;
`lane.py` sees to that. torch and diffusers are first imported inside `boot`, as a timed phase.
"""

import importlib
import itertools
import time
from collections.abc import Callable
from types import ModuleType
from typing import Any, Self

from handler.catalog import ModelSpec, find
from handler.clock import Clock, Ledger
from handler.errors import DeviceLost, KindlingError, OutOfMemory, StartError
from handler.hardware import Hardware, detect
from handler.request import ImageRequest, Pixels, Recipe
from handler.settings import Settings
from handler.volume import model_folder

STICKY = ("illegal memory access", "device-side assert", "unspecified launch failure", "ecc error", "launch timed out")
OnStep = Callable[[int], None]


class Worker:
    """A loaded model. Make one with `boot`."""

    def __init__(self, spec: ModelSpec, hardware: Hardware, family: ModuleType, pipeline: Any, ledger: Ledger) -> None:
        self.spec, self.hardware, self.ledger = spec, hardware, ledger
        self._family, self._pipeline = family, pipeline
        self._prompt: tuple[tuple[str, str], Any] | None = None

    @classmethod
    def boot(cls, settings: Settings, clock: Clock | None = None) -> Self:
        """Load the model under the cold-start budget; raises a StartError, and never returns half a worker."""
        clock = clock or Clock(settings.cold_start_budget_s)
        try:
            spec = find(settings.model)
            clock.ledger.model = spec.id
            clock.arm()
            worker = cls._load(settings, spec, clock)
        except KindlingError as error:
            clock.finish("failed", error.message)
            raise error if isinstance(error, StartError) else StartError(error.message, error.param) from None
        except Exception as error:
            clock.finish("failed", f"{type(error).__name__}: {error}")
            raise StartError(f"{settings.model} could not be loaded: {type(error).__name__}: {error}") from error
        clock.finish("ready", worker.hardware.reason)
        return worker

    @classmethod
    def _load(cls, settings: Settings, spec: ModelSpec, clock: Clock) -> Self:
        with clock.phase("volume"):
            folder = model_folder(spec, settings.volume)
        with clock.phase("import"):
            importlib.import_module("handler.families").quiet()
            family = importlib.import_module(spec.family)
            hardware = detect(settings)
        with clock.phase("weights"):
            pipeline = family.build(folder, hardware)
        worker = cls(spec, hardware, family, pipeline, clock.ledger)
        with clock.phase("warm"):
            width, height = spec.size
            first = spec.recipe(ImageRequest(prompt="warm-up", width=width, height=height, seed=0))
            worker.generate(first, on_step=lambda done: clock.check())
        return worker

    def generate(self, recipe: Recipe, on_step: OnStep = lambda done: None) -> tuple[Pixels, dict[str, float]]:
        """Draw one picture; also the seconds of each stage. `on_step(done)` may raise to stop the run."""
        marks = [("encode", time.perf_counter())]
        try:
            prompt = self._encoded(recipe)
            marks.append(("denoise", time.perf_counter()))
            rgb = self._family.run(
                self._pipeline,
                prompt,
                recipe,
                self.spec.multiple,
                on_step,
                on_decode=lambda: marks.append(("decode", time.perf_counter())),
            )
        except RuntimeError as error:
            raise self._device_error(error, recipe) from error
        marks.append(("end", time.perf_counter()))
        stages = {name: later - start for (name, start), (_, later) in itertools.pairwise(marks)}
        return Pixels(rgb, recipe), stages

    def _encoded(self, recipe: Recipe) -> Any:
        """The prompt's embeddings, kept for the next picture of the same request."""
        key = (recipe.prompt, recipe.negative_prompt)
        if self._prompt is None or self._prompt[0] != key:
            self._prompt = key, self._family.encode(self._pipeline, recipe, self.spec.text_tokens)
        return self._prompt[1]

    def _device_error(self, error: RuntimeError, recipe: Recipe) -> Exception:
        """What a torch error means for the caller and for this process."""
        import torch

        if isinstance(error, torch.OutOfMemoryError):
            torch.cuda.empty_cache()
            width, height = recipe.size
            return OutOfMemory(f"A {width}x{height} picture does not fit in this GPU's memory.", "size")
        if any(sign in str(error).lower() for sign in STICKY):
            return DeviceLost("The GPU failed; this worker is being replaced. Try again.")
        return error
