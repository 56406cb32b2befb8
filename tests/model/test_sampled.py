"""Pictures by ComfyUI's sampling through every family's pipelines, of small random weights."""

import gc
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from test_families import ROWS, boot  # noqa: F401 - a fixture

from handler import ImageRequest, ModelSpec, Recipe, Worker
from handler.api.recipes import recipes_of
from handler.core.errors import Cancelled
from handler.core.recipe import Mask, Reference
from handler.core.sampling import Sampling
from handler.core.tracebacks import let_go
from handler.engine.batching import alike
from handler.model import families

Boot = Callable[..., Worker]
FAMILIES = {spec.family: spec for spec in ROWS}.values()  # a row of each
EACH = pytest.mark.parametrize("spec", FAMILIES, ids=lambda spec: spec.id)
REDRAWING = pytest.mark.parametrize(
    "spec", [spec for spec in FAMILIES if not spec.max_images], ids=lambda spec: spec.id
)
LEFT = np.arange(64) < 32  # columns of a picture


def recipe(worker: Worker, images: tuple[Reference, ...] = (), kept: Any = None, **fields: Any) -> Recipe:
    asked: dict[str, Any] = {"prompt": "a red circle", "width": 64, "height": 64, "seed": 1} | fields
    asked["sampling"] = Sampling(**{"scheduler": "simple", "steps": 2} | asked.get("sampling", {}))
    if kept is not None:
        kept.flags.writeable = False  # as a decoded one is
    mask = None if kept is None else Mask(kept, "mask")
    request = ImageRequest(**asked, images=tuple(b"x" for _ in images), mask=mask and b"x")
    return worker.spec.recipe(request, images, mask=mask)


def draw(worker: Worker, asked: Recipe, on_step: Any = lambda *_: None) -> Any:
    return worker.generate(asked, on_step)[0].rgb.astype(int)


@EACH
def test_draws_by_seed_and_sampler(spec: ModelSpec, boot: Boot) -> None:  # noqa: F811
    worker = boot(spec.id)
    first = draw(worker, recipe(worker))
    assert first.shape == (64, 64, 3)
    for other in ({"seed": 2}, {"sampling": {"sampler": "euler_ancestral"}}):
        assert np.abs(draw(worker, recipe(worker, **other)) - first).mean() > 0.2, other
    assert (draw(worker, recipe(worker)) == first).all()


@EACH
def test_pictures_of_one_draw_are_the_same_alone_and_together(spec: ModelSpec, boot: Boot) -> None:  # noqa: F811
    worker = boot(spec.id)
    sampling = Sampling(sampler="dpmpp_sde", scheduler="simple", steps=2)
    request = ImageRequest(prompt="a red circle", width=72, height=72, seed=1, n=2, sampling=sampling)
    one, other = recipes_of(request, worker.spec, "off")
    assert alike(one, other)
    assert not alike(one, replace(one, sampling=sampling.model_copy(update={"steps": 3})))
    drawn = [draw(worker, alone) for alone in (one, other)]
    for alone, outcome in zip(drawn, worker.draw([one, other], [lambda *_: None] * 2), strict=True):
        assert not isinstance(outcome, BaseException)
        assert outcome[0].batch == 2
        assert np.abs(alone - outcome[0].rgb).max() <= 1
    assert np.abs(drawn[0] - drawn[1]).mean() > 0.2


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """What a worker's autoencoder is given to decode: latents (channels, rows, columns), in its scale."""

    def run(worker: Worker, asked: Recipe) -> Any:
        vae, seen = worker._pipeline.vae, []
        decode = vae.decode

        def seeing(latents: Any, **options: Any) -> Any:
            seen.append(latents.squeeze().numpy().copy())
            return decode(latents, **options)

        with monkeypatch.context() as patch:
            patch.setattr(vae, "decode", seeing)
            draw(worker, asked)
        [latents] = seen
        return latents

    return run


@REDRAWING
def test_a_mask_keeps_latents(spec: ModelSpec, boot: Boot, decoded: Any) -> None:  # noqa: F811
    worker, rng = boot(spec.id), np.random.default_rng(0)
    image = (Reference(rng.integers(0, 256, (64, 64, 3), np.uint8), "image"),)
    whole, half = np.full((64, 64), 255, np.uint8), np.where(LEFT, 255, 0).astype(np.uint8)[None].repeat(64, 0)
    known = decoded(worker, recipe(worker, image, whole))
    assert decoded(worker, recipe(worker, image, whole, seed=2)) == pytest.approx(known, abs=1e-5)
    drawn = {
        name: decoded(worker, recipe(worker, image, half, sampling={"sampler": name})) for name in ("euler", "ddim")
    }
    columns = known.shape[-1] // 2
    for each in drawn.values():
        assert each[..., :columns] == pytest.approx(known[..., :columns], abs=1e-5)
        assert np.abs(each - known)[..., columns:].mean() > 0.1
    assert (drawn["euler"] != drawn["ddim"]).any()  # whose noise in what is kept is another


def test_a_mask_lies_where_its_image_does(boot: Boot, decoded: Any) -> None:  # noqa: F811
    """Amid the canvas, which is larger than a picture off the grid."""
    worker, rng = boot("sd1.5"), np.random.default_rng(0)
    size = {"width": 76, "height": 76}
    image = (Reference(rng.integers(0, 256, (76, 76, 3), np.uint8), "image"),)
    kept = np.where(np.arange(76) < 73, 255, 0).astype(np.uint8)[None].repeat(76, 0)
    known = decoded(worker, recipe(worker, image, np.full((76, 76), 255, np.uint8), **size))
    drawn = decoded(worker, recipe(worker, image, kept, **size))
    changed = np.abs(drawn - known).max((0, 1)) > 1e-5
    assert changed.tolist() == [False] * 9 + [True]  # columns of 8 pixels, of which the image begins with the third


@REDRAWING
def test_an_image_is_drawn_anew_from_where_denoise_says(spec: ModelSpec, boot: Boot, decoded: Any) -> None:  # noqa: F811
    worker, rng = boot(spec.id), np.random.default_rng(0)
    image = (Reference(rng.integers(0, 256, (64, 64, 3), np.uint8), "image"),)
    known = decoded(worker, recipe(worker, image, np.full((64, 64), 255, np.uint8)))
    shares = [{"denoise": share, "steps": 1} for share in (0.001, 0.1, 1.0)]
    off = [float(np.abs(decoded(worker, recipe(worker, image, sampling=share)) - known).mean()) for share in shares]
    assert 0 < off[0] < off[1] < off[2]


def test_steps_are_counted_shown_and_given_up(spark: Worker) -> None:
    seen: list[tuple[int, Any]] = []

    def watch(done: int, preview: Any) -> None:
        seen.append((done, preview()))

    asked = recipe(spark, sampling={"sampler": "heun", "steps": 3})
    before = draw(spark, asked, watch)
    assert [done for done, _ in seen] == [1, 2, 2, 3, 3]  # it looks twice in each step but the last
    assert {small.shape for _, small in seen} == {(8, 8, 3)}

    def stop(*_: object) -> None:
        raise Cancelled("enough")

    with pytest.raises(Cancelled):
        draw(spark, asked, stop)
    assert (draw(spark, asked) == before).all()
    assert "prepare_latents" not in vars(spark._pipeline)
    assert "encode" not in vars(spark._pipeline.vae)


def test_a_picture_that_is_given_up_leaves_no_latents(spark: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the garbage collector, which may be long in coming."""
    made, of = list[weakref.ref[Any]](), families.scheduler_of

    def watched(*given: Any) -> Any:
        scheduler = of(*given)
        made.append(weakref.ref(scheduler))
        return scheduler

    def stop(*_: Any) -> None:
        raise Cancelled("enough")

    monkeypatch.setattr(families, "scheduler_of", watched)
    gc.disable()
    try:
        [outcome] = spark.draw([recipe(spark, sampling={"sampler": "dpmpp_sde", "steps": 4})], [stop])
        assert isinstance(outcome, Cancelled)
        let_go(outcome)
        assert [one() for one in made] == [None]
    finally:
        gc.enable()


def test_steps_that_end_early_leave_noise_only_where_that_is_asked(spark: Worker) -> None:
    part = {"steps": 4, "end": 2}
    cleaned, noisy = (
        draw(spark, recipe(spark, sampling=part | {"leftover_noise": left, "shift": 3.0})) for left in (False, True)
    )
    roughness = [float(np.abs(np.diff(each, axis=1)).mean()) for each in (cleaned, noisy)]
    assert roughness[1] > 1.5 * roughness[0]


def test_without_noise_it_begins_in_nothing(spark: Worker) -> None:
    one, other = (draw(spark, recipe(spark, seed=seed, sampling={"add_noise": False})) for seed in (1, 2))
    assert (one == other).all()


@pytest.mark.parametrize("sampler", ["euler_ancestral", "dpmpp_sde", "lcm"])
def test_noise_in_the_steps_is_the_same_with_an_image(sampler: str, spark: Worker, decoded: Any) -> None:
    """Of which nothing is left where a flow begins."""
    image = (Reference(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8), "image"),)
    how: dict[str, Any] = {"sampling": {"sampler": sampler, "steps": 3}}
    assert (decoded(spark, recipe(spark, image, **how)) == decoded(spark, recipe(spark, **how))).all()


def test_an_autoencoder_of_16_bits_stays_that_while_noise_is_drawn_in_the_steps(boot: Boot) -> None:  # noqa: F811
    """Stable Diffusion XL's looks at an image in fp32."""
    worker = boot("sdxl-turbo", "bf16")
    image = (Reference(np.full((64, 64, 3), 90, np.uint8), "image"),)
    assert worker._pipeline.vae.config.force_upcast
    for sampler in ("euler_ancestral", "dpmpp_sde"):
        draw(worker, recipe(worker, image, sampling={"sampler": sampler, "denoise": 0.5}))
        assert worker._pipeline.vae.dtype == torch.bfloat16


@REDRAWING
def test_an_image_is_drawn_anew_in_16_bits(spec: ModelSpec, boot: Boot) -> None:  # noqa: F811
    """Z-Image's pipeline takes each step in fp32, though what it begins with is not."""
    worker = boot(spec.id, "bf16")
    image = (Reference(np.full((64, 64, 3), 90, np.uint8), "image"),)
    assert draw(worker, recipe(worker, image, sampling={"denoise": 0.5})).shape == (64, 64, 3)


def test_guidance_of_a_sampling_is_not_the_models_own_of_the_same_scale(boot: Boot) -> None:  # noqa: F811
    """Encoded prompts are kept."""
    worker = boot("flux-dev")
    request = ImageRequest(prompt="a red circle", width=64, height=64, seed=1, num_inference_steps=1)
    draw(worker, worker.spec.recipe(request))
    guided, plain = (draw(worker, recipe(worker, sampling={"cfg": cfg})) for cfg in (worker.spec.guidance, 1.0))
    assert (guided != plain).any()


def test_its_own_scheduler_in_comfyuis_words_is_the_same_picture(spark: Worker) -> None:
    """But that ComfyUI cuts where Kindling rounds."""
    own = spark.spec.recipe(ImageRequest(prompt="a red circle", width=64, height=64, seed=1))
    assert np.abs(draw(spark, own) - draw(spark, recipe(spark, sampling={"steps": 4}))).max() <= 1
