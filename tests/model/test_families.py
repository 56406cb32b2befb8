"""Every row of the catalogue, through the worker, on its real pipeline with small random weights.

A new row is tested by existing: it needs a builder in tiny.py if its family is new, and nothing here.
"""

import argparse
import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import test_stepcache as caches
import torch
from conftest import PATIENT, ROOT, unwarmed

import tiny
from handler import MODELS, Api, Engine, ImageRequest, ModelSpec, Worker
from handler.api import codec
from handler.api.dialects import edits, openai
from handler.cli import generate
from handler.core.errors import Cancelled, StartError
from handler.core.recipe import Reference
from handler.core.stepcache import StepCache
from handler.model.compiling import package
from handler.model.families import schedulers
from handler.server import multipart
from handler.volume.sources import fetched_folder

ROWS = [spec for spec in MODELS.values() if not spec.embedded]
EVERY = pytest.mark.parametrize("spec", ROWS, ids=lambda spec: spec.id)
GUIDED = [spec for spec in ROWS if spec.takes_negative_prompt]
EDITING = [spec for spec in ROWS if spec.max_images]
PAIRS = [pytest.param(spec, name, id=f"{spec.id}-{name}") for spec in ROWS for name in spec.schedulers]


@pytest.fixture(scope="module")
def boot(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Worker]:
    """Boots a worker for a row, once for each precision, from tiny weights that lie where `fetch` would put them."""
    volume = tmp_path_factory.mktemp("volume")

    @cache
    def booted(model: str, precision: str = "fp32") -> Worker:
        if not fetched_folder(MODELS[model], volume).exists():
            tiny.write(MODELS[model], volume)
        update = {"model": model, "volume": volume, "precision": precision, "compile": "off"}
        with unwarmed():
            return Worker.boot(PATIENT.model_copy(update=update))

    return booted


def draw(worker: Worker, images: tuple[Reference, ...] = (), **fields: Any) -> Any:
    asked: dict[str, Any] = {"prompt": "a red circle", "width": 128, "height": 96, "seed": 1, "num_inference_steps": 2}
    asked |= {"num_inference_steps": min(2, worker.spec.max_steps)} | fields
    request = ImageRequest(**asked, images=tuple(b"x" for _ in images))
    return worker.generate(worker.spec.recipe(request, images))[0].rgb.astype(int)


def differ(one: Any, other: Any) -> bool:
    return bool(np.abs(one - other).mean() > 0.5)


@EVERY
def test_draws_what_is_asked(spec: ModelSpec, boot: Callable[..., Worker]) -> None:
    worker = boot(spec.id)
    first = draw(worker)
    assert first.shape == (96, 128, 3)
    assert draw(worker, width=100, height=72).shape == (72, 100, 3)
    assert differ(draw(worker, seed=2), first)
    assert differ(draw(worker, prompt="three yellow stars on a purple background"), first)
    assert (draw(worker) == first).all()


# Each kind of option once; benchmarks/differential.py has all.
SHORT = ["text", "mask: holes of a pixel", "images: of all shapes"]
NEGATIVES = ["negative prompt: none", "negative prompt: empty"]
LONGER = {
    "spark": ["text: off the grid", "image: strength 0.5", "mask: off the grid"],
    "sd3.5-large": ["mask: half open"],
    "sd1.5": [*NEGATIVES, "image: strength 0.5"],
    "sdxl": [*NEGATIVES, "image: transparent"],
    "flux2-klein": ["mask: an image to look at"],
    "qwen-image": NEGATIVES,
}


@pytest.fixture
def differential(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import differential

    return differential


@contextmanager
def serving(worker: Worker) -> Iterator[Engine]:
    engine = Engine(PATIENT.model_copy(update={"model": worker.spec.id}), boot=lambda *_: worker)
    engine.start()
    engine.wait_booted()
    try:
        yield engine
    finally:
        engine.stop()


@EVERY
def test_pictures_are_those_of_plain_diffusers(spec: ModelSpec, boot: Callable[..., Worker], differential: Any) -> None:
    """Bit for bit: encoding apart, loading by ourselves and swapping the scheduler change nothing."""
    folder, names = Path(boot(spec.id).ledger.weights), [*SHORT, *LONGER.get(spec.id, [])]
    wanted = [option for option in differential.options(spec) if option.name in names]
    with serving(boot(spec.id)) as engine:
        for option, (_, theirs) in zip(wanted, differential.plainly(spec, folder, "fp32", wanted), strict=True):
            ours = differential.answered(engine, spec, option)
            assert differential.differing(ours, theirs) == (0, 0), option.name


def test_the_comparison_tells_pictures_apart(differential: Any) -> None:
    one = np.zeros((2, 2, 3), np.uint8)
    other = one.copy()
    other[1, 1] = 0, 3, 255
    assert differential.differing([one, other], [one, one]) == (2, 255)


@EVERY
def test_bf16_repeats_and_stays_near(spec: ModelSpec, boot: Callable[..., Worker]) -> None:
    worker, exact = boot(spec.id, "bf16"), boot(spec.id)
    assert (draw(worker) == draw(worker)).all()
    assert np.abs(draw(worker) - draw(exact)).mean() < np.abs(draw(exact, seed=2) - draw(exact)).mean() / 2


@EVERY
def test_cancelling_midway_leaves_no_trace(spec: ModelSpec, boot: Callable[..., Worker]) -> None:
    worker = boot(spec.id)
    before = draw(worker)

    def stop(*_: object) -> None:
        raise Cancelled("enough")

    recipe = spec.recipe(ImageRequest(prompt="a red circle", width=128, height=96))
    with pytest.raises(Cancelled):
        worker.generate(recipe, stop)
    assert (draw(worker) == before).all()


@pytest.mark.parametrize("spec", GUIDED, ids=lambda spec: spec.id)
def test_guidance_and_the_negative_prompt_matter(spec: ModelSpec, boot: Callable[..., Worker]) -> None:
    worker = boot(spec.id)
    first = draw(worker)
    assert differ(draw(worker, guidance_scale=1.0), first)
    assert differ(draw(worker, negative_prompt="three yellow stars"), first)


@pytest.mark.parametrize("spec", GUIDED, ids=lambda spec: spec.id)
def test_an_empty_negative_prompt_is_what_it_is_in_plain_diffusers(
    spec: ModelSpec, boot: Callable[[str], Worker]
) -> None:
    """Of SDXL, none is zeros; Qwen-Image, whose pipeline without one takes no guidance, gets its makers' space."""
    worker = boot(spec.id)
    none, empty, space = (draw(worker, **fields) for fields in ({}, {"negative_prompt": ""}, {"negative_prompt": " "}))
    assert (none == empty).all() == (spec.id not in ("sdxl", "qwen-image"))
    assert (none == space).all() == (spec.id != "sdxl") or spec.id == "sd3.5-large"


def test_pictures_with_and_without_negative_prompts_are_drawn_together(boot: Callable[[str], Worker]) -> None:
    worker = boot("sdxl")
    request = ImageRequest(prompt="a ring", seed=1, width=128, height=96, num_inference_steps=2)
    recipes = [
        worker.spec.recipe(request.model_copy(update={"negative_prompt": negative}))
        for negative in (None, "", "blurry", None)
    ]
    outcomes = worker.draw(recipes, [lambda *_: None] * 4)
    for recipe, outcome in zip(recipes, outcomes, strict=True):
        assert not isinstance(outcome, Exception)
        assert outcome[0].batch == 4
        assert np.abs(outcome[0].rgb.astype(int) - worker.generate(recipe)[0].rgb).max() <= 1


SDXL = MODELS["sdxl"]


@pytest.mark.parametrize(
    ("spec", "fields", "negative"),
    [
        (SDXL, {}, None),
        (SDXL, {"negative_prompt": None}, None),
        (SDXL, {"negative_prompt": ""}, ""),
        (SDXL, {"negative_prompt": "", "guidance_scale": 1.0}, None),
        (SDXL, {"negative_prompt": "blur"}, "blur"),
        (MODELS["spark"], {"negative_prompt": ""}, None),
        (MODELS["flux-dev"], {"negative_prompt": ""}, None),
    ],
)
@pytest.mark.parametrize("parse", [ImageRequest.parse, openai.parse], ids=["native", "openai"])
def test_an_empty_negative_prompt_is_not_none(spec: ModelSpec, fields: Any, negative: str | None, parse: Any) -> None:
    recipe = spec.recipe(parse({"prompt": "x"} | fields))
    assert recipe.negative_prompt == negative
    assert recipe.described()["negative_prompt"] == negative
    of_edit = edits.parse({"prompt": "x", "image": b"x"} | fields).negative_prompt
    assert of_edit == fields.get("negative_prompt")
    assert multipart.typed("negative_prompt", "") == ""


@pytest.mark.parametrize("negative", [None, "", "blur"])
def test_a_picture_says_it_and_is_drawn_again(
    negative: str | None, boot: Callable[[str], Worker], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = boot("sdxl")
    fields = {"prompt": "x", "seed": 1, "width": 64, "height": 64, "negative_prompt": negative}
    with serving(worker) as engine:
        told = asyncio.run(Api(engine).call("/generate", fields)).body["images"][0]["parameters"]
    assert told["negative_prompt"] == negative
    recipe = worker.spec.recipe(ImageRequest.parse(fields))
    pixels, _ = worker.generate(recipe)
    made, again = tmp_path / "made.png", tmp_path / "again.png"
    made.write_bytes(codec.encode(pixels.rgb, "png", 100, codec.parameters_of(recipe, worker.facts, "0.1.0")))
    monkeypatch.setattr(generate, "booted", lambda *_: worker)
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", action="store_true")
    generate.add_arguments(parser)
    assert generate.run(parser.parse_args(["--from", str(made), "-o", str(again)])) == 0
    assert again.read_bytes() == made.read_bytes()


@pytest.mark.parametrize("spec", EDITING, ids=lambda spec: spec.id)
def test_reference_images_matter_one_by_one(spec: ModelSpec, boot: Callable[..., Worker]) -> None:
    worker, rng = boot(spec.id), np.random.default_rng(0)
    one, two = (Reference(rng.integers(0, 256, (64, 96, 3), np.uint8), str(i)) for i in range(2))
    pictures = [draw(worker), draw(worker, (one,)), draw(worker, (two,)), draw(worker, (one, two))]
    assert all(differ(pictures[i], pictures[j]) for i in range(4) for j in range(i))
    assert draw(worker, (one,), width=None, height=None).shape == (64, 96, 3)
    assert draw(worker, (one,) * spec.max_images).shape == (96, 128, 3)


TARGET = 0.5  # the perfect predictor's picture: latents that are this everywhere


def _velocity(x: torch.Tensor, sigma: Any) -> torch.Tensor:
    """What a perfect flow model predicts: noise minus picture, where x = (1 - sigma) picture + sigma noise."""
    return (x - TARGET) / sigma


def packed(hidden_states: torch.Tensor, timestep: torch.Tensor, **_: Any) -> Any:
    return (_velocity(hidden_states, timestep.flatten()[0]),)


def _sd3(hidden_states: torch.Tensor, timestep: torch.Tensor, **_: Any) -> Any:
    return (_velocity(hidden_states, timestep.flatten()[0] / 1000),)


def _z_image(x: list[torch.Tensor], timestep: torch.Tensor, *_: Any, **__: Any) -> Any:
    return ([-_velocity(latents, 1 - timestep.flatten()[0]) for latents in x],)


def _epsilon(sample: torch.Tensor, timestep: torch.Tensor, **_: Any) -> Any:
    """What a perfect epsilon model predicts: the noise in sqrt(a) picture + sqrt(1 - a) noise, SDXL's a at timestep."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    kept = np.interp(float(timestep), np.arange(1000), torch.cumprod(1 - betas, 0).numpy())
    return ((sample - kept**0.5 * TARGET) / (1 - kept) ** 0.5,)


# SD1.5's own configuration (set_alpha_to_one: false) lets DDIM end at the least noise of training, 0.029 of this size.
NOISE_LEFT = {("sd1.5", "ddim"): 0.05 + 4 * 0.029}
PERFECT: dict[str, Callable[..., Any]] = {"sd3": _sd3, "sd15": _epsilon, "sdxl": _epsilon, "z_image": _z_image}


@pytest.mark.parametrize(("spec", "name"), PAIRS)
def test_every_allowed_scheduler_solves_what_the_model_predicts(
    spec: ModelSpec, name: str, boot: Callable[..., Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given a perfect predictor, a scheduler that suits the model ends at the picture, whatever the noise."""
    worker, ends = boot(spec.id), []
    make = schedulers.make

    def watched(*given: Any) -> Any:
        scheduler = make(*given)
        step = scheduler.step

        def watch(*arguments: Any, **options: Any) -> Any:
            found = step(*arguments, **options)
            ends.append(found[0])
            return found

        scheduler.step = watch
        return scheduler

    monkeypatch.setattr(schedulers, "make", watched)
    perfect = PERFECT.get(spec.family.rpartition(".")[2], packed)
    monkeypatch.setattr(getattr(worker._pipeline, worker._family.DENOISER), "forward", perfect)
    draw(worker, scheduler=name, num_inference_steps=min(spec.steps, 8))
    assert (ends[-1] - TARGET).abs().max() < NOISE_LEFT.get((spec.id, name), 0.05)


# One of those whose blocks are compiled to the same code and called in the same ways, the one that is asked for most.
COMPILED = ("flux-dev", "chroma", "sd3.5-large", "sd1.5", "sdxl", "flux2-klein", "z-image-turbo", "qwen-image")
OFTEN = ("flux-dev", "sd1.5")  # a transformer and a U-Net


@pytest.fixture(scope="module")
def compiled(boot: Callable[..., Worker], compiler: None) -> Callable[[str], Worker]:
    """Boots a worker that compiles, once for each model."""

    @cache
    def booted(model: str) -> Worker:
        volume, caching = Path(boot(model).ledger.weights).parents[2], "on" if MODELS[model].step_cache else "off"
        update = {"model": model, "volume": volume, "compile": "on", "step_cache": caching}
        with unwarmed():
            worker = Worker.boot(PATIENT.model_copy(update=update))
        assert worker.ledger.plan == "COMPILED", worker.ledger.plan_reason
        return worker

    return booted


@pytest.fixture
def fits(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each call of a compiled block, whether its code took it."""
    seen, fitting = [], package._fits
    monkeypatch.setattr(package, "_fits", lambda *given: seen.append(fitting(*given)) or seen[-1])
    return seen


@EVERY
def test_each_has_blocks_that_are_compiled_below(spec: ModelSpec, boot: Callable[..., Worker]) -> None:
    def kinds(worker: Worker) -> list[str]:
        return package.kinds_of(getattr(worker._pipeline, worker._family.DENOISER))

    assert kinds(boot(spec.id)) in [kinds(boot(model)) for model in COMPILED]


@pytest.mark.parametrize(
    "model", [model if model in OFTEN else pytest.param(model, marks=pytest.mark.judge) for model in COMPILED]
)
def test_compiles_and_draws_the_same(
    model: str, boot: Callable[..., Worker], compiled: Callable[[str], Worker], fits: list[bool], tmp_path: Path
) -> None:
    """One package serves other sizes, prompts, edits, with and without guidance, and several at once.

    Nothing falls back to eager code.
    """
    spec, eager, worker = MODELS[model], boot(model), compiled(model)
    assert worker.publish(tmp_path).is_dir()
    image = Reference(np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8), "")
    asked: list[dict[str, Any]] = [
        {},
        {"width": 64, "height": 160},
        {"prompt": "three yellow stars on a purple background"},
    ]
    if spec.takes_negative_prompt:
        asked.append({"guidance_scale": 1.0})  # as models without guidance are drawn
    for fields in [*asked, {"images": (image,)}]:
        assert np.abs(draw(worker, **fields) - draw(eager, **fields)).max() <= 1
    several = [spec.recipe(ImageRequest(prompt="a red circle", width=96, height=64, seed=seed)) for seed in range(3)]
    for recipe, outcome in zip(several, worker.draw(several, [lambda *_: None] * 3), strict=True):
        assert not isinstance(outcome, Exception)
        assert np.abs(outcome[0].rgb.astype(int) - eager.generate(recipe)[0].rgb).max() <= 1
    assert fits
    assert all(fits)


@pytest.mark.parametrize("model", ["flux-dev", pytest.param("chroma", marks=pytest.mark.judge)])
# One list made of two; blocks told their place.
def test_a_step_cache_skips_compiled_blocks_as_it_does_eager_ones(
    model: str, boot: Callable[..., Worker], compiled: Callable[[str], Worker], fits: list[bool]
) -> None:
    worker, eager = compiled(model), boot(model)
    for cached in (caches.ALWAYS, StepCache(R=1, order=1), "off"):
        fits.clear()
        assert np.abs(caches.draw(worker, cached) - caches.draw(eager, cached)).max() <= 1
        full = caches.STEPS if cached == "off" else caches.FULL
        assert len(fits) == sum(caches.expected_calls(worker, caches.STEPS, full))
        assert all(fits)


@pytest.mark.parametrize(
    ("model", "kind", "channels"), [("flux-dev", "AutoencoderTiny", 4), ("flux2-dev", "Flux2TinyAutoEncoder", 8)]
)
def test_another_autoencoder_decodes(
    model: str, kind: str, channels: int, boot: Callable[..., Worker], tmp_path: Path
) -> None:
    own = boot(model)
    name = "_small-2.0"  # such as Python has no names
    tiny.autoencoder(kind, channels).save_pretrained(tmp_path / name)
    update = {"model": model, "volume": Path(own.ledger.weights).parents[2], "vae": str(tmp_path / name)}
    with unwarmed():
        worker = Worker.boot(PATIENT.model_copy(update=update))
    assert differ(draw(worker), draw(own))
    assert worker.facts["vae"] == name
    assert differ(draw(worker, (Reference(np.zeros((64, 64, 3), np.uint8), ""),)), draw(worker))

    tiny.autoencoder(kind, 16).save_pretrained(tmp_path / "other")
    with pytest.raises(StartError, match="has 16 latent channels, the model draws"):
        Worker.boot(PATIENT.model_copy(update=update | {"vae": str(tmp_path / "other")}))


def test_an_autoencoder_of_another_scale_is_refused(boot: Callable[..., Worker], tmp_path: Path) -> None:
    own = boot("flux-dev")
    three = {"encoder_block_out_channels": (4,) * 3, "num_encoder_blocks": (1,) * 3}
    three |= {"decoder_block_out_channels": (4,) * 3, "num_decoder_blocks": (1,) * 3}
    diffusers.AutoencoderTiny(latent_channels=4, **three).save_pretrained(tmp_path / "coarse")
    update = {"model": "flux-dev", "volume": Path(own.ledger.weights).parents[2], "vae": str(tmp_path / "coarse")}
    with pytest.raises(StartError, match="a latent of 4x4 pixels, the model's own of 8x8"):
        Worker.boot(PATIENT.model_copy(update=update))


def test_an_autoencoder_that_is_not_there_is_named(boot: Callable[..., Worker], tmp_path: Path) -> None:
    volume = Path(boot("flux-dev").ledger.weights).parents[2]
    for vae, told in (
        (str(tmp_path), "has no config.json"),
        (f"a/b@{'0' * 40}", "is not on the volume"),
        ("a/b", "KINDLING_VAE"),
    ):
        with pytest.raises(StartError, match=told):
            Worker.boot(PATIENT.model_copy(update={"model": "flux-dev", "volume": volume, "vae": vae}))
