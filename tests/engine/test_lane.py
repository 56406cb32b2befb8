"""Queueing, cancelling and failing, with a fake family under the real worker and engine."""

import asyncio
import base64
import gc
import logging
import math
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from fakes import RECIPE, FakeFamily, raises
from handler import Api, Engine, Settings
from handler.core.errors import (
    Cancelled,
    DeadlineExceeded,
    DeviceLost,
    Exhausted,
    Internal,
    KindlingError,
    NotReady,
    NumericalError,
    OutOfMemory,
    QueueFull,
    SettingsError,
    StartError,
)
from handler.core.recipe import Picture, Pixels, Preview, Recipe
from handler.core.tracebacks import UNSAID
from handler.engine.pace import Pace, Run
from handler.engine.queue import Job, why_full
from handler.model.faults import meaning
from threads import Seconds, have_ended, until

ROUTE = "/v1/images/generations"


@pytest.fixture
def engine(family: FakeFamily) -> Iterator[Engine]:
    with family.engine(queue=2) as engine:
        yield engine


def test_draws_in_order_and_times_the_stages(family: FakeFamily) -> None:
    family.gate = threading.Event()

    async def main(engine: Engine) -> None:
        tasks = [asyncio.create_task(engine.submit(replace(RECIPE, seed=seed))) for seed in (7, 5, 6)]
        assert await asyncio.to_thread(family.entered.wait, 10)
        assert (engine.drawing, engine.waiting, engine.busy) == (1, 2, True)
        assert family.gate
        family.gate.set()
        for pixels, stages in await asyncio.gather(*tasks):
            assert pixels.rgb.shape == (256, 256, 3)
            assert list(stages) == ["queue", "encode", "denoise", "decode"]
            assert all(seconds > 0 for seconds in stages.values())
        assert (engine.drawing, engine.waiting, engine.busy) == (0, 0, False)  # as soon as the last one has its answer

    with family.engine() as engine:
        assert (engine.drawing, engine.waiting, engine.busy) == (0, 0, False)
        asyncio.run(main(engine))
    assert family.drawn == [7, 5, 6]


def test_a_picture_that_has_its_answer_is_drawn_for_nobody(engine: Engine, family: FakeFamily) -> None:
    """Though what came of it may still be put away, or its last step go on."""
    put_away: list[int] = []
    rest = engine._executor.watch.rest
    engine._executor.watch.rest = lambda: (put_away.append(engine.drawing), rest())[1]  # type: ignore[method-assign,func-returns-value]
    asyncio.run(engine.submit(RECIPE))
    family.at_step = {2: lambda: (engine._executor.jobs[0].end(Cancelled("gone")), put_away.append(engine.drawing))}
    with pytest.raises(Cancelled):
        asyncio.run(engine.submit(RECIPE))
    until(lambda: not engine._executor.jobs)
    assert put_away == [0, 0, 0]


def test_a_full_queue_refuses_and_harms_nobody(engine: Engine, family: FakeFamily) -> None:
    family.gate = threading.Event()

    async def main() -> None:
        running = asyncio.create_task(engine.submit(RECIPE))
        assert await asyncio.to_thread(family.entered.wait, 10)
        waiting = [asyncio.create_task(engine.submit(RECIPE)) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(QueueFull):
            await engine.submit(RECIPE)
        assert engine.waiting == 2
        assert family.gate
        family.gate.set()
        await asyncio.gather(running, *waiting)

    asyncio.run(main())
    assert len(family.drawn) == 3


def test_cancelling_stops_at_the_next_step(engine: Engine, family: FakeFamily) -> None:
    family.gate = threading.Event()

    async def main() -> None:
        task = asyncio.create_task(engine.submit(RECIPE))
        queued = asyncio.create_task(engine.submit(RECIPE))
        assert await asyncio.to_thread(family.entered.wait, 10)
        task.cancel()
        queued.cancel()
        await asyncio.gather(task, queued, return_exceptions=True)
        assert task.cancelled()
        assert family.gate
        family.gate.set()
        await engine.submit(RECIPE)

    asyncio.run(main())
    assert family.drawn == [1]
    assert family.steps_run == 1 + RECIPE.steps


@pytest.mark.parametrize("end", ["drawn", "failed", "cancelled", "late"])
def test_nothing_of_a_picture_is_left_to_the_garbage_collector(engine: Engine, family: FakeFamily, end: str) -> None:
    """What it frees, it frees late: until then pictures, and what a GPU holds of them, would pile up."""
    asked = {"prompt": "x", "seed": 1, "size": "64x64"}

    async def ask() -> None:
        api, loop, gone = Api(engine), asyncio.get_running_loop(), threading.Event()
        call = asyncio.create_task(api.call(ROUTE, asked))
        call.add_done_callback(lambda _: gone.set())
        ends: dict[str, Callable[[], object]] = {
            "failed": raises(NumericalError("NaN")),
            "late": lambda: engine._executor.jobs[0].end(DeadlineExceeded("late")),
            "cancelled": lambda: (loop.call_soon_threadsafe(call.cancel), gone.wait(60)),
        }
        family.at_step = {2: ends[end]} if end in ends else {}
        await asyncio.wait([call])
        family.at_step = {}
        assert (await api.call(ROUTE, asked)).status == 200  # so the engine is done with the one before

    asyncio.run(ask())
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        asyncio.run(ask())
        gc.collect()
        kinds = (torch.Tensor, np.ndarray, Job, Pixels, Picture, Recipe)
        left = [type(each).__name__ for each in gc.garbage if isinstance(each, kinds)]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
    assert not left


@pytest.mark.parametrize("error", [NumericalError("NaN"), Cancelled("enough")])
def test_a_failed_picture_leaves_the_lane_healthy(engine: Engine, family: FakeFamily, error: Exception) -> None:
    family.at_step = {2: raises(error)}
    with pytest.raises(type(error)):
        asyncio.run(engine.submit(RECIPE))
    family.at_step = {}
    asyncio.run(engine.submit(RECIPE))
    assert engine.state == "ready"


def test_a_bug_is_logged_but_not_told(engine: Engine, family: FakeFamily, caplog: pytest.LogCaptureFixture) -> None:
    family.at_step = {1: raises(ZeroDivisionError("secret detail"))}
    with caplog.at_level(logging.ERROR), pytest.raises(Internal) as caught:
        asyncio.run(engine.submit(RECIPE))
    assert "secret" not in caught.value.message
    assert "ZeroDivisionError" in caplog.text
    assert "secret" not in caplog.text.replace('ZeroDivisionError("secret detail")', "")  # but for a line of this file


@pytest.mark.parametrize("at_once", [1, 2])
@pytest.mark.parametrize(
    "error",
    [
        ValueError("no such token: xylocanary"),
        RuntimeError("Cannot forward both `negative_prompt`: a xylocanary swamp and `negative_prompt_embeds`"),
        RuntimeError("CUDA error: an illegal memory access was encountered (xylocanary)"),
    ],
)
def test_an_error_that_quotes_a_negative_prompt_is_told_to_nobody(
    family: FakeFamily, error: Exception, at_once: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither in the log nor in the answer; the prompt itself has other words."""
    asked = {"prompt": "a red circle", "negative_prompt": "a xylocanary swamp", "n": at_once, "num_inference_steps": 2}
    family.at_step = {1: raises(error)}
    with caplog.at_level(logging.DEBUG), family.engine(model="qwen-image", batch=at_once) as engine:
        reply = asyncio.run(Api(engine).call("/generate", asked))
    assert reply.status == 500
    assert type(error).__name__ in caplog.text
    assert UNSAID in caplog.text
    assert "canary" not in caplog.text + str(reply.body)


def test_a_lost_device_fails_the_worker_for_good(engine: Engine, family: FakeFamily) -> None:
    family.at_step = {1: raises(RuntimeError("CUDA error: an illegal memory access was encountered"))}
    with pytest.raises(DeviceLost):
        asyncio.run(engine.submit(RECIPE))
    assert engine.state == "failed"
    with pytest.raises(StartError):
        asyncio.run(engine.submit(RECIPE))


def test_requests_wait_for_the_boot(family: FakeFamily) -> None:
    gate = threading.Event()

    def slow(settings, clock):
        assert gate.wait(60)
        return family.boot(settings, clock)

    engine = Engine(Settings(), boot=slow)
    engine.start()

    async def main() -> None:
        task = asyncio.create_task(engine.submit(RECIPE))
        await asyncio.sleep(0)
        assert engine.state == "starting"
        gate.set()
        await task

    asyncio.run(main())
    assert engine.state == "ready"
    engine.stop()


def test_a_failed_boot_answers_whoever_waits() -> None:
    gate = threading.Event()

    def broken(settings, clock):
        assert gate.wait(60)
        raise SettingsError("no such disk")

    engine = Engine(Settings(), boot=broken)
    engine.start()

    async def main() -> None:
        task = asyncio.create_task(engine.submit(RECIPE))
        await asyncio.sleep(0)
        gate.set()
        with pytest.raises(StartError, match="no such disk"):
            await task

    asyncio.run(main())
    with pytest.raises(StartError):
        engine.wait_booted()


def test_stopping_finishes_the_picture_and_refuses_the_rest(engine: Engine, family: FakeFamily) -> None:
    family.gate = threading.Event()

    async def main() -> None:
        running = asyncio.create_task(engine.submit(RECIPE))
        assert await asyncio.to_thread(family.entered.wait, 10)
        queued = asyncio.create_task(engine.submit(RECIPE))
        await asyncio.sleep(0)
        stopping = asyncio.create_task(asyncio.to_thread(engine.stop))
        with pytest.raises(NotReady):
            await queued
        assert family.gate
        family.gate.set()
        await asyncio.gather(running, stopping)
        with pytest.raises(NotReady):
            await engine.submit(RECIPE)

    asyncio.run(main())


def test_a_lane_that_drains_goes_on_with_what_it_accepted(engine: Engine, family: FakeFamily) -> None:
    family.gate = threading.Event()

    async def main() -> None:
        running = asyncio.create_task(engine.submit(RECIPE))
        assert await asyncio.to_thread(family.entered.wait, 10)
        queued = asyncio.create_task(engine.submit(RECIPE))
        await asyncio.sleep(0)
        engine.drain()
        with pytest.raises(NotReady):
            await engine.submit(RECIPE)
        assert family.gate
        family.gate.set()
        await asyncio.gather(running, queued, engine.submit(RECIPE, admitted=True))

    asyncio.run(main())
    assert (engine.state, len(family.drawn)) == ("draining", 3)


@pytest.mark.parametrize(("how", "rounds"), [("cancel", 100), ("deadline", 100), ("abort", 1)])
def test_what_ends_while_it_is_finished_ends_once(engine: Engine, family: FakeFamily, how: str, rounds: int) -> None:
    """In every round the last step and another end meet at a barrier; either may win, and only one."""
    barrier, jobs = threading.Barrier(2), []

    def meet() -> None:
        jobs.extend(engine._executor.jobs)
        barrier.wait(60)

    family.at_step = {RECIPE.steps: meet}

    async def one() -> str:
        task = asyncio.create_task(engine.submit(RECIPE))
        await asyncio.sleep(0)
        barrier.wait(60)
        end = {"cancel": task.cancel, "abort": engine.abort, "deadline": lambda: jobs[-1].end(DeadlineExceeded("late"))}
        end[how]()
        try:
            await task
        except asyncio.CancelledError:
            return "cancelled"
        except KindlingError as error:
            return error.code
        return "drawn"

    async def main() -> list[str]:
        return [await one() for _ in range(rounds)]

    told, counted = Counter(asyncio.run(main())), {outcome: count for (outcome, _), count in engine.queue.ended.items()}
    assert sum(counted.values()) == rounds
    assert counted == told or how == "cancel"  # who goes away does not hear that the picture was drawn
    if how != "abort":
        family.at_step = {}
        asyncio.run(engine.submit(RECIPE))  # the next is not hit
        assert family.drawn[-1] == 1


@pytest.mark.parametrize(
    ("waiting", "wait_s", "left_s", "says"),
    [
        (0, 0.0, 1.0, ""),
        (1, 9.0, math.inf, ""),
        (2, 0.0, math.inf, "2 requests are waiting already"),
        (1, 11.0, math.inf, "about 11 s, more than the 10 s allowed"),
        (1, 9.0, 8.0, "about 9 s, more than this request may take"),
    ],
)
def test_who_may_join_the_line(waiting: int, wait_s: float, left_s: float, says: str) -> None:
    found = why_full(waiting, wait_s, left_s, most=2, most_s=10)
    assert says in found
    assert bool(says) == bool(found)


def test_what_waits_is_measured_by_its_work(family: FakeFamily) -> None:
    engine = Engine(Settings(queue=100, queue_s=100), boot=family.boot)
    family.gate = threading.Event()
    engine.start()

    async def main() -> None:
        running = asyncio.create_task(engine.submit(RECIPE))
        assert await asyncio.to_thread(family.entered.wait, 10)
        engine._executor.pace = Pace.of((Run(1.0, 10.0), Run(2.0, 20.0)))
        large = replace(RECIPE, size=(512, 512), steps=8)
        waiting = [asyncio.create_task(engine.submit(each)) for each in (RECIPE, large)]
        await asyncio.sleep(0)
        with pytest.raises(QueueFull, match="about 90 s") as caught:
            await engine.submit(RECIPE, deadline=time.perf_counter() + 80)
        assert caught.value.retry_s == 90
        waiting.append(asyncio.create_task(engine.submit(replace(RECIPE, steps=8))))
        await asyncio.sleep(0)
        with pytest.raises(QueueFull, match="110 s, more than the 100 s allowed"):
            await engine.submit(RECIPE)
        assert family.gate
        family.gate.set()
        await asyncio.gather(running, *waiting)

    asyncio.run(main())
    engine.stop()


def test_what_was_cancelled_leaves_its_place_in_line(engine: Engine, family: FakeFamily) -> None:
    family.gate = threading.Event()

    async def main() -> None:
        running = asyncio.create_task(engine.submit(RECIPE))
        assert await asyncio.to_thread(family.entered.wait, 10)
        for _ in range(10):
            gone = asyncio.create_task(engine.submit(RECIPE))
            await asyncio.sleep(0)
            gone.cancel()
            await asyncio.gather(gone, return_exceptions=True)
        assert engine.waiting == 0
        assert family.gate
        family.gate.set()
        await running

    asyncio.run(main())
    assert engine.queue.ended == {("cancelled", "queue"): 10, ("drawn", "denoise"): 1}


def test_a_step_that_hangs_fails_the_lane_and_nobody_waits_for_it(
    family: FakeFamily, caplog: pytest.LogCaptureFixture
) -> None:
    engine = Engine(Settings(hang_s=0.2), boot=family.boot)
    family.gate = threading.Event()
    engine.start()

    async def main() -> None:
        hung, queued = (asyncio.create_task(engine.submit(RECIPE)) for _ in range(2))
        with pytest.raises(DeviceLost):
            await hung
        with pytest.raises(StartError):
            await queued

    asyncio.run(main())
    assert engine.state == "failed"
    engine.stop()
    assert engine.alive
    assert "fakes.py" in caplog.text  # where it hangs
    family.gate.set()
    while engine.alive:
        threading.Event().wait(0.01)
    assert family.drawn == []


def test_steps_that_end_in_time_are_no_hang(family: FakeFamily, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though all of them together take longer than one may. By a clock that is moved."""
    clock, left = Seconds(), list[float]()
    monkeypatch.setattr("handler.engine.watchdog.time", SimpleNamespace(monotonic=clock))
    with family.engine(hang_s=60) as engine:

        def takes() -> None:
            clock.pass_s(50)
            left.append((engine._executor.watch._due or 0.0) - clock())

        family.at_step = dict.fromkeys(range(1, 9), takes)
        asyncio.run(engine.submit(replace(RECIPE, steps=8)))
        assert engine.state == "ready"
    assert left == [10.0] * 8


def test_the_first_failure_is_the_cause_that_is_told(family: FakeFamily) -> None:
    """A step that hangs fails the engine, and fails otherwise once it goes on."""
    family.gate = threading.Event()
    family.at_step = {1: raises(RuntimeError("CUDA error: an illegal memory access was encountered"))}
    engine = Engine(Settings(hang_s=0.2), boot=family.boot)
    engine.start()
    with pytest.raises(DeviceLost, match="does not answer"):
        asyncio.run(engine.submit(RECIPE))
    cause = engine.error
    family.gate.set()
    assert have_ended(engine._thread)
    assert engine.error is cause
    assert engine.error
    assert engine.error.message.startswith("The GPU does not answer")
    engine.stop()


@pytest.mark.parametrize(("started", "told"), [(0.0, 5), (0.4, 1), (33.2, 34), (119.5, 120), (500.0, 120)])
def test_a_worker_that_failed_says_how_long_another_takes_to_start(
    family: FakeFamily, started: float, told: int
) -> None:
    family.at_step = {1: raises(RuntimeError("CUDA error: an illegal memory access was encountered"))}
    with family.engine() as engine:
        engine.ledger.total_s = started
        with pytest.raises(DeviceLost):
            asyncio.run(engine.submit(RECIPE))
        reply = asyncio.run(Api(engine).call("/generate", {"prompt": "x"}))
    assert (reply.status, reply.headers) == (503, {"retry-after": str(told)})


def test_a_start_that_failed_says_what_it_says_itself() -> None:
    cause = SettingsError("no such disk", retry_s=77)
    engine = Engine(Settings(), boot=lambda *_: raises(cause)())
    engine.start()
    with pytest.raises(SettingsError):
        engine.wait_booted()
    assert engine.error is cause
    assert cause.retry_s == 77
    engine.stop()


def test_running_out_of_memory_lets_go_of_all_that_was_made(engine: Engine, family: FakeFamily) -> None:
    made: list[weakref.ref[torch.Tensor]] = []

    def spike() -> None:
        large = torch.zeros(1_000_000)
        made.append(weakref.ref(large))
        if len(made) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    family.at_step = {2: spike}
    with pytest.raises(OutOfMemory) as caught:
        asyncio.run(engine.submit(RECIPE))
    assert caught.value.param == "size"
    assert made[0]() is None  # though somebody still holds the error
    assert engine.state == "ready"


@pytest.mark.parametrize("good", [0, 1, 2])
def test_three_times_out_of_memory_in_a_row_are_enough(engine: Engine, family: FakeFamily, good: int) -> None:
    """With a good picture after `good` of them the count begins again."""

    def fail_once() -> None:
        family.at_step = {}  # the canary can be drawn
        raise torch.OutOfMemoryError("CUDA out of memory.")

    for turn in range(3):
        if turn == good and turn:
            asyncio.run(engine.submit(RECIPE))
        family.at_step = {1: fail_once}
        with pytest.raises(OutOfMemory) as caught:
            asyncio.run(engine.submit(RECIPE))
        assert caught.value.fatal == (turn == 2 and not good)
    assert engine.state == ("ready" if good else "failed")


def test_a_worker_that_cannot_draw_even_a_small_picture_has_failed(engine: Engine, family: FakeFamily) -> None:
    family.at_step = {1: raises(torch.OutOfMemoryError("CUDA out of memory."))}
    with pytest.raises(Exhausted):
        asyncio.run(engine.submit(RECIPE))
    assert engine.state == "failed"
    assert family.steps_run == 0


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        ("CUDA out of memory. Tried to allocate 2.00 GiB", OutOfMemory),
        ("CUDA error: out of memory", OutOfMemory),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", OutOfMemory),
        ("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes", OutOfMemory),
        ("CUDA error: an illegal memory access was encountered", DeviceLost),
        ("The model did not finish successfully. Error: an illegal memory access was encountered", DeviceLost),
        ("The model did not finish successfully. Error: out of memory", OutOfMemory),
        ("CUDA error: device-side assert triggered", DeviceLost),
        ("CUDA error: uncorrectable ECC error encountered", DeviceLost),
        ("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm`", DeviceLost),
        ("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED", DeviceLost),
        ("CUDA driver error: CUDA_ERROR_OUT_OF_MEMORY", OutOfMemory),
        ("hipErrorNotEnough: not enough memory", OutOfMemory),
        ("cuModuleLoadData failed with CUDA_ERROR_ILLEGAL_INSTRUCTION", DeviceLost),
        ("CUDA driver error: unspecified launch failure", DeviceLost),
        ("Triton Error [CUDA]: an illegal instruction was encountered", DeviceLost),
        ("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR", DeviceLost),
        ("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED", RuntimeError),
        ("CUDA error: CUBLAS_STATUS_INVALID_VALUE when calling `cublasSgemm`", RuntimeError),
        ("CUDA error: CUBLAS_STATUS_NOT_SUPPORTED when calling `cublasLtMatmul`", RuntimeError),
        ("The size of tensor a (4) must match the size of tensor b (5)", RuntimeError),
    ],
)
def test_what_an_error_of_torch_means(said: str, kind: type[Exception]) -> None:
    assert type(meaning(RuntimeError(said), (64, 64))) is kind


LOST, FULL, BUG = RuntimeError("CUDA error: lost"), torch.OutOfMemoryError("CUDA out of memory."), ValueError("a bug")
SMALL = "A 64x64 picture does not fit in this worker's memory."


@pytest.mark.parametrize("beneath", [False, True])
@pytest.mark.parametrize(
    ("error", "answers", "kind"),
    [
        (LOST, True, DeviceLost), (DeviceLost("gone"), True, DeviceLost), (BUG, True, ValueError),
        (FULL, True, OutOfMemory), (FULL, False, DeviceLost), (MemoryError(), True, OutOfMemory),
        (OutOfMemory(SMALL, "size"), True, OutOfMemory),
        (Cancelled("CUDA error: out of memory"), True, Cancelled), (KeyError("CUDA error"), True, KeyError),
    ],
)  # fmt: skip
def test_what_an_error_means_is_told_by_all_that_it_came_from(
    error: BaseException, answers: bool, kind: type[BaseException], beneath: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A library may have caught it, and raised another meanwhile; memory is given back where it was too little."""
    given_back: list[str] = []

    def give_back() -> None:
        given_back.append("all")
        if not answers:
            raise LOST

    monkeypatch.setattr(torch.cuda, "empty_cache", give_back)
    seen: BaseException = error
    if beneath:
        seen = IndexError("another")
        seen.__context__ = error
    found = meaning(seen, (64, 64))
    plain = kind not in (OutOfMemory, DeviceLost)
    assert type(found) is (IndexError if plain and beneath else kind)
    if plain or (error is seen and isinstance(error, KindlingError)):
        assert found is seen
    elif kind is OutOfMemory:
        assert (str(found), getattr(found, "param", "")) == (SMALL, "size")
    else:
        assert found.__cause__ is seen
    assert bool(given_back) == (found is not seen and error is not LOST and not isinstance(error, DeviceLost))


def test_pictures_are_drawn_at_once_once_there_is_a_worker_and_while_it_can(family: FakeFamily) -> None:
    assert Engine(Settings(batch=4), boot=family.boot).at_once(RECIPE) == 1
    with family.engine(batch=4) as engine:
        assert engine.at_once(RECIPE) == 4
        engine._executor.together = False  # there was no memory for that
        assert engine.at_once(RECIPE) == 1


def test_api_gives_each_picture_its_seed_and_counts_steps(engine: Engine, family: FakeFamily) -> None:
    steps: list[tuple[int, int]] = []
    shapes = []

    def on_step(done: int, of: int, preview: Preview) -> None:
        steps.append((done, of))
        shapes.append(preview().shape)

    async def main() -> None:
        payload = {"prompt": "x", "n": 3, "seed": 2**64 - 2}
        reply = await Api(engine).call("/generate", payload, on_step)
        assert reply.status == 200
        assert [image["seed"] for image in reply.body["images"]] == [2**64 - 2, 2**64 - 1, 0]

    asyncio.run(main())
    assert steps[-1] == (12, 12)
    assert [done for done, _ in steps] == sorted(done for done, _ in steps)
    assert set(shapes) == {(32, 32, 3)}


def test_partial_pictures_come_before_the_answer(engine: Engine) -> None:
    events: list[dict[str, Any]] = []
    payload = {"prompt": "x", "partial_images": 3, "num_inference_steps": 4}
    call = Api(engine).call("/v1/images/generations", payload, on_partial=events.append)
    assert asyncio.run(call).status == 200
    assert [event["partial_image_index"] for event in events] == [0, 1, 2]
    assert {(event["type"], event["size"], event["output_format"]) for event in events} == {
        ("image_generation.partial_image", "32x32", "png")
    }


def test_api_refuses_partial_pictures_where_nothing_streams(engine: Engine, family: FakeFamily) -> None:
    error = asyncio.run(Api(engine).call("/generate", {"prompt": "x", "partial_images": 1})).body["error"]
    assert (error["code"], error["param"]) == ("unsupported_parameter", "partial_images")
    assert family.drawn == []


@pytest.mark.parametrize("route", ["/generate", "/v1/images/generations"])
def test_an_answer_can_be_had_smaller(engine: Engine, route: str) -> None:
    reply = asyncio.run(Api(engine).call(route, {"prompt": "x", "seed": 1}))
    assert reply.smaller
    body = replace(reply, content=reply.smaller("webp")).body
    [picture] = body.get("data") or body["images"]
    assert base64.b64decode(picture["b64_json"])[8:12] == b"WEBP"
    assert picture.get("format", body.get("output_format")) == "webp"
    assert asyncio.run(Api(engine).call("/v1/models")).smaller is None


def test_api_answers_errors_with_status_envelope_and_retry_advice(engine: Engine, family: FakeFamily) -> None:
    api = Api(engine)

    def call(path: str, payload: object = None):
        return asyncio.run(api.call(path, payload))

    reply = call("/generate", {"prompt": "x", "n": 9})
    assert (reply.status, reply.body["error"]["param"]) == (422, "n")
    assert call("/generate", [1]).body["error"]["code"] == "invalid_type"
    assert call("/nowhere").status == 404
    assert call("/v1/models/flux-dev").body["error"]["code"] == "model_not_found"
    family.at_step = {1: raises(NumericalError("NaN"))}
    reply = call("/generate", {"prompt": "x"})
    assert (reply.status, reply.headers) == (500, {"x-should-retry": "false"})


def test_who_goes_away_leaves_no_error_that_nobody_hears(family: FakeFamily) -> None:
    engine, wrong = Engine(Settings(), boot=family.boot), list[Any]()

    async def main() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: wrong.append(context))
        asked = asyncio.create_task(engine.submit_all([(RECIPE, lambda *_: None)] * 3, math.inf, admitted=False))
        await asyncio.sleep(0)
        asked.cancel()
        await asyncio.wait([asked])
        for _ in range(3):
            await asyncio.sleep(0)
        gc.collect()

    asyncio.run(main())
    assert (engine.queue.ended, wrong) == ({("cancelled", "queue"): 3}, [])


@pytest.mark.parametrize("error", [ZeroDivisionError(), KeyError("x"), SystemExit(3)])
def test_a_bug_in_the_lane_leaves_nobody_waiting(
    engine: Engine, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("handler.engine.executor.Executor.at_once", lambda *_: raises(error)())
    with pytest.raises(StartError, match="see its log"):
        asyncio.run(engine.submit(RECIPE))
    assert engine.state == "failed"
