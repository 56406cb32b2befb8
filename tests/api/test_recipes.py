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
from handler.core.request import MAX_SEED

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
