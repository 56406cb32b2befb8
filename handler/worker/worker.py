"""The worker: boots one model once, then draws. The only holder of a model.

`boot` is the cold start, in timed phases. `generate` draws one picture. Both must run on one thread;
`engine/engine.py` sees to that. torch and diffusers are first imported inside `boot`, as a timed phase.
"""

import importlib
import logging
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any, Self

from handler.catalog.models import find
from handler.catalog.spec import ModelSpec
from handler.core.errors import BudgetExceeded, DeviceLost
from handler.core.recipe import Drawn, OnStep, Recipe
from handler.core.request import ImageRequest
from handler.core.settings import Settings
from handler.core.tracebacks import let_go
from handler.model import attention, imports, stepcache, upstream
from handler.model.compiling import artifacts
from handler.model.compiling.failures import Failures, gist
from handler.model.compiling.package import bind_blocks, compile_blocks, unbind_blocks
from handler.model.environment import environment
from handler.model.hardware import Hardware, detect, expected
from handler.model.runner import Runner, sound
from handler.model.stages import MARKS
from handler.volume.autoencoder import label, vae_source
from handler.volume.reader import opened
from handler.volume.receipts import Gains, Receipt
from handler.worker import kernel
from handler.worker.boots import BootLog, past
from handler.worker.clock import Clock, Ledger
from handler.worker.compilation import Plan
from handler.worker.memory import MemoryPlan, fit
from handler.worker.outlook import Outlook, outlook

WARM_STEPS = 4  # of the warm-up picture: later steps run what the first ones ran
log = logging.getLogger(__name__)


class Worker:
    """A loaded model. Make one with `boot`."""

    def __init__(
        self,
        spec: ModelSpec,
        hardware: Hardware,
        family: ModuleType,
        pipeline: Any,
        ledger: Ledger,
        vae: str = "",
        memory: MemoryPlan | None = None,
    ) -> None:
        self.spec, self.hardware, self.ledger, self.vae, self.package = spec, hardware, ledger, vae, ""
        self.memory = memory or fit(spec, hardware)
        self._family = family
        runner = Runner(spec, family, pipeline, self.memory.tiles, MARKS[hardware.device])
        self._pipeline, self.draw, self.draw_some = pipeline, runner.draw, runner.draw_some
        self._decoder: Any = None  # the VAE's, if it shall run compiled
        self._package: TemporaryDirectory[str] | None = None  # what was compiled here and is not published yet
        self.found = artifacts.Found("MISS", "not looked for")
        self.receipt: Receipt | None = None  # what was measured of this model on this device

    @classmethod
    def boot(cls, settings: Settings, clock: Clock | None = None) -> Self:
        """Load the model under the cold-start budget; raises a StartError, and never returns half a worker."""
        clock = clock or Clock(settings.cold_start_budget_s)
        with clock.start(settings.model), imports.thawed():
            clock.ledger.model = (spec := find(settings.model)).id
            clock.record = BootLog(settings.volume, clock.birth)
            clock.arm()
            worker = cls._load(settings, spec, clock)
            clock.finish("ready", worker.hardware.reason)
        return worker

    @classmethod
    def _load(cls, settings: Settings, spec: ModelSpec, clock: Clock) -> Self:
        with clock.phase("volume"):
            seen = outlook(settings, spec, expected(settings))
            source = seen.weights
            clock.ledger.weights = str(source.folder)
            vae = vae_source(settings.vae, settings.volume) if settings.vae else None
        with ExitStack() as files:
            reader, other = opened(files, source, vae)
            with clock.phase("import"), imports.uncollected(), imports.lean():
                families, clock.ledger.imports = importlib.import_module("handler.model.families"), upstream.unknown()
                families.quiet()
                family = importlib.import_module(spec.family)
                if spec.served_caching(settings.step_cache):
                    stepcache.library()
                seen = seen.corrected(detect(settings))
                hardware = seen.hardware
                clock.ledger.device, clock.ledger.precision = hardware.name, hardware.precision
                if seen.weights is not source:  # the device, and so the receipt, is not what it seemed
                    files.close()
                    reader, other = opened(files, seen.weights, vae)
                    clock.ledger.weights = str(seen.weights.folder)
                memory = seen.require()
                clock.ledger.memory = f"{memory.mode}: {memory.reason}"
            with clock.phase("weights"):
                pipeline = families.build(family, reader, hardware, other, memory.mode)
        worker = cls(spec, hardware, family, pipeline, clock.ledger, settings.vae, memory)
        worker.receipt, worker._decoder = seen.receipt, families.compilable(pipeline, hardware.device)
        one = partial(worker._practise, "warm-up", spec.size, spec.min_steps, clock)
        worker.hardware = kernel.settle(seen, getattr(pipeline, family.DENOISER), clock, one)
        decoder = artifacts.decoder_of(worker._decoder)
        failures = Failures(settings.compile, spec, worker.hardware, settings.volume, decoder)
        worker._compile(seen, clock, failures)
        with clock.phase("warm"):
            worker._warm(clock, failures)
        return worker

    def _compile(self, seen: Outlook, clock: Clock, failures: Failures) -> None:
        """Reuse compile artifacts, make them, or do without: as `seen` says."""
        if eager := seen.eager:
            clock.ledger.plan, clock.ledger.plan_reason = eager.mode, eager.reason
            return
        model, volume = getattr(self._pipeline, self._family.DENOISER), seen.settings.volume
        with clock.phase("artifacts"):
            if not (lost := failures.lost):
                with failures.watched():
                    self.found = artifacts.restore(model, self.spec, self.hardware, volume, self._decoder)
                failures.discredit(self.found, self.found.error)
        hit = self.found.outcome == "HIT"
        failure, boots = ("", []) if hit else (lost or failures.expected, past(volume))
        chosen = seen.compilation(self.found, clock.remaining, boots, failure)
        if chosen.compiles:
            with clock.phase("compile"):
                chosen = self._compile_now(model, clock, chosen, failures)
        elif chosen.failure:
            log.error("%s is served eagerly: %s", self.spec.id, chosen.failure)
        clock.ledger.plan, clock.ledger.plan_reason = chosen.mode, chosen.reason
        clock.ledger.compile_failure = chosen.failure
        if chosen.mode == "COMPILED":
            self.package = artifacts.name_of(model, self.spec, self.hardware, self._decoder)

    def _compile_now(self, model: Any, clock: Clock, chosen: Plan, failures: Failures) -> Plan:
        """Carry `chosen` out; if that fails for any reason but the budget, this worker is eager instead."""
        try:
            with ExitStack() as unless_done:
                made = TemporaryDirectory(prefix="kindling-", ignore_cleanup_errors=True)
                package = Path(unless_done.enter_context(made)) / artifacts.PACKAGE
                with attention.compiling(self.hardware.attention):
                    compile_blocks(model, lambda: self._sketch(clock), package, self._decoder)
                bind_blocks(model, package, self._decoder)
                unless_done.pop_all()
        except (BudgetExceeded, DeviceLost):  # those of the eager pictures that are drawn for it
            raise
        except Exception as error:
            log.exception("compiling %s failed", self.spec.id)
            reason = failures.blame(error)
            return Plan("EAGER", reason, failure=reason)
        self._package = made
        return chosen

    def _sketch(self, clock: Clock) -> None:
        """Few steps of pictures that differ in all that may vary, also in how many: what compiling needs to see.

        Neither time they have more pixels than one picture of the model's own size.
        """
        (width, height), steps = self.spec.size, self.spec.min_steps
        self._practise("warm-up", (width, height // 2), steps, clock, count=2)
        self._practise("warm-up, with a longer prompt", (width // 2, height // 4), steps, clock, count=3)

    def _warm(self, clock: Clock, failures: Failures) -> None:
        """Draw the first picture. Compiled code that cannot is taken off again: eager is slower, but it serves."""
        first = partial(self._practise, "warm-up", self.spec.size, min(self.spec.steps, WARM_STEPS), clock)
        error = self._tried(first, failures) if self.ledger.plan == "COMPILED" else None
        if self.ledger.plan != "COMPILED":
            first()
            failures.condemn(self.found, error)  # now that the model itself is known to draw

    def _tried(self, first: Callable[[], None], failures: Failures) -> Exception | None:
        """Draw by compiled code; if it fails, the worker is eager from here on. Why it did."""
        try:
            with failures.watched():
                first()
        except (BudgetExceeded, DeviceLost):
            raise
        except Exception as error:
            log.exception("the compiled blocks of %s do not work", self.spec.id)
            unbind_blocks(getattr(self._pipeline, self._family.DENOISER), self._decoder)
            reason = f"compiled code failed: {gist(error)}"
            if self._package:
                failures.note(error, reason)
            self._discard()
            self.package = ""
            self.ledger.plan, self.ledger.plan_reason, self.ledger.compile_failure = "EAGER", reason, reason
            let_go(error)  # what it holds would be there twice
            return error
        if self._package or failures.policy == "on":
            failures.forget()
        return None

    def _practise(self, prompt: str, size: tuple[int, int], steps: int, clock: Clock, count: int = 1) -> None:
        request = ImageRequest(prompt=prompt, width=size[0], height=size[1], num_inference_steps=steps, seed=0)
        for outcome in self.draw([self.spec.recipe(request)] * count, [lambda *_: clock.check()] * count):
            sound(outcome)

    @property
    def facts(self) -> dict[str, str]:
        """What besides a recipe decides a picture's pixels."""
        own = {"plan": self.ledger.plan, "vae": label(self.vae), "tiling": self.memory.tiling}
        return own | environment(self.hardware, self.package)

    @property
    def gains(self) -> Gains:
        """What drawing several pictures at once gains, by the receipt for what this worker runs."""
        measured = self.receipt and self.receipt.of(self.hardware.precision, self.ledger.plan == "COMPILED")
        return measured.batches if measured else {}

    @property
    def unpublished(self) -> bool:
        """Whether this worker has compiled something that later workers could use."""
        return self._package is not None

    def publish(self, volume: Path) -> Path:
        """Leave what was compiled on the volume; VolumeFailed if it cannot take it."""
        assert self._package
        package = Path(self._package.name) / artifacts.PACKAGE
        target = artifacts.publish(package, self.spec, self.hardware, volume, self._decoder)
        self._discard()
        return target

    def _discard(self) -> None:
        """Remove what was compiled from the local disk; bound code does not need it."""
        if self._package:
            self._package.cleanup()
        self._package = None

    @property
    def weight_bytes(self) -> int:
        """How many bytes the weights have as they are served."""
        modules = [module for module in self._pipeline.components.values() if hasattr(module, "parameters")]
        kept = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
        return sum(tensor.numel() * tensor.element_size() for tensor in kept)

    def save(self, folder: Path) -> None:
        """Write the whole pipeline, weights as they are served, in diffusers' layout."""
        quantised, plain = importlib.import_module("handler.model.loading.quant"), type(self._pipeline)
        (quantised.save if self.hardware.quantised else plain.save_pretrained)(self._pipeline, folder)

    def generate(self, recipe: Recipe, on_step: OnStep = lambda *_: None) -> Drawn:
        """Draw one picture, with the seconds of each stage; `on_step` may raise to stop, or ask for a preview."""
        return sound(*self.draw([recipe], [on_step]))
