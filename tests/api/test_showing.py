"""What a streamed request is told while it is drawn."""

import asyncio
import contextlib
import threading
from typing import Any

import numpy as np
import pytest

from handler import ImageRequest
from handler.api.asking import Asked
from handler.api.dialects import openai
from handler.api.showing import OnPartial, Showing
from handler.core.errors import Cancelled

PIXELS = np.zeros((4, 4, 3), np.uint8)


def showing(count: int, on_partial: OnPartial) -> Showing:
    request = ImageRequest(prompt="x", partial_images=count, progress=True, stream=True)
    return Showing(Asked(openai, request), lambda *_: None, on_partial)


@pytest.mark.parametrize(("count", "steps", "told"), [(3, 4, [1, 2, 3]), (3, 8, [2, 4, 6]), (1, 4, [2]), (3, 2, [1])])
def test_partial_pictures_are_spread_over_the_steps(count: int, steps: int, told: list[int]) -> None:
    taken, events = list[int](), list[dict[str, Any]]()

    async def main() -> None:
        async with showing(count, events.append) as shows:
            for done in range(1, steps + 1):
                shows(done, steps, lambda done=done: taken.append(done) or PIXELS)

    asyncio.run(main())
    partials = [event["partial_image_index"] for event in events if "partial_image_index" in event]
    assert (taken, partials) == (told, list(range(len(told))))
    assert [event["steps"] for event in events if "steps" in event] == list(range(1, steps + 1))


def test_they_are_encoded_on_another_thread_and_in_order_and_before_the_last_word() -> None:
    gate, order, threads = threading.Event(), list[int](), set[int]()

    def on_partial(event: dict[str, Any]) -> None:
        if "partial_image_index" in event:
            assert gate.wait(10)
            order.append(event["partial_image_index"])
            threads.add(threading.get_ident())

    async def main() -> None:
        with contextlib.suppress(Cancelled):
            async with showing(3, on_partial) as shows:
                for done in (1, 2, 3):
                    shows(done, 4, lambda: PIXELS)
                assert order == []
                gate.set()
                raise Cancelled("Whatever comes of the picture.")
        assert order == [0, 1, 2]

    asyncio.run(main())
    assert threading.get_ident() not in threads


def test_pictures_that_several_workers_draw_for_one_request_show_each_partial_picture_once() -> None:
    events, making, ended = list[dict[str, Any]](), threading.Event(), threading.Event()

    def preview() -> Any:
        making.set()
        assert ended.wait(10)  # another worker's step, meanwhile
        return PIXELS

    async def main() -> None:
        async with showing(1, events.append) as shows:
            first = threading.Thread(target=shows, args=[2, 4, preview])
            first.start()
            assert making.wait(10)
            shows(3, 4, lambda: PIXELS)
            ended.set()
            first.join()

    asyncio.run(main())
    assert [event["partial_image_index"] for event in events if "partial_image_index" in event] == [0]
