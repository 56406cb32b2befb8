"""A request becomes the recipes of its pictures in one place, whoever asks."""

import asyncio
import io
from dataclasses import replace
from typing import Any

import pytest
from PIL import Image

from fakes import FakeFamily
from handler import MODELS, Api, ImageRequest
from handler.api.recipes import recipes_of
from handler.core.errors import InvalidValue, OutOfRange, Unsupported
from handler.core.request import MAX_IMAGES, MAX_SEED

SPARK = MODELS["spark"]


def asked(**fields: Any) -> ImageRequest:
    return ImageRequest.parse({"prompt": "x", **fields})


def png(size: tuple[int, int] = (96, 64)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, "red").save(buffer, "png")
    return buffer.getvalue()


def test_pictures_differ_in_their_seeds_alone_and_after_the_largest_comes_0() -> None:
    found = recipes_of(asked(n=4, seed=MAX_SEED - 1), SPARK, "off")
    assert [recipe.seed for recipe in found] == [MAX_SEED - 1, MAX_SEED, 0, 1]
    assert {replace(recipe, seed=0) for recipe in found} == {SPARK.recipe(asked(seed=0))}


def test_a_seed_that_is_left_open_is_drawn_once_for_all_pictures() -> None:
    first, second = recipes_of(asked(n=2), SPARK, "off")
    assert second.seed == (first.seed + 1) % (MAX_SEED + 1)


def test_there_are_never_more_pictures_than_any_worker_draws() -> None:
    assert len(recipes_of(asked(n=MAX_IMAGES), SPARK, "off")) == MAX_IMAGES
    with pytest.raises(OutOfRange, match="n: at most 10 pictures"):
        recipes_of(asked(n=MAX_IMAGES + 1), SPARK, "off")


def test_all_pictures_share_what_was_decoded_once() -> None:
    first, second = recipes_of(asked(n=2, images=[png()], strength=0.5), SPARK, "off")
    assert first.size == (96, 64)
    assert first.images[0] is second.images[0]
    assert first.images[0].rgb.shape == (64, 96, 3)


def test_of_two_faults_the_one_that_no_other_image_mends_is_told() -> None:
    with pytest.raises(InvalidValue, match="image 1 is not a whole PNG"):
        recipes_of(asked(images=[b"no image"]), SPARK, "off")
    with pytest.raises(OutOfRange, match="num_inference_steps"):
        recipes_of(asked(images=[b"no image"], num_inference_steps=50), SPARK, "off")


def test_a_step_cache_is_the_requests_or_the_workers() -> None:
    dev = MODELS["flux-dev"]
    [served] = recipes_of(asked(), dev, "on")
    assert served.step_cache == dev.step_cache
    [other] = recipes_of(asked(step_cache="Fn=2"), dev, "on")
    assert other.step_cache
    assert other.step_cache.Fn == 2
    with pytest.raises(Unsupported, match="skips no steps"):
        recipes_of(asked(step_cache="on"), dev, "off")


def test_the_api_draws_just_these() -> None:
    request = asked(n=3, seed=MAX_SEED)
    with FakeFamily().engine() as engine:
        pictures = asyncio.run(Api(engine).draw(request))
    assert [picture.recipe for picture in pictures] == recipes_of(request, SPARK, "off")


def test_in_comfyuis_words_pictures_are_of_one_draw_of_noise() -> None:
    found = recipes_of(asked(n=3, seed=5, sampling={"steps": 12, "scheduler": "karras"}), SPARK, "off")
    assert [recipe.seed for recipe in found] == [5, 5, 5]
    assert [(each.sampling.batch, each.sampling.index) for each in found if each.sampling] == [(3, 0), (3, 1), (3, 2)]
    assert {(each.steps, each.scheduler, each.strength) for each in found} == {(12, "euler/karras", None)}
    [again] = recipes_of(asked(seed=5, sampling=found[1].described()["sampling"]), SPARK, "off")
    assert again == found[1]


def test_in_comfyuis_words_an_image_is_drawn_anew_by_denoise() -> None:
    [found] = recipes_of(asked(images=[png()], sampling={"denoise": 0.01, "steps": 3}), SPARK, "off")
    assert (found.strength, found.steps, found.taken) == (0.01, 3, 3)


def test_how_many_steps_may_be_asked_in_comfyuis_words() -> None:
    """A distilled model may take more than it was made for, which is told; another may not."""
    dev = MODELS["flux-dev"]
    for spec in (SPARK, dev):
        with pytest.raises(OutOfRange, match=f"sampling: {spec.id} takes at most 50 steps, got 51"):
            recipes_of(asked(sampling={"steps": 51}), spec, "off")
    [few] = recipes_of(asked(sampling={"steps": 1}), MODELS["qwen-image"], "off")
    assert few.steps == 1


def test_comfyuis_sampling_has_no_step_cache() -> None:
    dev = MODELS["flux-dev"]
    [found] = recipes_of(asked(sampling={}), dev, "on")
    assert found.step_cache is None
    with pytest.raises(Unsupported, match="ComfyUI's sampling skips no steps"):
        recipes_of(asked(sampling={}, step_cache="on"), dev, "on")


def test_in_comfyuis_words_references_have_no_mask() -> None:
    klein = MODELS["flux2-klein"]
    [found] = recipes_of(asked(images=[png()], sampling={}), klein, "off")
    assert found.strength is None
    with pytest.raises(Unsupported, match="With sampling flux2-klein takes images to look at, but no mask"):
        klein.validate(asked(images=[png()], mask=png(), sampling={}))
