"""Whole pictures on a GPU: plain diffusers and Kindling's worker, engine and API over one model of random weights."""

import asyncio
import dataclasses
import functools
import io
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from gpurun.scale import DEVICE, MODEL, PARTS, Case, NotCompiledError, Row, Run, built, synchronize
from gpurun.stages import peak_gb, told, watched
from handler import MODELS, Api, Clock, Engine, ImageRequest, ModelSpec, Settings, Worker, outlook
from handler.core.birth import Birth
from handler.model import families
from handler.model.compiling.failures import Failures
from handler.model.compiling.package import unbind_blocks
from handler.model.families import flux
from handler.model.hardware import detect
from handler.model.loading.quant import quantise
from handler.worker import kernel

PATIENT_S = 3600.0
FEW = 1  # pictures of many steps that are timed after the first


@dataclass(eq=False)
class Studio:
    """The model on the device, under one worker after another."""

    run: Run
    pipeline: Any
    precision: str = "bf16"
    numbers: Iterator[int] = dataclasses.field(default_factory=itertools.count)

    def spec(self, **differing: Any) -> ModelSpec:
        """The catalogue's row at this run's scale."""
        scaled = {"size": self.run.scale.size, "text_tokens": self.run.scale.tokens}
        return dataclasses.replace(MODELS[MODEL], **{**scaled, **differing})

    def unbound(self) -> Any:
        """Take compiled code off all parts; the VAE's decoder, where it could be compiled."""
        decoder = families.compilable(self.pipeline, DEVICE)
        unbind_blocks(self.pipeline.transformer, decoder)
        return decoder

    def quantise(self, precision: str) -> None:
        """Round the weights in place, as a worker does that finds none baked."""
        self.unbound()
        for name in ("transformer", "text_encoder", "text_encoder_2"):
            quantise(getattr(self.pipeline, name), precision, DEVICE)
        self.precision = precision

    @contextmanager
    def engine(self, policy: str, spec: ModelSpec, volume: Path | None = None) -> Iterator[Engine]:
        """An engine whose worker was booted over this pipeline; `policy` is KINDLING_COMPILE.

        What it compiles it leaves on `volume`: one that nobody needs, if none is given.
        """
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as empty:
            given: dict[str, Any] = {"precision": self.precision, "compile": policy, "volume": volume or Path(empty)}
            settings = Settings(model=MODEL, cold_start_budget_s=PATIENT_S, offload="off", **given)
            clock = Clock(PATIENT_S, birth=Birth.anew(), publish=lambda ledger: None)
            engine = Engine(settings, clock, boot=partial(self._boot, spec))
            engine.start()
            try:
                engine.wait_booted()
                yield engine
            finally:
                engine.stop()

    def _boot(self, spec: ModelSpec, settings: Settings, clock: Clock) -> Worker:
        """What `Worker.boot` does once the weights are there."""
        seen = outlook(settings, spec, detect(settings))
        worker = Worker(spec, seen.hardware, flux, self.pipeline, clock.ledger)
        worker._decoder = self.unbound()
        one = partial(worker._practise, "warm-up", spec.size, spec.min_steps, clock)
        worker.hardware = kernel.settle(seen, self.pipeline.transformer, clock, one)
        failures = Failures(settings.compile, spec, worker.hardware, settings.volume)
        worker._compile(seen, clock, failures)
        with clock.phase("warm"):
            worker._warm(clock, failures)
        clock.finish("ready")
        return worker

    def pictures(self, draw: Callable[[ImageRequest], Row], steps: int, count: int, size: tuple[int, int]) -> Row:
        """Medians over `count` pictures, after one that is not counted; every prompt is another."""
        rows = [self._picture(draw, steps, size) for _ in range(count + 1)][1:]
        return {name: statistics.median(row[name] for row in rows) for name in rows[0]} | {"peak_gb": peak_gb()}

    def _picture(self, draw: Callable[[ImageRequest], Row], steps: int, size: tuple[int, int]) -> Row:
        prompt = f"a red circle on a blue background, picture {next(self.numbers):04}"
        request = ImageRequest(prompt=prompt, width=size[0], height=size[1], num_inference_steps=steps, seed=1)
        with watched(self.pipeline) as stages:
            synchronize()
            begun = time.perf_counter()
            row = draw(request)
            row["picture_ms"] = 1000 * (time.perf_counter() - begun)
        return row | told(stages)


@functools.cache
def studio(run: Run) -> Studio:
    """The run's own, built when first asked for: as a worker builds it, but for where the weights come from."""
    families.quiet()
    components = {name: built(run.scale, name) for name in PARTS}
    hardware = detect(Settings(precision="bf16"))
    with mock.patch.object(families, "load_components", return_value=components):
        return Studio(run, families.build(flux, None, hardware))


def by_api(engine: Engine, request: ImageRequest) -> Row:
    """A picture as the server makes it, from the request to the PNG."""
    [picture] = asyncio.run(Api(engine).draw(request))
    return {"png_ms": 1000 * picture.stages["serialize"]}


def by_worker(worker: Worker, count: int, request: ImageRequest) -> Row:
    """Some pictures at once, without the PNGs."""
    for outcome in worker.draw([worker.spec.recipe(request)] * count, [lambda *_: None] * count):
        if isinstance(outcome, Exception):
            raise outcome
    return {}


def by_diffusers(pipeline: Any, spec: ModelSpec, request: ImageRequest) -> Row:
    """A picture as a careful user of diffusers would make it."""
    recipe = spec.recipe(request)
    image = pipeline(
        prompt=recipe.prompt, width=recipe.size[0], height=recipe.size[1], num_inference_steps=recipe.steps,
        guidance_scale=recipe.guidance, max_sequence_length=spec.text_tokens,
        generator=torch.Generator("cpu").manual_seed(recipe.seed),
    ).images[0]  # fmt: skip
    begun = time.perf_counter()
    image.save(io.BytesIO(), "PNG")
    return {"png_ms": 1000 * (time.perf_counter() - begun)}


def eager(run: Run) -> Iterator[Case]:
    """Plain diffusers and Kindling over the same bf16 weights, nothing compiled; the VAE as Kindling lays it out."""
    room, spec = studio(run), studio(run).spec()
    size, count = run.scale.size, run.scale.pictures
    plain = type(room.pipeline)(**room.pipeline.components)
    plain.set_progress_bar_config(disable=True)

    def diffusers() -> Row:
        unsettled = mock.patch.multiple(families.constants, _telling={}, _runs_on={})  # it walks its modules, as ever
        with mock.patch.object(room, "pipeline", plain), unsettled:
            return room.pictures(partial(by_diffusers, plain, spec), spec.steps, count, size)

    yield "plain diffusers bf16", diffusers
    with room.engine("off", spec) as engine:
        yield "Kindling bf16 eager", lambda: room.pictures(partial(by_api, engine), spec.steps, count, size)


def compiled(run: Run) -> Iterator[Case]:
    """Kindling compiled, in bf16."""
    room, spec = studio(run), studio(run).spec()
    with room.engine("on", spec) as engine:
        yield "Kindling bf16 compiled: its start", partial(started, engine)
        if ready(engine):
            draw = partial(by_api, engine)
            yield "Kindling bf16 compiled", lambda: room.pictures(draw, spec.steps, run.scale.pictures, run.scale.size)


def quantised(run: Run) -> Iterator[Case]:
    """Kindling compiled in fp8: alone, at 512x512, there four at once, in many steps; and the same eager."""
    room, scale = _in_fp8(run), run.scale
    spec, name = room.spec(), "Kindling fp8 compiled"
    with room.engine("on", spec) as engine:
        yield f"{name}: its start", partial(started, engine)
        if not (worker := ready(engine)):
            return
        yield name, lambda: room.pictures(partial(by_api, engine), spec.steps, scale.pictures, scale.size)
        for count in (1, 4):
            draw = partial(by_worker, worker, count)
            yield (
                f"{name}, {count} of {'x'.join(map(str, scale.small))}",
                lambda draw=draw: room.pictures(draw, spec.steps, scale.pictures, scale.small),
            )
        long = partial(
            by_worker, Worker(_dev(room, scale.tokens), worker.hardware, flux, room.pipeline, engine.ledger), 1
        )
        yield f"{name}, {scale.dev_steps} steps", lambda: room.pictures(long, scale.dev_steps, FEW, scale.size)
        room.unbound()
        yield "Kindling fp8 eager", lambda: room.pictures(partial(by_worker, worker, 1), spec.steps, 1, scale.size)


def dev(run: Run) -> Iterator[Case]:
    """As FLUX.1 [dev] is drawn: 28 steps, 512 tokens of text, compiled in fp8."""
    room, scale = _in_fp8(run), run.scale
    name = f"Kindling fp8 compiled, {scale.dev_steps} steps, {scale.dev_tokens} tokens"
    with room.engine("on", _dev(room, scale.dev_tokens)) as engine:
        yield f"{name}: its start", partial(started, engine)
        if worker := ready(engine):
            draw = partial(by_worker, worker, 1)
            yield name, lambda: room.pictures(draw, scale.dev_steps, FEW, scale.size)


def _dev(room: Studio, tokens: int) -> ModelSpec:
    return room.spec(steps=room.run.scale.dev_steps, max_steps=50, text_tokens=tokens)


def _in_fp8(run: Run) -> Studio:
    room = studio(run)
    if room.precision != "fp8":
        room.quantise("fp8")
    return room


def started(engine: Engine) -> Row:
    """How a worker that was to compile started, phase by phase; NotCompiledError if it serves eagerly."""
    ledger = engine.ledger
    if ledger.plan != "COMPILED":
        raise NotCompiledError(ledger.plan_reason)
    phases = {f"{phase.name}_s": phase.seconds for phase in ledger.phases}
    return {**phases, "plan": ledger.decision, "attention": ledger.attention}


def ready(engine: Engine) -> Worker | None:
    """The engine's worker, if it is compiled: what is not gets no figures under that name."""
    return engine.worker if engine.ledger.plan == "COMPILED" else None
