"""Every picture has an outcome of its own, and a worker that fails at all of them says so."""

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, repeat
from typing import Any

import numpy as np
import pytest
import torch

from fakes import CPU, RECIPE, FakeFamily, raises
from handler import Api, Clock, Engine, ImageRequest, Picture, Settings, Worker
from handler.api.dialects import native, openai
from handler.catalog.models import find
from handler.core.errors import (
    Broken,
    Cancelled,
    DeadlineExceeded,
    DeviceLost,
    Exhausted,
    Internal,
    KindlingError,
    NotReady,
    NumericalError,
    OutOfMemory,
    StartError,
)
from handler.core.recipe import Preview, Recipe, Reference
from handler.engine.batching import alike
from handler.engine.pace import Pace
from handler.engine.queue import Job, Queue
from handler.model.families.schedulers import FLOW

FULL, LOST = torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("CUDA error: unspecified launch failure")


@dataclass
class Wordy(FakeFamily):
    """Told prompts as tensors that are as long as they; words of these lengths cannot be encoded."""

    unsaid: tuple[int, ...] = ()
    error: Exception = LOST

    def __call__(self, prompt_embeds: torch.Tensor, **options: Any) -> Any:
        """As a pipeline of diffusers is called."""
        return super().__call__(**options)

    def encode(self, pipeline: Any, recipe: Recipe, tokens: int) -> dict[str, Any]:
        """As a family's."""
        if len(recipe.prompt) in self.unsaid:
            raise self.error
        return {"prompt_embeds": torch.zeros(1, len(recipe.prompt))}

    def boot(self, settings: Settings, clock: Clock) -> Worker:
        """In place of `Worker.boot`."""
        family: Any = type("Family", (), {"encode": self.encode, "SCHEDULERS": FLOW})
        return Worker(find(settings.model), CPU, family, self, clock.ledger)


@pytest.fixture
def wordy() -> Wordy:
    return Wordy(gate=threading.Event())


def worded(*prompts: str) -> list[Recipe]:
    return [replace(RECIPE, prompt=prompt, seed=seed) for seed, prompt in enumerate(prompts, 2)]


@contextmanager
def behind(family: FakeFamily) -> Iterator[Any]:
    """An engine that is drawing already; gives what asks for pictures meanwhile, each its own request: the outcomes."""
    family.gate = threading.Event()

    async def one(engine: Engine, recipe: Recipe, on_step: Any, answered: threading.Event) -> Any:
        try:
            return await engine.submit(recipe, on_step)
        finally:
            answered.set()

    async def main(engine: Engine, recipes: list[Recipe], on_steps: Any = (), answers: Any = ()) -> list[Any]:
        first = asyncio.create_task(engine.submit(RECIPE))
        assert await asyncio.to_thread(family.entered.wait, 10)
        each = zip(
            recipes, on_steps or repeat(lambda *_: None), chain(answers, iter(threading.Event, None)), strict=False
        )
        waiting = [asyncio.create_task(one(engine, *some)) for some in each]
        await asyncio.sleep(0)
        assert family.gate
        family.gate.set()
        await first
        return await asyncio.gather(*waiting, return_exceptions=True)

    with family.engine(batch=4) as engine:
        yield lambda recipes, on_steps=(), answers=(): asyncio.run(main(engine, recipes, on_steps, answers))


def ask(engine: Engine, count: int = 1, recipe: Recipe = RECIPE) -> Any:
    """One request's pictures, or what it is told."""

    async def main() -> Any:
        return await engine.submit_all([(recipe, lambda *_: None)] * count, float("inf"), admitted=False)

    try:
        return asyncio.run(main())
    except KindlingError as error:
        return error


def test_a_request_that_does_not_fit_counts_once_and_is_drawn_no_further(family: FakeFamily) -> None:
    def full() -> None:
        if size[0] == RECIPE.size[0]:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    size = RECIPE.size
    with family.engine(batch=4) as engine:
        draw = engine.worker.draw_some  # type: ignore[union-attr]

        def sized(recipes: Any, on_steps: Any) -> Any:
            nonlocal size
            size = recipes[0].size
            return draw(recipes, on_steps)

        engine.worker.draw_some = sized  # type: ignore[union-attr]
        family.at_step = {1: full}
        for turn in range(2):
            assert isinstance(ask(engine, 4), OutOfMemory)
            assert engine.state == "ready"
            assert family.batches == [4, 1, 1, *[1, 1] * turn]  # at once, alone, and a small one as proof; then alone
        assert isinstance(ask(engine, 4), Exhausted)
        assert engine.state == "failed"


def test_a_gpu_that_fails_in_a_preview_is_lost_for_all(family: FakeFamily) -> None:
    def looks(_: int, preview: Preview) -> None:
        raise LOST

    with behind(family) as drawn:
        quiet: Any = lambda *_: None  # noqa: E731
        outcomes = drawn([replace(RECIPE, seed=seed) for seed in (2, 3, 4)], [quiet, looks, quiet])
    assert [type(outcome) for outcome in outcomes] == [DeviceLost] * 3
    assert family.steps_run == RECIPE.steps + 1


@pytest.mark.parametrize("where", ["encode", "denoise", "wrapped"])
def test_a_gpu_that_fails_draws_nothing_more(wordy: Wordy, where: str) -> None:
    """Though the prompts differ in length, so that each would be drawn for itself."""

    def fails() -> None:
        if len(wordy.batches) > 1:
            try:
                raise LOST
            except RuntimeError as error:
                if where == "wrapped":
                    raise ValueError("the callback failed") from error
                raise

    if where == "encode":
        wordy.unsaid = (3,)
    wordy.at_step = {1: fails} if where != "encode" else {}
    with behind(wordy) as drawn:
        outcomes = drawn(worded("abc", "abcd", "abcde"))
    assert [type(outcome) for outcome in outcomes[:1]] == [DeviceLost]
    assert all(isinstance(outcome, DeviceLost | StartError) for outcome in outcomes)
    assert wordy.drawn == [1]
    assert len(wordy.batches) == (1 if where == "encode" else 2)


def test_each_that_gives_up_is_told_its_own_reason(family: FakeFamily) -> None:
    whys = [NumericalError("one"), Cancelled("two"), ZeroDivisionError("three"), SystemExit("four")]
    with behind(family) as drawn:
        outcomes = drawn(
            [replace(RECIPE, seed=seed) for seed in range(2, 6)], [lambda *_, e=e: raises(e)() for e in whys]
        )
    assert [str(outcome) for outcome in outcomes[:2]] == ["one", "two"]
    assert [type(outcome) for outcome in outcomes[2:]] == [Internal, Internal]
    assert family.batches == [1, 4]


def test_what_harms_its_neighbours_is_drawn_alone(family: FakeFamily) -> None:
    """A fault that ends a whole run is one picture's, perhaps: only that one fails."""
    begun: list[int] = []
    family.at_step = {1: begun.clear, 2: lambda: raises(ZeroDivisionError())() if 3 in begun else None}
    watches: Any = [lambda done, _, seed=seed: begun.append(seed) if done == 1 else None for seed in (2, 3, 4)]

    with behind(family) as drawn:
        outcomes = drawn([replace(RECIPE, seed=seed) for seed in (2, 3, 4)], watches)
    assert [type(outcome) for outcome in outcomes] == [tuple, Internal, tuple]
    assert family.batches == [1, 3, 1, 1, 1]


def test_prompts_of_other_lengths_do_not_wait_for_each_other(wordy: Wordy) -> None:
    """A run has those that fit; the others keep their places, and who comes meanwhile may join them."""
    ended: list[int] = []
    with behind(wordy) as drawn:
        recipes = worded("abc", "abcd", "abc", "abcd", "ab")
        on_steps: Any = [lambda done, _, i=i: ended.append(i) if done == RECIPE.steps else None for i in range(5)]
        outcomes = drawn(recipes, on_steps)
    assert wordy.batches == [1, 2, 2, 1]
    assert ended == [0, 2, 1, 3, 4]
    for pixels, stages in outcomes:
        assert pixels.batch == (1 if pixels.recipe.prompt == "ab" else 2)
        assert set(stages) == {"queue", "encode", "denoise", "decode"}
    assert outcomes[1][1]["queue"] >= sum(outcomes[0][1].values())  # so stages add up to what it took


def test_a_job_ends_when_its_picture_is_drawn(wordy: Wordy) -> None:
    """The first has its answer before the other, of another length, goes on from its first step."""
    answered = threading.Event()
    waits: Any = lambda *_: answered.wait(60) or pytest.fail("held together")  # noqa: E731
    with behind(wordy) as drawn:
        one, other = worded("abc", "abcd")
        told = drawn([one, other], [lambda *_: None, waits], answers=[answered])
    assert not [outcome for outcome in told if isinstance(outcome, Exception)]


def test_stopping_answers_those_that_did_not_fit(wordy: Wordy) -> None:
    wordy.gate = None
    with wordy.engine(batch=4) as engine:

        async def main() -> list[Any]:
            holds, go = threading.Event(), threading.Event()
            hold: Any = lambda *_: (holds.set(), go.wait(60))  # noqa: E731
            first = asyncio.create_task(engine.submit(RECIPE, hold))
            assert await asyncio.to_thread(holds.wait, 10)
            stop: Any = lambda *_: engine.queue.close()  # noqa: E731 - as `Engine.stop` does from its thread
            others = [asyncio.create_task(engine.submit(each, stop)) for each in worded("abc", "abcd")]
            await asyncio.sleep(0)
            go.set()
            await first
            return await asyncio.gather(*others, return_exceptions=True)

        done, left = asyncio.run(main())
    assert done[0].recipe.prompt == "abc"
    assert isinstance(left, NotReady)


def test_a_prompt_that_cannot_be_encoded_is_nobody_elses_fault(wordy: Wordy) -> None:
    wordy.unsaid, wordy.error = (4,), ValueError("no such word")
    with behind(wordy) as drawn:
        outcomes = drawn(worded("abc", "abcd", "abc"))
    assert isinstance(outcomes[1], Internal)
    assert [outcome[0].batch for outcome in (outcomes[0], outcomes[2])] == [2, 2]


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize(("error", "told"), [(FULL, OutOfMemory), (ValueError("no such word"), Internal)])
def test_where_no_prompt_of_a_run_can_be_encoded_each_is_told_why(
    wordy: Wordy, error: Exception, told: type[KindlingError], count: int, caplog: pytest.LogCaptureFixture
) -> None:
    wordy.unsaid, wordy.error, wordy.gate = (4,), error, None
    with wordy.engine() as engine:
        assert type(ask(engine, count, replace(RECIPE, prompt="abcd"))) is told
        assert engine.state == "ready"
        assert isinstance(ask(engine), list)
    assert ("ValueError" in caplog.text, "IndexError" in caplog.text) == (told is Internal, False)


@pytest.mark.parametrize(
    ("errors", "ends"),
    [
        ([ValueError("one")] * 3, True),
        ([ValueError("picture 1 of 7"), ValueError("picture 2 of 8"), ValueError("picture 3 of 9")], True),
        ([ValueError("one"), ValueError("two"), ValueError("one")], False),
        ([ValueError("one"), TypeError("one"), ValueError("one")], False),
        ([ValueError("one"), ValueError("one"), None, ValueError("one")], False),
        ([ValueError("one"), ValueError("one"), Cancelled("gone"), ValueError("one")], True),
        ([SystemExit(1)] * 3, True),
    ],
)
def test_the_same_bug_again_and_again_ends_a_worker(
    family: FakeFamily, errors: list[BaseException | None], ends: bool
) -> None:
    with family.engine() as engine:
        for error in errors:
            family.at_step = {1: raises(error)} if error else {}
            told = ask(engine)
            assert isinstance(told, KindlingError if error else list)
        assert isinstance(told, Broken) == ends
        assert engine.state == ("failed" if ends else "ready")


@pytest.mark.parametrize("small", [True, False])
def test_a_worker_that_draws_nothing_sound_has_to_prove_itself(family: FakeFamily, small: bool) -> None:
    family.broken = {1} if small else {0, 1}
    with family.engine() as engine:
        told = [ask(engine) for _ in range(3)]
        assert [type(each) for each in told[:2]] == [NumericalError] * 2
        assert (type(told[2]), engine.state) == ((NumericalError, "ready") if small else (Broken, "failed"))


def test_a_proof_that_loses_the_gpu_says_so(family: FakeFamily) -> None:
    def then() -> None:
        family.at_step = {1: raises(LOST)}
        raise FULL

    family.at_step = {1: then}
    with family.engine() as engine:
        assert isinstance(ask(engine), DeviceLost)
        assert engine.state == "failed"


def test_the_hosts_memory_may_be_full_too(family: FakeFamily) -> None:
    def once() -> None:
        family.at_step = {}
        raise MemoryError

    family.at_step = {2: once}
    with family.engine() as engine:
        assert isinstance(ask(engine), OutOfMemory)
        assert engine.state == "ready"


def test_a_gpu_that_cannot_even_give_memory_back_is_lost(family: FakeFamily, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "empty_cache", raises(LOST))
    family.at_step = {1: raises(FULL)}
    with family.engine() as engine:
        assert isinstance(ask(engine), DeviceLost)


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt("of 3"), ZeroDivisionError("3 / 0")])
def test_a_library_that_ends_a_start_leaves_nobody_waiting(
    error: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    engine = Engine(Settings(), boot=lambda *_: raises(error)())
    engine.start()
    told = f"{type(error).__name__}: {error}"
    with pytest.raises(StartError, match=f"spark could not be loaded: {told}"):
        engine.wait_booted()
    assert told in caplog.text  # nobody's prompt can be in there
    assert engine.state == "failed"
    assert engine.over.is_set()
    engine.stop()


def test_a_library_that_wants_to_exit_ends_one_picture(family: FakeFamily) -> None:
    with family.engine() as engine:
        family.at_step = {2: raises(SystemExit("bye"))}
        assert isinstance(ask(engine), Internal)
        family.at_step = {}
        assert isinstance(ask(engine), list)


NOBODY: Any = lambda *_: None  # noqa: E731
PICTURE: Any = (object(), {})


@pytest.mark.parametrize("place", [0, 1, 2])
def test_of_several_pictures_the_one_that_failed_is_told_and_the_others_are_given_up(place: int) -> None:
    """Those before it are drawn; those after it are as late as may be, but nobody's time is up."""
    engine = Engine(Settings())

    async def main() -> None:
        asked = asyncio.create_task(engine.submit_all([(RECIPE, NOBODY)] * 3, float("inf"), admitted=False))
        await asyncio.sleep(0)
        jobs = engine.queue.take(lambda _: 3)
        for job, outcome in zip(jobs, [*[PICTURE] * place, NumericalError("NaN.")], strict=False):
            job.end(outcome)
        with pytest.raises(NumericalError):
            await asked

    asyncio.run(main())
    others = {("cancelled", "queue"): 2 - place, ("drawn", "queue"): place}
    assert engine.queue.ended == Counter({("numerical_error", "queue"): 1, **others}) + Counter()


def test_the_picture_that_failed_is_told_though_one_before_it_was_given_up_for_it() -> None:
    """A job that a lost worker put back waits while a later one fails: both have ended when the caller looks."""
    engine = Engine(Settings())

    async def main() -> None:
        asked = asyncio.create_task(engine.submit_all([(RECIPE, NOBODY)] * 2, float("inf"), admitted=False))
        await asyncio.sleep(0)
        first, second = engine.queue.take(lambda _: 2)
        assert engine.queue.put_back([first]) == []
        second.end(NumericalError("NaN."))
        engine.queue.give_up(second.request)
        with pytest.raises(NumericalError):
            await asked

    asyncio.run(main())
    assert engine.queue.ended == Counter({("numerical_error", "queue"): 1, ("cancelled", "queue"): 1})


@pytest.mark.parametrize("drawn", [0, 1, 2])
@pytest.mark.parametrize(("state", "told"), [("ready", DeadlineExceeded), ("starting", NotReady)])
def test_of_several_pictures_those_that_are_late_are_counted_so(drawn: int, state: Any, told: Any) -> None:
    engine = Engine(Settings())
    engine.state = state

    async def main() -> None:
        until = time.perf_counter() + 0.5
        asked = asyncio.create_task(engine.submit_all([(RECIPE, NOBODY)] * 3, until, admitted=True))
        await asyncio.sleep(0)
        for job in engine.queue.take(lambda _: 3)[:drawn]:
            job.end(PICTURE)
        with pytest.raises(told):
            await asked

    asyncio.run(main())
    assert engine.queue.ended == Counter({("drawn", "queue"): drawn, (told.code, "queue"): 3 - drawn}) + Counter()


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("places", [(0,), (1,), (2,), (0, 2), (0, 1, 2)])
def test_a_request_fails_with_any_of_its_pictures_and_the_next_does_not(
    family: FakeFamily, batch: int, places: tuple[int, ...]
) -> None:
    family.broken = {5 + place for place in places}
    asked = {"prompt": "x", "n": 3, "seed": 5, "size": "64x64"}
    with family.engine(batch=batch) as engine:
        reply = asyncio.run(Api(engine).call("/v1/images/generations", asked))
        assert (reply.status, reply.content["error"]["code"]) == (500, "numerical_error")
        drawn, failed = (places[0], 1) if batch == 1 else (3 - len(places), len(places))
        ended = Counter({outcome: count for (outcome, _), count in engine.queue.ended.items()})
        assert (ended["drawn"], ended["numerical_error"] + ended["cancelled"]) == (drawn, failed)
        assert ended["numerical_error"] >= 1  # the first that fails ends the others
        assert (engine.waiting, engine.drawing) == (0, 0)
        assert asyncio.run(Api(engine).call("/v1/images/generations", asked | {"seed": 50})).status == 200
        assert engine.state == "ready"


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_request_whose_time_is_up_at_its_turn_does_not_fail_the_lane(family: FakeFamily, place: int) -> None:
    """Its client, on a loop that is busy, has not ended it yet; who waits before and behind it is drawn."""
    told: list[Any] = [None] * 3
    family.gate = threading.Event()
    with family.engine() as engine:
        holds = threading.Thread(target=ask, args=(engine,))
        holds.start()
        assert family.entered.wait(30)
        ends = [0.0 if number == place else float("inf") for number in range(3)]
        answers = [partial(told.__setitem__, number) for number in range(3)]
        jobs = [Job(RECIPE, NOBODY, 1.0, at, answer) for at, answer in zip(ends, answers, strict=True)]
        engine.queue.join(jobs, None, admitted=True)
        family.gate.set()
        holds.join(30)
        assert isinstance(ask(engine), list)
        assert engine.state == "ready"
    assert [isinstance(each, DeadlineExceeded) for each in told] == [number == place for number in range(3)]
    assert len(family.drawn) == 4


def test_pictures_that_are_edited_are_drawn_one_by_one() -> None:
    """Those of one request too: what they are made from is all the same."""
    image = Reference(np.zeros((64, 64, 3), np.uint8), "image")
    edited = replace(RECIPE, images=(image,))
    assert not alike(edited, replace(edited, seed=2))
    line = Queue(9, 9.0)
    line.join([Job(edited, NOBODY, 1.0, float("inf"), NOBODY) for _ in range(3)], Pace(), admitted=False)
    assert [len(line.take(lambda _: 8)) for _ in range(3)] == [1, 1, 1]


@pytest.mark.parametrize("places", [(), (0,), (1,), (2,), (0, 2)])
@pytest.mark.parametrize("dialect", [openai, native])
def test_whichever_picture_the_store_did_not_take_is_told(dialect: Any, places: tuple[int, ...]) -> None:
    pictures = [
        Picture(
            b"drawn",
            "png",
            RECIPE,
            stages={"denoise": 1.0},
            **({"undelivered": "it is down"} if n in places else {"url": "https://store/a"}),
        )  # type: ignore[arg-type]
        for n in range(3)
    ]
    body = dialect.render(ImageRequest(prompt="x", n=3), find("spark"), pictures, 1.0)
    assert ("delivery" in body) == bool(places)
    assert ("it is down" in body.get("delivery", "")) == bool(places)
    given = body.get("data") or body["images"]
    assert ["url" in each for each in given] == [n not in places for n in range(3)]
