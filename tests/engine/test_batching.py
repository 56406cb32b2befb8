"""Which pictures are drawn together, and that nobody can tell from what comes out."""

import asyncio
import base64
import io
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from test_families import EVERY, boot  # noqa: F401 - a fixture

from fakes import FakeFamily, raises
from handler import Api, Engine, ImageRequest, ModelSpec, Worker
from handler.core.errors import Cancelled, NumericalError, OutOfMemory
from handler.core.recipe import MOST, Recipe, Reference
from handler.core.sampling import Sampling
from handler.core.stepcache import StepCache
from handler.engine.batching import alike, at_once, room
from handler.model import families
from handler.model.compiling import package
from handler.worker.clock import Clock

RECIPE = Recipe("spark", "embedded", "a red circle", (256, 256), 4, 0.0, "flow-match-euler", 1)
GAINS = {"256x256": {"2": 1.4, "4": 1.9, "8": 1.8}, "512x512": {"2": 1.05, "4": 1.12}, "640x640": {"2": 1.01}}


@pytest.mark.parametrize(("side", "most"), [(64, 8), (256, 8), (362, 8), (512, 4), (724, 2), (768, 1), (2048, 1)])
def test_a_batch_has_no_more_pixels_than_one_large_picture(side: int, most: int) -> None:
    assert room((side, side)) == most
    assert at_once(MOST, {}, (side, side)) == most


@pytest.mark.parametrize("size", [(1024, 512), (512, 1024), (2048, 256), (256, 2048)])
def test_both_sides_of_a_picture_count(size: tuple[int, int]) -> None:
    assert room(size) == at_once(MOST, {}, size) == 2


@pytest.mark.parametrize(
    ("size", "count"),
    [
        ((256, 256), 4),
        ((64, 64), 4),
        ((512, 128), 4),
        ((512, 256), 4),
        ((512, 512), 4),
        ((640, 640), 1),
        ((1024, 512), 1),
    ],
)
def test_auto_draws_as_many_at_once_as_were_measured_to_pay(size: tuple[int, int], count: int) -> None:
    assert at_once("auto", GAINS, size) == count


def test_without_a_measurement_pictures_are_drawn_one_by_one() -> None:
    assert at_once("auto", {}, (64, 64)) == 1


def test_only_words_and_seed_may_differ() -> None:
    assert alike(RECIPE, replace(RECIPE, prompt="a blue star", negative_prompt="blurry", seed=2))
    for other in ({"size": (256, 128)}, {"steps": 2}, {"guidance": 2.0}, {"scheduler": "heun"}):
        assert not alike(RECIPE, replace(RECIPE, **other))  # type: ignore[arg-type]
    cached = replace(RECIPE, step_cache=StepCache())
    assert not alike(cached, cached)
    draw = [replace(RECIPE, sampling=Sampling(batch=2, index=i)) for i in range(2)]
    assert alike(*draw)
    assert not alike(draw[0], RECIPE)
    assert not alike(draw[0], replace(RECIPE, sampling=Sampling(cfg=2.0)))


def recipes_of(worker: Worker, *prompts: str) -> list[Recipe]:
    steps = min(2, worker.spec.max_steps)
    asked = {"width": 128, "height": 96, "num_inference_steps": steps}
    requests = [ImageRequest(prompt=text, seed=seed, **asked) for seed, text in enumerate(prompts)]
    return [worker.spec.recipe(request) for request in requests]


def levels(one: Any, other: Any) -> int:
    """By how many of 255 two pictures differ at most."""
    return int(np.abs(one.astype(int) - other.astype(int)).max())


@EVERY
def test_a_picture_is_the_same_alone_and_among_others(spec: ModelSpec, boot: Callable[..., Worker]) -> None:  # noqa: F811
    """With other seeds, words, and lengths of words; in fp32 by at most 1 of 255."""
    worker = boot(spec.id)
    recipes = recipes_of(worker, "a red circle", "a red circle", "a far longer prompt about three yellow stars")
    alone = [worker.generate(recipe)[0].rgb for recipe in recipes]
    found = worker.draw(recipes, [lambda *_: None] * 3)
    for one, outcome in zip(alone, found, strict=True):
        assert not isinstance(outcome, Exception)
        assert levels(one, outcome[0].rgb) <= 1


@EVERY
def test_code_compiled_for_a_batch_takes_one_picture(
    spec: ModelSpec,
    boot: Callable[..., Worker],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What blocks are called with differs in nothing but sizes: else a lone picture would silently be drawn eagerly."""
    worker = boot(spec.id)
    monkeypatch.setattr(worker, "spec", replace(spec, size=(256, 256)))  # sketched in seconds less
    model = getattr(worker._pipeline, worker._family.DENOISER)
    decoder = families.compilable(worker._pipeline, "cuda")
    firsts = {kind: some[0] for kind, some in package._kinds(model, decoder).items()}
    sketched = package._calls(firsts, lambda: worker._sketch(Clock(3600)))
    [single] = recipes_of(worker, "a red circle")
    drawn = package._calls(firsts, lambda: worker.generate(single))
    for kind, calls in sketched.items():
        tensors = zip(*map(package._leaves, calls), strict=True)
        takes = [(first.dtype, package._shape(first, *others)) for first, *others in tensors]
        assert all(package._fits(list(package._leaves(call)), takes) for call in drawn[kind])


@pytest.fixture
def family() -> FakeFamily:
    return FakeFamily(gate=threading.Event())


@pytest.fixture
def engine(family: FakeFamily) -> Iterator[Engine]:
    with family.engine(batch=4) as engine:
        yield engine


async def waiting(engine: Engine, family: FakeFamily, *recipes: Recipe) -> list["asyncio.Task[Any]"]:
    """Tasks for `recipes`, all in line behind a first one, which is being drawn."""
    first = asyncio.create_task(engine.submit(RECIPE))
    assert await asyncio.to_thread(family.entered.wait, 10)
    tasks = [asyncio.create_task(engine.submit(recipe)) for recipe in recipes]
    await asyncio.sleep(0)
    return [first, *tasks]


def seeds(*numbers: int) -> list[Recipe]:
    return [replace(RECIPE, seed=number) for number in numbers]


def test_what_waits_and_is_alike_is_drawn_at_once(engine: Engine, family: FakeFamily) -> None:
    async def main() -> None:
        other = replace(RECIPE, size=(128, 128), seed=9)
        tasks = await waiting(engine, family, *seeds(2, 3), other, *seeds(4, 5, 6))
        assert family.gate
        family.gate.set()
        pictures = [pixels for pixels, _ in await asyncio.gather(*tasks)]
        assert [pixels.recipe.seed for pixels in pictures] == [1, 2, 3, 9, 4, 5, 6]
        assert [int(pixels.rgb[0, 0, 0]) for pixels in pictures] == [2, 3, 4, 10, 5, 6, 7]
        assert [pixels.batch for pixels in pictures] == [1, 4, 4, 1, 4, 4, 1]

    asyncio.run(main())
    assert family.batches == [1, 4, 1, 1]
    assert family.drawn == [1, 2, 3, 4, 5, 9, 6]


def test_one_that_is_given_up_does_not_stop_the_others(engine: Engine, family: FakeFamily) -> None:
    async def main() -> None:
        first, second, third = await waiting(engine, family, *seeds(2, 3))
        family.at_step = {2: lambda: len(engine._executor.jobs) > 1 and engine._executor.jobs[0].end(Cancelled("gone"))}
        assert family.gate
        family.gate.set()
        assert (await third)[0].recipe.seed == 3
        await first
        with pytest.raises(Cancelled):
            await second

    asyncio.run(main())
    assert family.batches == [1, 2]


def test_a_broken_picture_does_not_spoil_the_others(engine: Engine, family: FakeFamily) -> None:
    async def main() -> None:
        tasks = await waiting(engine, family, *seeds(2, 3, 4))
        assert family.gate
        family.gate.set()
        _, good, broken, other = await asyncio.gather(*tasks, return_exceptions=True)
        assert [good[0].recipe.seed, other[0].recipe.seed] == [2, 4]
        assert isinstance(broken, NumericalError)

    family.broken = {3}
    asyncio.run(main())
    assert family.batches == [1, 3]


def test_a_batch_that_finds_no_memory_is_drawn_one_by_one(engine: Engine, family: FakeFamily) -> None:
    async def main() -> None:
        tasks = await waiting(engine, family, *seeds(2, 3))
        assert family.gate
        family.gate.set()
        await tasks[0]
        assert [pixels.batch for pixels, _ in await asyncio.gather(*tasks)] == [1, 1, 1]
        assert engine.at_once(RECIPE) == 1
        assert engine.state == "ready"

    def full() -> None:
        if family.batches[-1] > 1:
            raises(OutOfMemory("too many"))()

    family.at_step = {2: full}
    asyncio.run(main())
    assert family.batches == [1, 2, 1, 1]


def test_what_is_drawn_alone_is_not_held_back_for_its_neighbours(family: FakeFamily) -> None:
    """Each picture of such a request is encoded while the next is drawn."""
    with family.engine(batch=4) as engine:
        assert engine.at_once(RECIPE) == 4
        assert engine.at_once(replace(RECIPE, step_cache=StepCache())) == 1
        assert engine.at_once(replace(RECIPE, images=(Reference(None, ""),), strength=0.5)) == 1


def test_the_pictures_of_one_request_are_drawn_at_once_and_say_so(family: FakeFamily) -> None:
    family.gate = None
    request, told = {"prompt": "a red circle", "seed": 7, "n": 4}, list[tuple[int, int]]()
    with family.engine(batch=3) as engine:
        reply = asyncio.run(Api(engine).call("/generate", request, lambda done, of, _: told.append((done, of))))
    assert family.batches == [3, 1]
    assert [image["seed"] for image in reply.body["images"]] == [7, 8, 9, 10]
    files = [Image.open(io.BytesIO(base64.b64decode(image["b64_json"]))) for image in reply.body["images"]]
    assert ['"batch": "3"' in file.info["kindling"] for file in files] == [True, True, True, False]
    assert told == [(done, 16) for done in range(1, 17)]
