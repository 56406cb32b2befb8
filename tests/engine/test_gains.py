"""How many pictures are drawn at once where nobody has measured what pays: as the worker's own have shown."""

import asyncio
import io
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from conftest import PATIENT
from PIL import Image
from test_batching import GAINS, RECIPE, levels, seeds

from fakes import FakeFamily
from handler import Api, Engine
from handler.core.reading import Reading
from handler.core.recipe import Recipe, Reference
from handler.core.sampling import Sampling
from handler.engine.gains import SHAPES, TRIES, Learned
from handler.volume.receipts import Gains


def shown(seconds: dict[int, float], recipe: Recipe = RECIPE) -> list[int]:
    """How many a worker draws at once, run after run, whose picture takes so long among so many; all that can wait."""
    learned, counts = Learned(), list[int]()
    for _ in range(10 * TRIES):
        counts.append(learned.at_once(recipe))
        learned.after(recipe, counts[-1], counts[-1] * seconds[counts[-1]])
    return counts


@pytest.mark.parametrize(
    ("seconds", "tried", "settled"),
    [
        ({1: 1.0, 2: 0.7, 4: 0.5, 8: 0.4}, [1, 2, 4, 8], 8),
        ({1: 1.0, 2: 0.7, 4: 0.5, 8: 0.6}, [1, 2, 4, 8], 4),
        ({1: 1.0, 2: 0.7, 4: 0.8}, [1, 2, 4], 2),
        ({1: 1.0, 2: 0.95}, [1, 2], 1),
        ({1: 1.0, 2: 1.5}, [1, 2], 1),
    ],
)
def test_twice_as_many_are_tried_for_as_long_as_that_pays(
    seconds: dict[int, float], tried: list[int], settled: int
) -> None:
    counts = shown(seconds)
    assert counts[: TRIES * len(tried)] == [count for count in tried for _ in range(TRIES)]
    assert set(counts[TRIES * len(tried) :]) == {settled}


def test_no_more_are_tried_than_have_room() -> None:
    assert max(shown(dict.fromkeys((1, 2, 4, 8), 1.0) | {2: 0.6, 4: 0.4}, replace(RECIPE, size=(512, 512)))) == 4
    assert max(shown({1: 1.0}, replace(RECIPE, size=(1024, 1024)))) == 1


def test_runs_that_were_disturbed_count_for_nothing() -> None:
    learned = Learned()
    for count, seconds in ((1, 1.0), (2, 0.7)):
        for times in (60, *[1] * (TRIES - 1)):
            learned.after(RECIPE, count, count * seconds * times)
    assert learned.at_once(RECIPE) == 4


def test_what_was_decided_stays() -> None:
    learned = Learned()
    for count, seconds in ((1, 1.0), (2, 0.95), (1, 9.0), (2, 0.1)):
        for _ in range(TRIES):
            learned.after(RECIPE, count, count * seconds)
        assert learned.at_once(RECIPE) == (2 if (count, seconds) == (1, 1.0) else 1)


def test_each_shape_is_learned_by_itself_whatever_its_words() -> None:
    learned = Learned()
    for _ in range(TRIES):
        learned.after(replace(RECIPE, prompt="a blue star", seed=9), 1, 1.0)
    assert learned.at_once(RECIPE) == 2
    others = [{"size": (128, 128)}, {"steps": 2}, {"sampling": Sampling(cfg=2.0)}, {"reading": Reading()}]
    assert [learned.at_once(replace(RECIPE, **other)) for other in others] == [1] * 4  # type: ignore[arg-type]


def test_callers_cannot_make_it_keep_more_and_more() -> None:
    learned, image = Learned(), Reference(np.zeros((8, 8, 3), np.uint8), "")
    for steps in range(3 * SHAPES):
        learned.after(replace(RECIPE, steps=steps), 1, 1.0)
        learned.after(replace(RECIPE, steps=steps, images=(image,), strength=0.5), 1, 1.0)
    assert len(learned._known) == SHAPES
    assert not any(kept.images for kept in learned._known)


def test_without_a_receipt_what_waits_is_drawn_at_once_after_some_were_drawn_alone() -> None:
    family = FakeFamily()
    with family.engine() as engine:

        async def main() -> list[int]:
            for recipe in seeds(*range(TRIES)):
                await engine.submit(recipe)
            drawn = await engine.submit_all([(recipe, lambda *_: None) for recipe in seeds(7, 8, 9)], math.inf, False)
            return [pixels.batch for pixels, _ in drawn]

        assert asyncio.run(main()) == [2, 2, 1]
    assert family.batches == [*[1] * TRIES, 2, 1]


@pytest.mark.parametrize(("asked", "gains", "count"), [("auto", GAINS, 4), (3, {}, 3), (1, {}, 1), ("auto", {}, 2)])
def test_a_receipt_wins_and_what_is_set_wins_over_both(asked: Any, gains: Gains, count: int) -> None:
    with FakeFamily().engine() as engine:
        for recipe in seeds(*range(TRIES)):
            asyncio.run(engine.submit(recipe))
        assert engine._executor.at_once(RECIPE, asked, gains) == count


def test_what_is_drawn_at_once_is_as_it_would_be_alone() -> None:
    """A request's pictures by spark, through an engine that learns."""
    request = {"prompt": "a red circle", "seed": 7, "n": 4, "size": "64x64"}

    def drawn(engine: Engine) -> list[dict[str, Any]]:
        reply = asyncio.run(Api(engine).call("/v1/images/generations", request))
        return list(reply.content["data"])

    def pixels(picture: dict[str, Any]) -> Any:
        return np.asarray(Image.open(io.BytesIO(picture["b64_json"].data)))

    engine = Engine(PATIENT)
    engine.start()
    try:
        engine.wait_booted()
        engine.batch = 1
        alone = drawn(engine)
        engine.batch = "auto"
        found = [drawn(engine) for _ in range(2 * TRIES)]
    finally:
        engine.stop()
    for some in found:
        assert all(levels(pixels(one), pixels(other)) <= 1 for one, other in zip(alone, some, strict=True))
