"""Places in line for who was let in by the head of its request: whose they are, how many, for how long."""

import asyncio
import contextvars
import math
from collections.abc import Callable

import pytest

from fakes import RECIPE
from handler.core.errors import QueueFull
from handler.engine import places
from handler.engine.pace import Pace
from handler.engine.places import Places
from handler.engine.queue import Job, Queue

FITTED = Pace().after([1.0], 10.0)


def elsewhere(act: Callable[[], object]) -> object:
    """As another request does."""
    return contextvars.Context().run(act)


def test_a_place_counts_for_all_others_until_it_is_given_back() -> None:
    queue = Queue(2, 100)
    leave = queue.places.take()
    elsewhere(lambda: queue.require_room(Pace()))
    job = Job(RECIPE, lambda *_: None, 1.0, math.inf, lambda *_: None)
    elsewhere(lambda: queue.join([job], Pace(), admitted=False))
    queue.require_room(Pace())
    with pytest.raises(QueueFull, match="2 requests are waiting already"):
        elsewhere(lambda: queue.require_room(Pace()))
    leave()
    elsewhere(lambda: queue.require_room(Pace()))
    leave()


def test_a_place_is_no_work_that_others_wait_for() -> None:
    queue = Queue(8, 100)
    queue.places.take()
    elsewhere(lambda: queue.require_room(FITTED, 5.0))


def test_half_of_all_are_kept_and_no_more() -> None:
    kept = Places(8)
    for _ in range(20):
        elsewhere(kept.take)
    assert kept.others == 4


def test_a_body_that_never_comes_does_not_keep_the_only_place() -> None:
    queue = Queue(1, 100)
    queue.places.take()
    elsewhere(lambda: queue.require_room(Pace()))


def test_a_place_is_not_kept_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = Places(8)
    monkeypatch.setattr(places, "KEPT_S", 0.0)
    elsewhere(kept.take)
    assert kept.others == 0


def test_what_a_request_does_in_other_tasks_has_its_place() -> None:
    kept = Places(8)

    async def request() -> int:
        kept.take()
        joining = asyncio.create_task(asyncio.to_thread(kept.leave))
        await joining
        return elsewhere(lambda: kept.others)  # type: ignore[return-value]

    assert asyncio.run(request()) == 0
