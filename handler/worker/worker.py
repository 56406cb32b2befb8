"""The worker: boots one model once, then draws as `Loaded` does. The only holder of a model.

`boot` is the cold start, in timed phases. torch and diffusers are first imported inside it, as a timed phase.
"""

import importlib
import logging
from collections.abc import Callable, Mapping
from contextlib import ExitStack, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from handler.catalog.models import find
from handler.catalog.spec import ModelSpec
from handler.core.errors import BudgetExceeded, DeviceLost, StartError
from handler.core.scratch import Scratch, sweep
from handler.core.settings import Settings
from handler.core.tracebacks import empty, let_go
from handler.model import attention, imports, stepcache, upstream
from handler.model.compiling import artifacts
from handler.model.compiling.failures import Failures, gist
from handler.model.compiling.package import bind_blocks, compile_blocks, unbind_blocks
from handler.model.faults import give_back
from handler.model.hardware import detect, expected, wake
from handler.model.tensor_parallel import Shard
from handler.volume.autoencoder import vae_source
from handler.volume.hashes import Hashing
from handler.volume.held import Held, opened
from handler.volume.manifest import Source
from handler.volume.room import require_temporary
from handler.volume.sources import NONE, spoilt
from handler.worker import kernel, touched
from handler.worker.boots import BootLog
from handler.worker.clock import Clock
from handler.worker.compilation import Plan
from handler.worker.durations import Durations
from handler.worker.loaded import Loaded
from handler.worker.outlook import Outlook, outlook
from handler.worker.preload import Preloaded, libraries
from handler.worker.sharing import require_shared, require_splittable

if TYPE_CHECKING:  # few draw with others
    from handler.worker.ranks import Ranks

WARM_STEPS = 4  # of the warm-up picture: later steps run what the first ones ran
log = logging.getLogger(__name__)


class Worker(Loaded):
    """A loaded model. Make one with `boot`; `generate` draws, and the end of a `with` gives the memory back."""

    @classmethod
    def boot(cls, settings: Settings, clock: Clock | None = None, preloaded: Preloaded | None = None) -> Self:
        """Load the model under the cold-start budget; raises a StartError, and then nothing of the model stays.

        What is `preloaded` is used once, and only if loading now would bring the same.
        """
        clock = clock or Clock(settings.cold_start_budget_s)
        touched.bring()
        try:
            with clock.start(settings.model), imports.thawed(), ExitStack() as unless_ready:
                clock.ledger.model = (spec := find(settings.model)).id
                clock.record = BootLog(settings.volume, clock.birth, clock.ending)
                clock.arm()
                held, clock.ledger.preloaded = (preloaded.weights, list(preloaded.phases)) if preloaded else (None, [])
                require_splittable(spec, settings)
                wake(settings)
                ranks = importlib.import_module("handler.worker.ranks").Ranks(settings) if settings.ranks > 1 else None
                unless_ready.enter_context(ranks or nullcontext())
                worker = cls._load(settings, spec, clock, held, ranks)
                clock.finish("ready", worker.hardware.reason)
                unless_ready.pop_all()
        except BaseException as error:
            empty(error)  # whoever keeps it, as an engine does, would keep what was loaded
            raise
        return worker

    @classmethod
    def _load(
        cls,
        settings: Settings,
        spec: ModelSpec,
        clock: Clock,
        held: Held | None,
        ranks: "Ranks | None",
        without: Mapping[Path, str] = NONE,
    ) -> Self:
        """From the best files there are; if those were baked and turn out to be damaged, without them."""
        with clock.phase("volume"):
            sweep()
            require_temporary()
            seen = outlook(settings, spec, expected(settings), without=without)
            vae = vae_source(settings.vae, settings.volume) if settings.vae else None
            clock.ledger.weights = seen.weights.told
        try:
            worker, seen = cls.built(seen, vae, clock, held, ranks, rank=0)
            with ExitStack() as unless_ready:
                unless_ready.enter_context(worker)
                worker._prepare(seen, clock, ranks)
                unless_ready.pop_all()
            return worker
        except StartError as error:
            without = {**without, **spoilt(error, seen.spec, settings.volume)}
            let_go(error)  # what it holds would be there twice
        if held:
            held.free()
        return cls._load(settings, spec, clock, None, ranks, without)

    @classmethod
    def built(
        cls, seen: Outlook, vae: Source | None, clock: Clock, held: Held | None, ranks: "Ranks | None", rank: int
    ) -> tuple[Self, Outlook]:
        """The model as it was foreseen, or corrected, as `rank` of several has it; but nothing is drawn yet."""
        settings, spec, source = seen.asked, seen.spec, seen.weights
        if ranks:
            require_shared(source, settings)
        hashing = Hashing(seen.over.given, settings.volume)
        with ExitStack() as files:
            reader, other = opened(files, source, vae, seen.over, held)
            with clock.phase("import"), imports.uncollected(), imports.lean():
                reader.fill(seen.loading)
                (families, family), clock.ledger.imports = libraries(spec), upstream.unknown()
                if spec.served_caching(settings.step_cache):
                    stepcache.library()
                hardware = (seen := seen.corrected(detect(settings))).hardware
                clock.ledger.device, clock.ledger.precision = hardware.name, hardware.precision
                if seen.weights is not source:  # the device, and so the receipt, is not what it seemed
                    files.close()
                    reader, other = opened(files, seen.weights, vae, seen.over, held)
                    clock.ledger.weights = seen.weights.told
                memory = seen.require()
                reader.fill(seen.loading)
                clock.ledger.memory = f"{memory.mode}: {memory.reason}"
                if ranks:
                    ranks.load(hardware, memory.mode, seen.without)
            with clock.phase("weights"):
                if held:
                    held.free()  # before others are read
                if seen.without:
                    give_back()
                pipeline = families.build(family, reader, hardware, other, memory.mode, Shard(rank, settings.tp_size))
                over = hashing.wait()
                clock.ledger.weights += f", under {over}" if over else ""
                if held:
                    clock.ledger.weights += ", preloaded" if held.used else ", which is not what was preloaded"
        worker = cls(spec, hardware, family, pipeline, clock.ledger, settings.vae, memory, over)
        worker._volume_key = settings.volume_key
        worker.receipt, worker._decoder = seen.receipt, families.compilable(pipeline, hardware.device)
        return worker, seen

    def _prepare(self, seen: Outlook, clock: Clock, ranks: "Ranks | None") -> None:
        """Choose the kernel of attention, share the work, compile or do without, and draw the first picture."""
        spec, asked = self.spec, seen.asked
        one = partial(self._practise, "warm-up", spec.size, spec.min_steps, clock)
        self.hardware = kernel.settle(seen, self.denoiser, clock, one)
        if ranks:
            with clock.phase("ranks"):
                ranks.join(self, self._open())
                self.lead(ranks)
        decoder = artifacts.decoder_of(self._decoder)
        failures = Failures(asked.compile, spec, self.hardware, asked.volume, decoder)
        self._compile(seen, clock, failures)
        with clock.phase("warm"):
            self._warm(clock, failures)

    def _compile(self, seen: Outlook, clock: Clock, failures: Failures) -> None:
        """Reuse compile artifacts, make them, or do without: as `seen` says."""
        if eager := seen.eager:
            clock.ledger.plan, clock.ledger.plan_reason = eager.mode, eager.reason
            return
        model, volume = self.denoiser, seen.settings.volume
        with clock.phase("artifacts"):
            if not (lost := failures.lost):
                with failures.watched():
                    self.found = artifacts.restore(
                        *(model, self.spec, self.hardware, volume, self._decoder),
                        volume_key=self._volume_key,
                        share=self._share,
                    )
                failures.discredit(self.found, self.found.error)
        hit = self.found.outcome == "HIT"
        failure, past = ("", Durations()) if hit else (lost or failures.expected, Durations.on(volume))
        chosen = seen.compilation(self.found, clock.remaining, past, failure)
        if chosen.compiles:
            with clock.phase("compile"):
                chosen = self._compile_now(model, clock, chosen, failures)
                clock.ledger.compile_failure = chosen.failure  # before the budget is looked at, which may be spent now
        elif chosen.failure or self.found.outcome == "ERROR":
            log.error("%s is served eagerly: %s", self.spec.id, chosen.failure or chosen.reason)
        clock.ledger.plan, clock.ledger.plan_reason = chosen.mode, chosen.reason
        clock.ledger.compile_failure = chosen.failure
        if chosen.mode == "COMPILED":
            self.package = artifacts.name_of(model, self.spec, self.hardware, self._decoder)

    def bind(self, package: Path | None) -> None:
        """Let what is compiled in `package` run, in this process alone; None: nothing."""
        if package:
            bind_blocks(self.denoiser, package, self._decoder)
        else:
            unbind_blocks(self.denoiser, self._decoder)

    def _share(self, package: Path | None) -> None:
        """The same in all that draw with this process, or in none: StartError if one cannot."""
        if self._ranks:
            self._ranks.bind(package)

    def _compile_now(self, model: Any, clock: Clock, chosen: Plan, failures: Failures) -> Plan:
        """Carry `chosen` out; if that fails for any reason but the budget, this worker is eager instead."""
        try:
            with ExitStack() as unless_done:
                made = unless_done.enter_context(Scratch())
                package = made.path / artifacts.PACKAGE
                with attention.compiling(self.hardware.attention):
                    compile_blocks(model, lambda: self._sketch(clock), package, self._decoder)
                self.bind(package)
                self._share(package)
                unless_done.pop_all()
        except (BudgetExceeded, DeviceLost):  # those of the eager pictures that are drawn for it
            raise
        except Exception as error:
            log.exception("compiling %s failed", self.spec.id)
            self.bind(None)
            reason = failures.blame(error)
            return Plan("EAGER", reason, failure=reason)
        self._package = made
        return chosen

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
            self.bind(None)
            self._share(None)
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
