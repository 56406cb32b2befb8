"""The engine in somebody's own program: a context, and pictures by the way that all requests go."""

import asyncio
import base64
import threading
from collections.abc import Callable
from typing import Any
from weakref import ref

import numpy as np
import pytest
from conftest import unwarmed

from fakes import Editor, FakeFamily, raises
from handler import Api, Clock, Engine, Settings, Worker
from handler.api.codec import encode
from handler.core import errors

PNG = encode(np.full((64, 64, 3), 99, np.uint8), "png", 100, None)


def tidying() -> list[threading.Thread]:
    """Who waits for what may still run, to give the memory back."""
    return [thread for thread in threading.enumerate() if thread.name == "tidy"]


def closed(engine: Engine) -> bool:
    """Whether its worker has given the memory back."""
    assert engine.worker
    return engine.worker._runner is None


def embedded(family: FakeFamily, main: Callable[[Engine], Any], **settings: Any) -> Any:
    """What `main` makes of an engine inside its context."""

    async def whole() -> Any:
        async with Engine(Settings(**settings), boot=family.boot) as engine:
            assert engine.state == "ready"
            return await main(engine)

    return asyncio.run(whole())


def test_generate_makes_the_same_pictures_as_the_api(family: FakeFamily) -> None:
    fields = {"seed": 7, "n": 2, "width": 64, "height": 96, "num_inference_steps": 3}

    async def main(engine: Engine) -> None:
        pictures = await engine.generate("a red circle", **fields)
        assert [picture.recipe.seed for picture in pictures] == [7, 8]
        assert {(picture.recipe.size, picture.recipe.steps, picture.format) for picture in pictures} == {
            ((64, 96), 3, "png")
        }
        reply = await Api(engine).call("/generate", {"prompt": "a red circle", **fields})
        assert [picture.data for picture in pictures] == [
            base64.b64decode(each["b64_json"]) for each in reply.body["images"]
        ]

    embedded(family, main)


def test_every_field_of_a_request_may_be_given() -> None:
    async def main(engine: Engine) -> None:
        [picture] = await engine.generate("x", images=[PNG], strength=0.5, output_format="webp", output_compression=80)
        assert (picture.data[:4], picture.recipe.strength) == (b"RIFF", 0.5)
        assert picture.recipe.images[0].rgb.max() == 99

    embedded(Editor(), main)


@pytest.mark.parametrize(
    ("fields", "error", "param"),
    [
        ({"prompt": "x" * 32_001}, errors.OutOfRange, "prompt"),
        ({"colour": "red"}, errors.UnknownParameter, "colour"),
        ({"seed": "7"}, errors.InvalidType, "seed"),
        ({"num_inference_steps": 50}, errors.OutOfRange, "num_inference_steps"),
        ({"model": "flux-dev"}, errors.ModelNotFound, "model"),
        ({"stream": True}, errors.Unsupported, "stream"),
        ({"partial_images": 2}, errors.Unsupported, "partial_images"),
        ({"response_format": "url"}, errors.Unsupported, "response_format"),
        ({"images": [b"junk"]}, errors.InvalidValue, "images"),
    ],
)
def test_what_cannot_be_is_refused_as_everywhere(
    family: FakeFamily, fields: dict[str, Any], error: type[errors.RequestError], param: str
) -> None:
    async def main(engine: Engine) -> None:
        with pytest.raises(error) as told:
            await engine.generate(**{"prompt": "x", **fields})
        assert told.value.param == param
        assert len(await engine.generate("x", model="spark")) == 1

    embedded(family, main)


def test_who_still_deals_with_an_error_goes_on_when_another_is_told_the_same(family: FakeFamily) -> None:
    """Before Python 3.13, letting go of an error ended the coroutines of all who had caught it and waited since."""
    family.at_step = {1: raises(errors.DeviceLost("The GPU is gone."))}

    async def patient(engine: Engine, caught: asyncio.Event, go: asyncio.Event) -> str:
        try:
            await engine.generate("x")
        except errors.StartError as error:
            caught.set()
            await go.wait()
            return error.message
        raise AssertionError

    async def main(engine: Engine) -> None:
        caught, go = asyncio.Event(), asyncio.Event()
        with pytest.raises(errors.DeviceLost):
            await engine.generate("x")
        waiting = asyncio.create_task(patient(engine, caught, go))
        await caught.wait()
        assert (await Api(engine).call("/generate", {"prompt": "x"})).status == 503
        go.set()
        assert await asyncio.wait_for(waiting, 30) == "The GPU is gone."
        assert engine.error
        assert engine.error.__traceback__ is None  # nor does it hold what they hold

    embedded(family, main)


def test_an_engine_that_cannot_start_says_why_and_is_over(family: FakeFamily) -> None:
    def boot(settings: Settings, clock: Clock) -> Worker:
        raise errors.WeightsMissing("There are no weights.")

    async def main() -> None:
        engine = Engine(Settings(), boot=boot)
        with pytest.raises(errors.WeightsMissing, match="no weights"):
            async with engine:
                raise AssertionError
        assert (engine.state, engine.alive) == ("failed", False)

    asyncio.run(main())


def test_who_gives_up_a_start_does_not_wait_for_it(family: FakeFamily) -> None:
    begun, gate = threading.Event(), threading.Event()

    def boot(settings: Settings, clock: Clock) -> Worker:
        begun.set()
        assert gate.wait(30)
        return family.boot(settings, clock)

    async def main() -> Engine:
        engine = Engine(Settings(), boot=boot)
        entering = asyncio.create_task(engine.__aenter__())
        await asyncio.to_thread(begun.wait)
        entering.cancel()
        with pytest.raises(asyncio.CancelledError):
            await entering
        assert (engine.state, engine.ledger.outcome) == ("stopped", "stopped")
        return engine

    engine = asyncio.run(main())
    waiting = tidying()
    gate.set()
    engine._thread.join()
    assert engine.state == "stopped"
    for thread in waiting:
        thread.join()
    assert closed(engine)


def test_at_its_end_what_was_asked_is_drawn_and_nothing_else(family: FakeFamily) -> None:
    family.gate = threading.Event()

    async def main() -> None:
        engine = Engine(Settings(batch=1), boot=family.boot)
        await engine.__aenter__()
        asked = [asyncio.create_task(engine.generate("x", seed=seed, n=2)) for seed in (10, 20)]
        await asyncio.to_thread(family.entered.wait)
        leaving = asyncio.create_task(engine.__aexit__(None, None, None))
        while engine.state != "draining":
            await asyncio.sleep(0)
        with pytest.raises(errors.NotReady):
            await engine.generate("x")
        assert family.gate
        family.gate.set()
        found = await asyncio.gather(*asked)
        assert [[picture.recipe.seed for picture in each] for each in found] == [[10, 11], [20, 21]]
        await leaving
        assert (engine.state, engine.alive, engine.busy) == ("stopped", False, False)
        with pytest.raises(errors.NotReady):
            await engine.generate("x")

    asyncio.run(main())


def test_an_error_that_ends_it_ends_what_is_drawn(family: FakeFamily) -> None:
    family.gate = threading.Event()

    async def main() -> None:
        engine = Engine(Settings(), boot=family.boot)
        asked = list[asyncio.Task[Any]]()

        async def broken() -> None:
            async with engine:
                asked.append(asyncio.create_task(engine.generate("x")))
                await asyncio.to_thread(family.entered.wait)
                asked[0].add_done_callback(lambda _: family.gate and family.gate.set())
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            await broken()
        with pytest.raises(errors.NotReady):
            await asked[0]
        assert not engine.alive
        assert family.steps_run == 1

    asyncio.run(main())


def test_at_an_error_a_step_that_takes_long_is_waited_for(family: FakeFamily, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("handler.engine.engine.TIDY_S", 0.0)
    gate = family.gate = threading.Event()

    class Slow(Engine):
        def stop(self) -> None:
            super().stop()
            gate.set()

    async def broken() -> None:
        async with Slow(Settings(), boot=family.boot) as engine:
            asked.append(asyncio.create_task(engine.generate("x")))
            engines.append(engine)
            await asyncio.to_thread(family.entered.wait)
            raise ZeroDivisionError

    asked, engines = list[asyncio.Task[Any]](), list[Engine]()

    async def main() -> None:
        with pytest.raises(ZeroDivisionError):
            await broken()
        with pytest.raises(errors.NotReady):
            await asked[0]

    asyncio.run(main())
    assert not engines[0].alive
    assert engines[0].worker
    with pytest.raises(errors.NotReady, match="closed"):
        engines[0].worker.draw([], [])


def test_an_engine_draws_only_once_started_and_starts_once(family: FakeFamily) -> None:
    async def main() -> None:
        engine = Engine(Settings(), boot=family.boot)
        with pytest.raises(RuntimeError, match="async with engine"):
            await engine.generate("x")
        async with engine:
            with pytest.raises(RuntimeError, match="make a new Engine"):
                await engine.__aenter__()
            assert len(await engine.generate("x")) == 1
        with pytest.raises(RuntimeError, match="make a new Engine"):
            await engine.__aenter__()

    asyncio.run(main())


def test_memory_is_given_back_after_a_last_step_that_takes_long(
    family: FakeFamily, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("handler.engine.engine.TIDY_S", 0.0)
    gate = family.gate = threading.Event()

    async def main() -> None:
        engine = await Engine(Settings(), boot=family.boot).__aenter__()
        asked = asyncio.create_task(engine.generate("x"))
        await asyncio.to_thread(family.entered.wait)
        leaving = asyncio.create_task(engine.__aexit__(ZeroDivisionError, ZeroDivisionError(), None))
        with pytest.raises(errors.NotReady):
            await asked
        while not (leaving.done() or tidying()):
            await asyncio.sleep(0)
        gate.set()
        await leaving
        assert closed(engine)

    asyncio.run(main())


def test_who_cancels_stops_the_picture_at_its_next_step(family: FakeFamily) -> None:
    family.gate = threading.Event()

    async def main(engine: Engine) -> None:
        asked = asyncio.create_task(engine.generate("x"))
        await asyncio.to_thread(family.entered.wait)
        asked.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asked
        assert family.gate
        family.gate.set()
        [picture] = await engine.generate("x", seed=9)
        assert picture.recipe.seed == 9
        assert family.drawn == [9]

    embedded(family, main)


def test_an_engine_that_fails_says_so(family: FakeFamily) -> None:
    family.at_step = {1: raises(errors.DeviceLost("The GPU failed."))}

    async def main(engine: Engine) -> None:
        with pytest.raises(errors.DeviceLost):
            await engine.generate("x")
        with pytest.raises(errors.StartError):
            await engine.generate("x")

    embedded(family, main)


def test_a_real_model_draws_and_its_memory_is_given_back() -> None:
    async def main() -> None:
        with unwarmed():
            async with Engine(Settings(), Clock.anew(240)) as engine:
                [picture] = await engine.generate("a red circle on a blue background", seed=7, width=64, height=64)
                assert engine.worker
                weights = ref(engine.worker._pipeline.transformer)
        assert picture.data.startswith(b"\x89PNG")
        assert picture.stages.keys() >= {"queue", "encode", "denoise", "decode", "serialize"}
        assert weights() is None

    asyncio.run(main())
