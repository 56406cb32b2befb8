"""Requests that come again under the same key, one event loop's turn after another."""

import asyncio
import math
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import pytest

from handler.deadline import Deadline
from handler.errors import KeyReused
from handler.reply import Reply
from handler.server import repeats
from handler.server.repeats import Repeats

KEY, OTHER = (b"caller", "one"), (b"caller", "two")


class Source:
    """Answers when `go` is set; counts how often it was started, and how often it was cancelled."""

    def __init__(self, status: int = 200, size: int = 3) -> None:
        self.go = asyncio.Event()
        self.started = self.cancelled = 0
        self.status, self.size, self.lasts_s = status, size, math.inf

    async def __call__(self, deadline: Deadline) -> Reply:
        self.started, self.deadline = self.started + 1, deadline
        try:
            await self.go.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        picture: Any = SimpleNamespace(data=bytes(self.size))
        return Reply(self.status, {"turn": self.started}, {"a": "b"}, pictures=(picture,), lasts_s=self.lasts_s)


def in_turns(test: Callable[[], Awaitable[None]]) -> Callable[[], None]:
    """Run an asynchronous test."""

    def run() -> None:
        asyncio.run(test())  # type: ignore[arg-type]

    run.__name__, run.__doc__ = test.__name__, test.__doc__
    return run


async def turns(count: int = 5) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


@in_turns
async def test_without_a_key_every_request_is_its_own() -> None:
    source, known = Source(), Repeats()
    source.go.set()
    assert [(await known.call(None, b"x", source)).body["turn"] for _ in range(2)] == [1, 2]


@in_turns
async def test_the_second_follows_the_first_and_its_pictures_count_once() -> None:
    source, known = Source(), Repeats()
    first, second = (asyncio.create_task(known.call(KEY, b"x", source)) for _ in range(2))
    await turns()
    source.go.set()
    later = await known.call(KEY, b"x", source)
    assert [each.body["turn"] for each in (await first, await second, later)] == [1, 1, 1]
    assert [len(each.pictures) for each in (await first, await second, later)] == [1, 0, 0]
    assert (await second).headers == later.headers == {"a": "b", "idempotent-replayed": "true"}
    assert source.started == 1


@in_turns
async def test_whoever_leaves_ends_nothing_that_another_waits_for() -> None:
    source, known = Source(), Repeats()
    first, second = (asyncio.create_task(known.call(KEY, b"x", source)) for _ in range(2))
    await turns()
    first.cancel()
    await turns()
    source.go.set()
    assert (await second).status == 200
    assert (source.started, source.cancelled) == (1, 0)


@in_turns
async def test_pictures_whose_first_client_left_count_for_the_next() -> None:
    source, known = Source(), Repeats()
    first, second, third = (asyncio.create_task(known.call(KEY, b"x", source)) for _ in range(3))
    await turns()
    first.cancel()
    source.go.set()
    assert [len(each.pictures) for each in (await second, await third)] == [1, 0]


@in_turns
async def test_whom_nobody_comes_back_for_is_ended_and_forgotten() -> None:
    source, known, grace = Source(), Repeats(), repeats.GRACE_S
    repeats.GRACE_S = 0.0
    try:
        only = asyncio.create_task(known.call(KEY, b"x", source))
        await turns()
        only.cancel()
        while not source.cancelled:
            await asyncio.sleep(0)
        source.go.set()
        assert (await known.call(KEY, b"another body", source)).body["turn"] == 2
    finally:
        repeats.GRACE_S = grace


@in_turns
async def test_the_grace_runs_from_the_last_departure() -> None:
    """Who came back and left again has as long to come as who never came back."""
    source, known, loop = Source(), Repeats(), asyncio.get_running_loop()
    handles: list[asyncio.TimerHandle] = []
    later = loop.call_later
    loop.call_later = lambda *args: handles.append(later(*args)) or handles[-1]  # type: ignore
    for _ in range(2):
        waits = asyncio.create_task(known.call(KEY, b"x", source))
        await turns()
        waits.cancel()
        await turns()
    assert [handle.cancelled() for handle in handles] == [True, False]
    assert handles[0].when() < handles[1].when() <= loop.time() + repeats.GRACE_S
    source.go.set()
    assert (await known.call(KEY, b"x", source)).body["turn"] == 1


@in_turns
async def test_whoever_comes_back_in_time_finds_the_job() -> None:
    source, known = Source(), Repeats()
    only = asyncio.create_task(known.call(KEY, b"x", source))
    await turns()
    only.cancel()
    await turns()
    again = asyncio.create_task(known.call(KEY, b"x", source))
    await turns()
    source.go.set()
    assert (await again).body["turn"] == 1
    assert source.cancelled == 0


@in_turns
async def test_whoever_has_little_time_hurries_all_until_it_leaves() -> None:
    source, known, hasty = Source(), Repeats(), Deadline()
    patient = asyncio.create_task(known.call(KEY, b"x", source))
    other = asyncio.create_task(known.call(KEY, b"x", source, hasty))
    await turns()
    hasty.hurry()
    await asyncio.wait_for(source.deadline.short(), 60)
    other.cancel()
    await turns()
    short = asyncio.create_task(source.deadline.short())
    await turns()
    assert not short.done()
    short.cancel()
    source.go.set()
    assert (await patient).status == 200


@in_turns
async def test_a_key_is_for_one_request() -> None:
    source, known = Source(), Repeats()
    source.go.set()
    await known.call(KEY, b"x", source)
    with pytest.raises(KeyReused):
        await known.call(KEY, b"y", source)
    assert (await known.call(OTHER, b"y", source)).body["turn"] == 2


@in_turns
async def test_failures_are_not_kept() -> None:
    source, known = Source(status=500), Repeats()
    source.go.set()
    assert [(await known.call(KEY, b"x", source)).body["turn"] for _ in range(2)] == [1, 2]


@pytest.mark.parametrize(("name", "value"), [("KEPT", 2), ("KEPT_BYTES", 2 * 4 * 100), ("KEPT_S", -1.0)])
def test_answers_are_kept_within_bounds(name: str, value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repeats, name, value)

    async def main() -> None:
        source, known = Source(size=300), Repeats()
        source.go.set()
        for i in range(5):
            await known.call((b"", str(i)), b"x", source)
            await turns()
        assert list(known._calls) == ([] if name == "KEPT_S" else [(b"", "3"), (b"", "4")])

    asyncio.run(main())


def test_no_answer_is_given_again_whose_url_works_no_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Though another that is older lasts longer."""

    async def main() -> None:
        lasting, brief, found = Source(), Source(), Repeats()
        brief.lasts_s, now = 60.0, repeats.time.monotonic()
        for source in (lasting, brief):
            source.go.set()
        for after, started in ((0, 1), (59, 1), (61, 2)):
            monkeypatch.setattr(repeats.time, "monotonic", lambda after=after: now + after)
            for key, source in ((KEY, lasting), (OTHER, brief)):
                await found.call(key, b"x", source)
            assert (lasting.started, brief.started) == (1, started)

    asyncio.run(main())
