"""Requests that come again under the same key, one event loop's turn after another."""

import asyncio
import math
import time
import weakref
from collections.abc import Awaitable, Callable
from contextvars import copy_context
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
from starlette.datastructures import Headers

from handler.api.reply import Reply
from handler.core.caller import CALLER
from handler.core.deadline import Deadline
from handler.core.errors import InvalidValue, KeyReused, NotReady
from handler.server import idempotency
from handler.server.idempotency import Repeats, fingerprint, key_of

KEY, OTHER = (b"caller", "one"), (b"caller", "two")


@dataclass(frozen=True)
class Drawn:
    """As much of a picture as is looked at here."""

    data: bytes
    url: str


class Source:
    """Answers when `go` is set; counts how often it was started, and how often it was cancelled.

    Who is cancelled ends when `end` is set. `made` are pictures, and what encodes and stores them.
    """

    def __init__(self, status: int = 200, size: int = 3, url: str = "") -> None:
        self.go, self.end, self.url = asyncio.Event(), asyncio.Event(), url
        self.end.set()
        self.made: list[weakref.ref[Any]] = []
        self.ends: list[Any] = []
        self.started = self.cancelled = 0
        self.status, self.size, self.lasts_s = status, size, math.inf

    async def __call__(self, deadline: Deadline) -> Reply:
        self.started, self.deadline = self.started + 1, deadline
        try:
            await self.go.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            await self.end.wait()
            raise
        picture: Any = Drawn(data=bytes(self.size), url=self.url)
        encode, store = partial(self.ends.append, picture), partial(self.ends.append, picture)
        self.made += [weakref.ref(each) for each in (picture, encode, store)]
        answer = Reply(self.status, {"turn": self.started}, {"a": "b"}, pictures=(picture,), lasts_s=self.lasts_s)
        return replace(answer, smaller=encode, stored=store)  # type: ignore[arg-type]


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
    source, known, grace = Source(), Repeats(), idempotency.GRACE_S
    idempotency.GRACE_S = 0.0
    try:
        only = asyncio.create_task(known.call(KEY, b"x", source))
        await turns()
        only.cancel()
        while not source.cancelled:
            await asyncio.sleep(0)
        source.go.set()
        assert (await known.call(KEY, b"another body", source)).body["turn"] == 2
    finally:
        idempotency.GRACE_S = grace


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
    assert handles[0].when() < handles[1].when() <= loop.time() + idempotency.GRACE_S
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
async def test_what_is_kept_is_the_body_and_no_picture_besides() -> None:
    """Once somebody has them; nor what would encode or store them again. Who was there from the start has all."""
    source, known = Source(), Repeats()
    source.go.set()
    first = await known.call(KEY, b"x", source)
    assert (len(first.pictures), first.smaller is None, first.stored is None) == (1, False, False)
    del first
    assert [each() for each in source.made] == [None] * 3
    later = await known.call(KEY, b"x", source)
    assert (later.body["turn"], later.pictures, later.smaller, later.stored) == (1, (), None, None)


@in_turns
async def test_pictures_that_nobody_has_yet_are_kept_for_who_comes_first() -> None:
    source, known = Source(), Repeats()
    only = asyncio.create_task(known.call(KEY, b"x", source))
    await turns()
    only.cancel()
    source.go.set()
    await turns()
    assert [len((await known.call(KEY, b"x", source)).pictures) for _ in range(2)] == [1, 0]
    assert (source.started, source.cancelled) == (1, 0)


@in_turns
async def test_a_picture_that_has_a_url_takes_no_room() -> None:
    linked, inline, known = Source(size=1000, url="https://store/a.png"), Source(size=1000), Repeats()
    for key, source in ((KEY, linked), (OTHER, inline)):
        source.go.set()
        await known.call(key, b"x", source)
    assert [known._calls[key].size for key in (KEY, OTHER)] == [0, 1000]


@in_turns
async def test_what_nobody_came_back_for_holds_no_pixels() -> None:
    """It counts for the first who does, and the store has it."""
    source, known = Source(size=1000, url="https://store/a.png"), Repeats()
    first = asyncio.create_task(known.call(KEY, b"x", source))
    await turns()
    first.cancel()
    source.go.set()
    await turns()
    assert [len(each.data) for each in known._calls[KEY].pictures] == [0]
    assert len((await known.call(KEY, b"x", source)).pictures) == 1


async def given_up(known: Repeats, source: Source) -> list[Any]:
    """Ask for what the only client then leaves, until it is cancelled, and still ending; what the loop complains of."""
    wrong: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: wrong.append(context))
    source.end.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(idempotency, "GRACE_S", 0.0)
        only = asyncio.create_task(known.call(KEY, b"x", source))
        await turns()
        only.cancel()
        while not source.cancelled:
            await asyncio.sleep(0)
    return wrong


@in_turns
async def test_a_call_that_ends_late_takes_nothing_from_the_one_after_it() -> None:
    """It was given up, and is still ending when the same is asked for again."""
    late, next_, known = Source(), Source(), Repeats()
    wrong = await given_up(known, late)
    again = asyncio.create_task(known.call(KEY, b"x", next_))
    await turns()
    late.end.set()
    await turns()
    assert known.knows(KEY)
    last = asyncio.create_task(known.call(KEY, b"x", next_))
    await turns()
    next_.go.set()
    assert [(await each).status for each in (again, last)] == [200, 200]
    assert (late.started, next_.started, wrong) == (1, 1, [])


@in_turns
async def test_a_call_that_was_given_up_and_ends_late_leaves_nothing_behind() -> None:
    source, known = Source(), Repeats()
    wrong = await given_up(known, source)
    source.end.set()
    await turns()
    assert (known._calls, wrong) == ({}, [])


def test_what_is_under_way_is_no_answer_that_may_be_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many run beside more answers than are kept; and each of them still comes to its end."""
    monkeypatch.setattr(idempotency, "KEPT", 2)

    async def main() -> None:
        slow, quick, known = Source(), Source(), Repeats()
        quick.go.set()
        running = [asyncio.create_task(known.call((b"", f"slow {i}"), b"x", slow)) for i in range(4)]
        await turns()
        for i in range(4):
            await known.call((b"", str(i)), b"x", quick)
            await turns()
        assert [name for _, name in known._calls] == [*(f"slow {i}" for i in range(4)), "2", "3"]
        slow.go.set()
        assert [(await each).status for each in running] == [200] * 4
        await turns()
        assert [name for _, name in known._calls] == ["slow 2", "slow 3"]
        assert (slow.started, slow.cancelled) == (4, 0)

    asyncio.run(main())


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
    monkeypatch.setattr(idempotency, name, value)

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
        brief.lasts_s, now = 60.0, idempotency.time.monotonic()
        for source in (lasting, brief):
            source.go.set()
        for after, started in ((0, 1), (59, 1), (61, 2)):
            monkeypatch.setattr(idempotency.time, "monotonic", lambda after=after: now + after)
            for key, source in ((KEY, lasting), (OTHER, brief)):
                await found.call(key, b"x", source)
            assert (lasting.started, brief.started) == (1, started)

    asyncio.run(main())


def test_how_much_is_kept_and_for_how_long() -> None:
    """As README says of keys; with the client's own waits between two tries well inside of the grace."""
    assert (idempotency.KEPT_S, idempotency.KEPT, idempotency.KEPT_BYTES) == (600.0, 256, 64_000_000)
    assert idempotency.GRACE_S == 10.0


@pytest.mark.parametrize("given", ["", "a b", "x" * 256, "caf\xe9", "a\tb"])
def test_a_key_that_is_none_is_refused(given: str) -> None:
    with pytest.raises(InvalidValue) as caught:
        key_of(Headers({"idempotency-key": given}))
    assert caught.value.param == "Idempotency-Key"


def test_a_key_is_its_callers_own() -> None:
    def key(given: str | None, caller: bytes = b"") -> Any:
        def within() -> Any:
            CALLER.set(caller)
            return key_of(Headers({} if given is None else {"idempotency-key": given}))

        return copy_context().run(within)

    assert key(None) is key(None, b"a") is None
    assert key("x" * 255)[1] == "x" * 255
    assert key("!~", b"a") == key("!~", b"a")
    assert len({key("one"), key("two"), key("one", b"a"), key("one", b"b")}) == 4


def test_what_is_asked_is_told_apart_by_all_of_it() -> None:
    form: dict[str, Any] = {"prompt": "x", "image": [b"one", b"two"]}
    asked = [
        ("/a", b"x", None),
        ("/b", b"x", None),
        ("/a", b"y", None),
        ("/a", b"x", form),
        ("/a", b"x", form | {"prompt": "y"}),
        ("/a", b"x", form | {"image": [b"two", b"one"]}),
        ("/a", b"x", form | {"image": [b"onetwo"]}),
        ("/a", b"x", form | {"image": [b"one"]}),
        ("/a", b"x", {"prompt": "x"} | {"images": [b"one", b"two"]}),
        ("/a", b"x", {}),
    ]
    assert len({fingerprint(*each) for each in asked}) == len(asked)
    assert fingerprint("/a", b"--one", form) == fingerprint("/a", b"--another", form)  # its boundary is not asked for


@in_turns
async def test_whose_end_comes_is_answered_and_ends_nothing_that_another_waits_for() -> None:
    """With what this worker says of who is late."""
    source, known = Source(), Repeats(lambda: NotReady("This worker is still starting; try again."))
    patient = asyncio.create_task(known.call(KEY, b"x", source))
    await turns()
    hasty = await known.call(KEY, b"x", source, Deadline(time.perf_counter()))
    assert (hasty.status, hasty.content["error"]["code"], hasty.pictures) == (503, "not_ready", ())
    source.go.set()
    assert ((await patient).status, source.started, source.cancelled) == (200, 1, 0)


@in_turns
async def test_a_caller_who_leaves_is_gone_and_only_the_last_one_starts_the_grace() -> None:
    source, known, loop = Source(), Repeats(), asyncio.get_running_loop()
    later: list[Any] = []
    loop.call_later = lambda seconds, *act: later.append((seconds, act))  # type: ignore
    tasks = [asyncio.create_task(known.call(KEY, b"x", source)) for _ in range(3)]
    await turns()
    for left, task in enumerate(tasks, 1):
        task.cancel()
        await turns()
        assert task.cancelled()
        assert len(later) == (left == 3)
    [(seconds, (abandon, *who))] = later
    assert 0 < seconds <= idempotency.GRACE_S
    source.go.set()
    await turns()
    abandon(*who)  # too late: it is done, and its answer is kept
    assert known.knows(KEY)
    assert ((await known.call(KEY, b"x", source)).status, source.started, source.cancelled) == (200, 1, 0)
