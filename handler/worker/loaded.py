"""A model that is loaded: draws, says what decides its pixels, leaves what was compiled, and gives its memory back.

All of that must run on one thread; `engine/engine.py` sees to that.
"""

import gc
import importlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Self

from handler.catalog.spec import ModelSpec
from handler.core.errors import DeviceLost, NotReady
from handler.core.host import trim
from handler.core.recipe import Drawn, OnStep, Recipe
from handler.core.request import ImageRequest
from handler.core.scratch import Scratch
from handler.core.tracebacks import outline
from handler.model.compiling import artifacts
from handler.model.environment import environment
from handler.model.faults import give_back
from handler.model.hardware import Hardware, peak_memory
from handler.model.loading.weights import free
from handler.model.readings import readings
from handler.model.runner import DrawOutcome, InTurn, Runner, sound
from handler.model.stages import MARKS
from handler.volume.autoencoder import label
from handler.volume.receipts import Gains, Receipt
from handler.worker.clock import Clock, Ledger
from handler.worker.memory import MemoryPlan, fit

if TYPE_CHECKING:  # few draw with others
    from handler.worker.ranks import Ranks

# Before a picture of another size than the last, whose tensors fit where none of those before were. Giving memory back
# by thresholds made each picture 40 % slower on a CPU; so do those pay alone, a sixth, that differ in size. GPUs'
# allocators have ways of their own.
RESIZED: dict[str, Callable[[], object]] = {"cpu": trim, "cuda": lambda: None}
log = logging.getLogger(__name__)


class Loaded:
    """A loaded model. As a context it gives the model's memory back at its end."""

    def __init__(
        self,
        spec: ModelSpec,
        hardware: Hardware,
        family: ModuleType,
        pipeline: Any,
        ledger: Ledger,
        vae: str = "",
        memory: MemoryPlan | None = None,
        weights: str = "",
    ) -> None:
        self.weights = weights  # what files are over the model's own, if any
        spec = replace(spec, lexicon=None) if weights else spec  # people's own may have been taught other words
        self.spec, self.hardware, self.ledger, self.vae, self.package = spec, hardware, ledger, vae, ""
        self.memory = memory or fit(spec, hardware)
        self._family = family
        self._runner: InTurn | None = Runner(
            *(spec, family, pipeline, lambda size: self.memory.tiles(size), MARKS[hardware.device]),
            room=self.memory.spare_gb * 1e9,
            resized=RESIZED[hardware.device],
        )
        self._pipeline = pipeline
        self._ranks: Ranks | None = None
        self._decoder: Any = None  # the VAE's, if it shall run compiled
        self._volume_key = ""  # KINDLING_VOLUME_KEY, by which packages are sealed
        self._package: Scratch | None = None  # what was compiled here and is not published yet
        self.found = artifacts.Found("MISS", "not looked for")
        self.receipt: Receipt | None = None  # what was measured of this model on this device

    def generate(self, recipe: Recipe, on_step: OnStep = lambda *_: None) -> Drawn:
        """Draw one picture, with the seconds of each stage; `on_step` may raise to stop, or ask for a preview.

        `spec.recipe` makes a recipe of an `ImageRequest`. Raises a KindlingError that says why there is no picture.
        """
        return sound(*self.draw([recipe], [on_step]))

    def draw(self, recipes: Sequence[Recipe], on_steps: Sequence[OnStep]) -> list[DrawOutcome]:
        """Draw alike pictures, at once where that can be; each, or why there is none: `Runner.draw`."""
        return self._open().draw(recipes, on_steps)

    def _practise(self, prompt: str, size: tuple[int, int], steps: int, clock: Clock, count: int = 1) -> None:
        request = ImageRequest(prompt=prompt, width=size[0], height=size[1], num_inference_steps=steps, seed=0)
        for outcome in self.draw([self.spec.recipe(request)] * count, [lambda *_: clock.require_time()] * count):
            sound(outcome)

    def _sketch(self, clock: Clock) -> None:
        """Few steps of pictures that differ in all that may vary, also in how many: what compiling needs to see.

        Neither time they have more pixels than one picture of the model's own size.
        """
        (width, height), steps = self.spec.size, self.spec.min_steps
        self._practise("warm-up", (width, height // 2), steps, clock, count=2)
        self._practise("warm-up, with a longer prompt", (width // 2, height // 4), steps, clock, count=3)

    def lead(self, ranks: "Ranks") -> None:
        """Draw together with them from now on, and end them with this."""
        self._ranks = self._runner = ranks

    def watch(self, alarm: Callable[[DeviceLost], object]) -> None:
        """Call `alarm`, on another thread, if what it draws with is lost while nobody draws."""
        if self._ranks:
            self._ranks.watch(alarm)

    def draw_some(self, recipes: Sequence[Recipe], on_steps: Sequence[OnStep]) -> list[DrawOutcome | None]:
        """Draw, in one run, those of alike pictures that fit together; None for the others: `Runner.draw_some`."""
        return self._open().draw_some(recipes, on_steps)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        try:
            self.close()
        except Exception as more:
            if error is None:
                raise
            told = "the memory of %s could not be given back\n%s"  # `error`, which says why, goes on
            log.error(told, self.spec.id, outline(more))

    def close(self) -> None:
        """Give the model's memory back; what was compiled and not published is lost, and nothing is drawn any more."""
        try:
            self._discard()
            free(self._pipeline)
        finally:  # of a GPU that is lost nothing can be freed
            self._runner = self._pipeline = self._decoder = None
            if self._ranks:
                self._ranks.close()
            gc.collect()  # a pipeline's parts know each other
            give_back()

    @property
    def denoiser(self) -> Any:
        """The pipeline's model that takes the steps."""
        return getattr(self._pipeline, self._family.DENOISER)

    @property
    def encoders(self) -> list[Any]:
        """The pipeline's models that read prompts."""
        parts = self._pipeline.components.items()
        return [part for name, part in parts if name.startswith("text_encoder") and part is not None]

    @property
    def autoencoder(self) -> Any:
        """The pipeline's VAE."""
        return self._pipeline.vae

    @property
    def facts(self) -> dict[str, str]:
        """What besides a recipe decides a picture's pixels."""
        own = {"plan": self.ledger.plan, "vae": label(self.vae), "tiling": self.memory.tiling}
        own |= {"weights": self.weights} if self.weights else {}
        own |= {"ranks": self._ranks.told} if self._ranks else {}
        return own | environment(self.hardware, self.package)

    @property
    def gains(self) -> Gains:
        """What drawing several pictures at once gains, by the receipt for what this worker runs."""
        measured = self.receipt and self.receipt.of(self.hardware.precision, self.ledger.plan == "COMPILED")
        return measured.batches if measured else {}

    @property
    def peak_bytes(self) -> int:
        """The most bytes that this process has had at once, where it draws."""
        return peak_memory(self.hardware.device)

    def readings(self) -> dict[str, float]:
        """What this process and its device tell right now."""
        return readings(self.hardware.device)

    @property
    def unpublished(self) -> bool:
        """Whether this worker has compiled something that later workers could use."""
        return self._package is not None

    def publish(self, volume: Path) -> Path:
        """Leave what was compiled on the volume; VolumeFailed if it cannot take it."""
        self._open()
        assert self._package
        package = self._package.path / artifacts.PACKAGE
        made = package, self.spec, self.hardware, volume, self._decoder
        target = artifacts.publish(*made, volume_key=self._volume_key)
        self._discard()
        return target

    def _discard(self) -> None:
        """Remove what was compiled from the local disk; bound code does not need it."""
        if self._package:
            self._package.close()
        self._package = None

    @property
    def weight_bytes(self) -> int:
        """How many bytes the weights have as they are served; none once they are given back."""
        parts = self._pipeline.components.values() if self._pipeline is not None else ()
        modules = [module for module in parts if hasattr(module, "parameters")]
        kept = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
        return sum(tensor.numel() * tensor.element_size() for tensor in kept)

    def save(self, folder: Path) -> None:
        """Write the whole pipeline, weights as they are served, in diffusers' layout; of no request's LoRAs."""
        self._open().restore()
        quantised, plain = importlib.import_module("handler.model.loading.quant"), type(self._pipeline)
        (quantised.save if self.hardware.quantised else plain.save_pretrained)(self._pipeline, folder)

    def _open(self) -> InTurn:
        if self._runner is None:
            raise NotReady("This worker is closed; boot another one.")
        return self._runner
