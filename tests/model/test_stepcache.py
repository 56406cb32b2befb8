"""Step caching: what is asked and refused, and every row of the catalogue that allows it, on its real pipeline."""

import asyncio
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import PATIENT, ROOT, unwarmed
from test_cli import kindling

import tiny
from handler import MODELS, ImageRequest, ModelSpec, Settings, Worker
from handler.api.codec import read_parameters
from handler.api.dialects import native, openai
from handler.api.dispatch import Api
from handler.core.errors import (
    Cancelled,
    InvalidType,
    InvalidValue,
    KindlingError,
    OutOfRange,
    SettingsError,
    StartError,
    Unsupported,
)
from handler.core.stepcache import StepCache, StepCacheSetting
from handler.engine.engine import Engine
from handler.model.stepcache import LAYOUTS, caching
from handler.volume.sources import fetched_folder

ROWS = [spec for spec in MODELS.values() if spec.step_cache]
EVERY = pytest.mark.parametrize("spec", ROWS, ids=lambda spec: spec.id)
DEV = MODELS["flux-dev"]
ALWAYS = StepCache(R=1)  # random weights make steps that differ more than trained ones do
STEPS, FULL = 12, 6  # after W = 4 full steps, MC = 3 of 4 are skipped, twice: 4 + 8 / 4
SEEN = 0.3  # of 255, on average: skipping shows


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ("off", "off"),
        ("on", "on"),
        ("Fn=1,Bn=0,W=4,R=0.24,MC=3,order=1", StepCache(order=1)),
        ("R=0.00001", StepCache(R=0.00001)),
        ("R=0.2109375", StepCache(R=0.2109375)),
        ("R=0.5, W=8", StepCache(R=0.5, W=8)),
        ({}, StepCache()),
        ({"MC": 1, "R": 1}, StepCache(MC=1, R=1)),
        (StepCache(Bn=2), StepCache(Bn=2)),
    ],
)
def test_settings_and_requests_say_it_alike(said: Any, meant: StepCacheSetting) -> None:
    for parse in (openai.parse, native.parse):
        assert parse({"prompt": "x", "step_cache": said}).step_cache == meant
    if isinstance(said, str):
        assert Settings.from_env({"KINDLING_STEP_CACHE": said}).step_cache == meant
    dumped = native.parse({"prompt": "x", "step_cache": said}).model_dump(mode="json", exclude_none=True)
    assert native.parse(dumped).step_cache == meant


@pytest.mark.parametrize(
    ("said", "kind", "told"),
    [
        ("fast", InvalidValue, "should be off, on, or values such as Fn=1"),
        ("R=much", InvalidValue, "should be off, on, or values such as Fn=1"),
        (7, InvalidType, "should be off, on, or values such as Fn=1"),
        (True, InvalidType, "should be off, on, or values such as Fn=1"),
        ({"threshold": 1}, InvalidValue, "'threshold' is not one of Fn, Bn, W, R, MC, order"),
        ({"W": 4.0}, InvalidType, "W should be a whole number"),
        ({"R": "0.2"}, InvalidType, "R should be a number"),
        ({"R": 1.1}, OutOfRange, "R should be 0 to 1"),
        ({"R": float("nan")}, OutOfRange, "R should be 0 to 1"),
        ("Fn=0", OutOfRange, "Fn should be 1 to 64"),
        ({"order": 3}, OutOfRange, "order should be 0 to 2"),
    ],
)
def test_what_is_malformed_is_named(said: Any, kind: type[KindlingError], told: str) -> None:
    with pytest.raises(kind, match=f"step_cache: .*{told}") as caught:
        native.parse({"prompt": "x", "step_cache": said})
    assert caught.value.param == "step_cache"
    if isinstance(said, str):
        with pytest.raises(SettingsError, match=f"KINDLING_STEP_CACHE: .*{told}"):
            Settings.from_env({"KINDLING_STEP_CACHE": said})


@pytest.mark.parametrize("spec", [spec for spec in MODELS.values() if not spec.step_cache], ids=lambda spec: spec.id)
def test_models_that_cannot_say_why(spec: ModelSpec) -> None:
    why = (
        "works on transformers only" if spec.id in ("sd1.5", "sdxl") else f"at most {spec.max_steps} steps are too few"
    )
    for served in ("off", "on"):
        with pytest.raises(Unsupported, match=f"{spec.id} cannot have a step cache: .*{why}"):
            spec.recipe(ImageRequest(prompt="x", step_cache="on"), served=served)
    assert spec.recipe(ImageRequest(prompt="x", step_cache="off")).step_cache is None


def test_a_recipe_holds_what_is_decided() -> None:
    def decided(asked: StepCacheSetting | None, served: StepCacheSetting) -> StepCache | None:
        return DEV.recipe(ImageRequest(prompt="x", step_cache=asked), served=served).step_cache

    assert decided(None, "off") is None
    assert decided(None, "on") == DEV.step_cache
    assert decided(None, ALWAYS) == decided(ALWAYS, "on") == ALWAYS
    assert decided("on", ALWAYS) == DEV.step_cache
    assert decided("off", "on") is None
    for asked in ("on", ALWAYS):
        with pytest.raises(Unsupported, match="start it with KINDLING_STEP_CACHE=on"):
            decided(asked, "off")
    with pytest.raises(OutOfRange, match="Fn and Bn of flux-dev may add up to 57, got 70"):
        decided(StepCache(Fn=60, Bn=10), "on")


def test_a_worker_refuses_a_setting_its_model_cannot_have() -> None:
    with pytest.raises(StartError, match="KINDLING_STEP_CACHE: spark cannot have a step cache: at most 8 steps"):
        Worker.boot(PATIENT.model_copy(update={"step_cache": "on"}))


@pytest.fixture(scope="module")
def boot(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Worker]:
    """Boots a worker for a row with tiny weights, once for each setting."""
    volume = tmp_path_factory.mktemp("volume")

    @cache
    def booted(model: str, **update: Any) -> Worker:
        if not fetched_folder(MODELS[model], volume).exists():
            tiny.write(MODELS[model], volume)
        settings = {"model": model, "volume": volume, "compile": "off", "step_cache": "on"} | update
        with unwarmed():
            return Worker.boot(PATIENT.model_copy(update=settings))

    return booted


def draw(worker: Worker, step_cache: StepCacheSetting, **fields: Any) -> Any:
    asked: dict[str, Any] = {"prompt": "a red circle", "width": 128, "height": 96, "seed": 1}
    request = ImageRequest(**asked | {"num_inference_steps": STEPS, "step_cache": step_cache} | fields)
    return worker.generate(worker.spec.recipe(request, served="on"))[0].rgb.astype(int)


def counted(worker: Worker, *asked: Any, **fields: Any) -> tuple[list[int], Any]:
    """How often each repeated block ran while this was drawn, in the model's order; the picture."""
    model, calls = worker._pipeline.transformer, Counter[int]()
    repeated = [module for module in model.modules() if type(module).__name__ in model._repeated_blocks]
    hooks = [b.register_forward_hook(lambda *_, i=i: calls.update([i])) for i, b in enumerate(repeated)]
    picture = draw(worker, *asked, **fields)
    for hook in hooks:
        hook.remove()
    return [calls[i] for i in range(len(repeated))], picture


def expected_calls(worker: Worker, fresh: int, full: int) -> list[int]:
    """Of each list that is cached as one, the first block runs at every step, the others at full ones."""
    model = worker._pipeline.transformer
    layout = LAYOUTS[type(model).__name__]
    lengths = {name: len(getattr(model, name)) for name in (*layout.lists, *layout.joined)}
    passes = 1 + layout.two_passes
    return [
        passes * (fresh if i == 0 and name not in layout.joined else full)
        for name, length in lengths.items()
        for i in range(length)
    ]


@EVERY
def test_blocks_are_skipped(spec: ModelSpec, boot: Callable[..., Worker]) -> None:
    worker = boot(spec.id)
    calls, off = counted(worker, "off")
    assert calls == expected_calls(worker, STEPS, STEPS)
    other = draw(worker, "off", seed=2)
    for order in (0, 1, 2):
        calls, on = counted(worker, StepCache(R=1, order=order))
        assert calls == expected_calls(worker, STEPS, FULL)
        assert SEEN < np.abs(on - off).mean() < np.abs(other - off).mean()


@EVERY
def test_without_skipping_every_bit_is_the_same(spec: ModelSpec, boot: Callable[..., Worker]) -> None:
    """Off is exact after any use, and the cache's own path alters nothing until it skips."""
    worker, plain = boot(spec.id), boot(spec.id, step_cache="off")
    model = worker._pipeline.transformer
    expected = draw(plain, "off")
    draw(worker, "off")  # diffusers' own first picture leaves a list of hooks, with none in it
    untouched = [dict(vars(module)) for module in model.modules()]
    for never in (StepCache(W=50), StepCache(R=0), "off"):
        draw(worker, ALWAYS)
        assert (draw(worker, never) == expected).all()
    assert [dict(vars(module)) for module in model.modules()] == untouched


@EVERY
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_repeats_after_other_requests_and_a_stop(spec: ModelSpec, precision: str, boot: Callable[..., Worker]) -> None:
    worker = boot(spec.id, precision=precision)
    cached = StepCache(R=1, order=1)
    first = draw(worker, cached)
    draw(worker, ALWAYS, width=64, height=160, num_inference_steps=20, seed=5)

    def stop(done: int, *_: Any) -> None:
        if done == 9:  # of which some were skipped
            raise Cancelled("enough")

    request = ImageRequest(prompt="another", width=128, height=96, num_inference_steps=STEPS, step_cache=cached)
    with pytest.raises(Cancelled):
        worker.generate(spec.recipe(request, served="on"), stop)
    assert (draw(worker, cached) == first).all()


@pytest.mark.parametrize("spec", [spec for spec in ROWS if spec.takes_negative_prompt], ids=lambda spec: spec.id)
def test_one_pass_a_step_without_guidance(spec: ModelSpec, boot: Callable[..., Worker]) -> None:
    worker = boot(spec.id)
    passes = 1 + LAYOUTS[type(worker._pipeline.transformer).__name__].two_passes
    unguided, _ = counted(worker, ALWAYS, guidance_scale=1.0)
    assert [passes * calls for calls in unguided] == expected_calls(worker, STEPS, FULL)


def test_the_threshold_decides(boot: Callable[..., Worker]) -> None:
    worker = boot("flux-dev")
    calls = [sum(counted(worker, StepCache(R=r))[0]) for r in (0.0, 0.3, 0.5, 0.7, 1.0)]
    assert calls == sorted(calls, reverse=True)
    assert len(set(calls)) > 2


def test_no_cache_touches_nothing() -> None:
    with caching(object(), None, guided=True):
        pass


def test_a_served_picture_tells_its_cache(boot: Callable[..., Worker]) -> None:
    engine = Engine(
        PATIENT.model_copy(update={"model": "flux-dev", "step_cache": "on"}), boot=lambda *_: boot("flux-dev")
    )
    engine.start()
    engine.wait_booted()
    asked = {"prompt": "a red circle", "width": 128, "height": 96, "num_inference_steps": 5}

    async def main() -> None:
        for wanted, made in ((None, StepCache()), ("off", None), ({"R": 0.5}, StepCache(R=0.5))):
            reply = await Api(engine).call("/generate", asked | {"step_cache": wanted})
            [image] = reply.body["images"]
            told = image["parameters"]["step_cache"]
            assert (StepCache(**told) if told else None) == made

    try:
        asyncio.run(main())
    finally:
        engine.stop()


def test_a_picture_is_made_again_from_its_file(boot: Callable[..., Worker], tmp_path: Path) -> None:
    volume = str(Path(boot("flux-dev").ledger.weights).parents[2])
    environ = {"KINDLING_VOLUME": volume, "KINDLING_MODEL": "flux-dev"}
    asked = ("generate", "a red circle", "--size", "128x96", "--seed", "1", "--json", "-o")
    out = kindling(*asked, "out.png", "--step-cache", "R=1,order=1", cwd=tmp_path, **environ)
    assert out.returncode == 0, out.stderr
    assert StepCache(**json.loads(out.stdout)["step_cache"]) == StepCache(R=1, order=1)  # and nothing else was printed
    assert StepCache(**read_parameters(tmp_path / "out.png")["step_cache"]) == StepCache(R=1, order=1)
    again = kindling("generate", "--from", "out.png", "-o", "again.png", cwd=tmp_path, **environ)
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "out.png").read_bytes()


def test_only_who_caches_imports_it() -> None:
    code = (
        "import sys; from handler import Settings, Worker;"
        "Worker.boot(Settings(cold_start_budget_s=3600, compile='off')); print('cache_dit' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"
