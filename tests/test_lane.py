"""Queueing, cancelling and failing, with a fake family under the real worker and lane."""

import asyncio
import base64
import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fakes import FakeFamily, raises
from handler import Api, ImageRequest, Lane, Settings, StartError
from handler.errors import Cancelled, DeviceLost, Internal, NotReady, NumericalError, QueueFull, SettingsError
from handler.preview import Preview

RECIPE = Lane(Settings()).spec.recipe(ImageRequest(prompt="x", seed=1))


@pytest.fixture
def family() -> FakeFamily:
    return FakeFamily()


@pytest.fixture
def lane(family: FakeFamily) -> Iterator[Lane]:
    lane = Lane(Settings(queue=2), boot=family.boot)
    lane.start()
    lane.wait_booted()
    yield lane
    if family.gate:
        family.gate.set()
    lane.stop()


def test_draws_in_order_and_times_the_stages(lane: Lane, family: FakeFamily) -> None:
    async def main() -> None:
        pixels, stages = await lane.submit(RECIPE)
        assert pixels.rgb.shape == (256, 256, 3)
        assert list(stages) == ["queue", "encode", "denoise", "decode"]
        assert all(seconds >= 0 for seconds in stages.values())

    asyncio.run(main())


def test_a_full_queue_refuses_and_harms_nobody(lane: Lane, family: FakeFamily) -> None:
    family.gate = threading.Event()

    async def main() -> None:
        running = asyncio.create_task(lane.submit(RECIPE))
        assert await asyncio.to_thread(family.entered.wait, 10)
        waiting = [asyncio.create_task(lane.submit(RECIPE)) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(QueueFull):
            await lane.submit(RECIPE)
        assert lane.waiting == 2
        assert family.gate
        family.gate.set()
        await asyncio.gather(running, *waiting)

    asyncio.run(main())
    assert len(family.drawn) == 3


def test_cancelling_stops_at_the_next_step(lane: Lane, family: FakeFamily) -> None:
    family.gate = threading.Event()

    async def main() -> None:
        task = asyncio.create_task(lane.submit(RECIPE))
        queued = asyncio.create_task(lane.submit(RECIPE))
        assert await asyncio.to_thread(family.entered.wait, 10)
        task.cancel()
        queued.cancel()
        await asyncio.gather(task, queued, return_exceptions=True)
        assert task.cancelled()
        assert family.gate
        family.gate.set()
        await lane.submit(RECIPE)

    asyncio.run(main())
    assert family.drawn == [1]
    assert family.steps_run == 1 + RECIPE.steps


@pytest.mark.parametrize("error", [NumericalError("NaN"), Cancelled("enough")])
def test_a_failed_picture_leaves_the_lane_healthy(lane: Lane, family: FakeFamily, error: Exception) -> None:
    family.at_step = {2: raises(error)}
    with pytest.raises(type(error)):
        asyncio.run(lane.submit(RECIPE))
    family.at_step = {}
    asyncio.run(lane.submit(RECIPE))
    assert lane.state == "ready"


def test_a_bug_is_logged_but_not_told(lane: Lane, family: FakeFamily, caplog: pytest.LogCaptureFixture) -> None:
    family.at_step = {1: raises(ZeroDivisionError("secret detail"))}
    with caplog.at_level(logging.ERROR), pytest.raises(Internal) as caught:
        asyncio.run(lane.submit(RECIPE))
    assert "secret" not in caught.value.message
    assert "secret detail" in caplog.text


def test_a_lost_device_fails_the_worker_for_good(lane: Lane, family: FakeFamily) -> None:
    family.at_step = {1: raises(RuntimeError("CUDA error: an illegal memory access was encountered"))}
    with pytest.raises(DeviceLost):
        asyncio.run(lane.submit(RECIPE))
    assert lane.state == "failed"
    with pytest.raises(StartError):
        asyncio.run(lane.submit(RECIPE))


def test_requests_wait_for_the_boot(family: FakeFamily) -> None:
    gate = threading.Event()

    def slow(settings, clock):
        assert gate.wait(10)
        return family.boot(settings, clock)

    lane = Lane(Settings(), boot=slow)
    lane.start()

    async def main() -> None:
        task = asyncio.create_task(lane.submit(RECIPE))
        await asyncio.sleep(0)
        assert lane.state == "starting"
        gate.set()
        await task

    asyncio.run(main())
    assert lane.state == "ready"
    lane.stop()


def test_a_failed_boot_answers_whoever_waits() -> None:
    gate = threading.Event()

    def broken(settings, clock):
        assert gate.wait(10)
        raise SettingsError("no such disk")

    lane = Lane(Settings(), boot=broken)
    lane.start()

    async def main() -> None:
        task = asyncio.create_task(lane.submit(RECIPE))
        await asyncio.sleep(0)
        gate.set()
        with pytest.raises(StartError, match="no such disk"):
            await task

    asyncio.run(main())
    with pytest.raises(StartError):
        lane.wait_booted()


def test_stopping_finishes_the_picture_and_refuses_the_rest(lane: Lane, family: FakeFamily) -> None:
    family.gate = threading.Event()

    async def main() -> None:
        running = asyncio.create_task(lane.submit(RECIPE))
        assert await asyncio.to_thread(family.entered.wait, 10)
        queued = asyncio.create_task(lane.submit(RECIPE))
        await asyncio.sleep(0)
        stopping = asyncio.create_task(asyncio.to_thread(lane.stop))
        with pytest.raises(NotReady):
            await queued
        assert family.gate
        family.gate.set()
        await asyncio.gather(running, stopping)
        with pytest.raises(NotReady):
            await lane.submit(RECIPE)

    asyncio.run(main())


def test_api_gives_each_picture_its_seed_and_counts_steps(lane: Lane, family: FakeFamily) -> None:
    steps: list[tuple[int, int]] = []
    shapes = []

    def on_step(done: int, of: int, preview: Preview) -> None:
        steps.append((done, of))
        shapes.append(preview().shape)

    async def main() -> None:
        payload = {"prompt": "x", "n": 3, "seed": 2**31 - 2}
        reply = await Api(lane).call("/generate", payload, on_step)
        assert reply.status == 200
        assert [image["seed"] for image in reply.body["images"]] == [2**31 - 2, 2**31 - 1, 0]

    asyncio.run(main())
    assert steps[-1] == (12, 12)
    assert [done for done, _ in steps] == sorted(done for done, _ in steps)
    assert set(shapes) == {(32, 32, 3)}


@pytest.mark.parametrize(("asked", "steps", "told"), [(3, 4, [1, 2, 3]), (3, 8, [2, 4, 6]), (1, 4, [2]), (3, 2, [1])])
def test_api_spreads_partial_pictures_over_the_steps(lane: Lane, asked: int, steps: int, told: list[int]) -> None:
    done, events = [0], []

    def on_partial(event: dict[str, Any]) -> None:
        events.append((done[-1], event))

    payload = {"prompt": "x", "partial_images": asked, "num_inference_steps": steps}
    call = Api(lane).call("/v1/images/generations", payload, lambda step, *_: done.append(step), on_partial)
    assert asyncio.run(call).status == 200
    assert [step for step, _ in events] == told
    assert [event["partial_image_index"] for _, event in events] == list(range(len(told)))
    assert {(event["type"], event["size"], event["output_format"]) for _, event in events} == {
        ("image_generation.partial_image", "32x32", "png")
    }


def test_api_refuses_partial_pictures_where_nothing_streams(lane: Lane, family: FakeFamily) -> None:
    error = asyncio.run(Api(lane).call("/generate", {"prompt": "x", "partial_images": 1})).body["error"]
    assert (error["code"], error["param"]) == ("unsupported_parameter", "partial_images")
    assert family.drawn == []


@pytest.mark.parametrize("route", ["/generate", "/v1/images/generations"])
def test_an_answer_can_be_had_smaller(lane: Lane, route: str) -> None:
    reply = asyncio.run(Api(lane).call(route, {"prompt": "x", "seed": 1}))
    assert reply.smaller
    body = reply.smaller("webp")
    [picture] = body.get("data") or body["images"]
    assert base64.b64decode(picture["b64_json"])[8:12] == b"WEBP"
    assert picture.get("format", body.get("output_format")) == "webp"
    assert asyncio.run(Api(lane).call("/v1/models")).smaller is None


def test_api_answers_errors_with_status_envelope_and_retry_advice(lane: Lane, family: FakeFamily) -> None:
    api = Api(lane)

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


def test_stopping_waits_for_what_is_being_published() -> None:
    begun, go, done = threading.Event(), threading.Event(), []

    def publish(volume: Path) -> Path:
        begun.set()
        assert go.wait(10)
        done.append(volume)
        return volume

    worker: Any = SimpleNamespace(unpublished=True, publish=publish)
    lane = Lane(Settings(), boot=lambda *_: worker)
    lane.start()
    lane.wait_booted()
    assert begun.wait(10)
    stopping = threading.Thread(target=lane.stop)
    stopping.start()
    assert not done
    go.set()
    stopping.join(10)
    assert done
