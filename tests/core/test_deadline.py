"""One end, by a clock that is moved: what is left of it, when it is short, and that nothing makes it later."""

import asyncio
import math
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from handler.core import deadline
from handler.core.deadline import EXIT_S, Deadline, before
from handler.core.errors import DeadlineExceeded
from threads import Seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Seconds:
    made = Seconds()
    monkeypatch.setattr(deadline, "time", SimpleNamespace(perf_counter=made))
    return made


IsShort = Callable[[Deadline], bool]


@pytest.fixture
def is_short(clock: Seconds) -> Iterator[IsShort]:
    """Whether there is only time to answer, as of now; all on one event loop."""

    async def short(end: Deadline) -> bool:
        waiting = asyncio.ensure_future(end.short())
        for _ in range(5):
            await asyncio.sleep(0)
        if waiting.done():
            await waiting
            return True
        return not waiting.cancel()

    with asyncio.Runner() as runner:
        yield lambda end: runner.run(short(end))


def test_what_is_left_falls_to_nothing_and_not_below(clock: Seconds) -> None:
    end = Deadline.within(10.0)
    assert (end.at, end.left_s) == (1010.0, 10.0)
    clock.pass_s(9.5)
    end.require_time()
    assert end.left_s == 0.5
    for passed in (0.5, 100.0):
        clock.pass_s(passed)
        assert end.left_s == 0.0
        with pytest.raises(DeadlineExceeded):
            end.require_time()


def test_an_end_may_count_from_before(clock: Seconds) -> None:
    assert Deadline.within(10.0, 996.5).left_s == 6.5


def test_an_exit_is_over_before_a_platform_kills() -> None:
    """Which is about 30 s after it told."""
    assert EXIT_S == 28.0


def test_of_an_end_that_is_only_a_moment_nothing_is_kept(clock: Seconds, is_short: IsShort) -> None:
    end = Deadline(clock() + 0.5)
    assert not is_short(end)
    clock.pass_s(0.5)
    assert is_short(end)


def test_an_end_that_was_never_leaves_all_time(clock: Seconds, is_short: IsShort) -> None:
    assert Deadline().left_s == math.inf
    assert not is_short(Deadline())


@pytest.mark.parametrize(("seconds", "kept"), [(2.0, 0.5), (4.0, 1.0), (60.0, 1.0)])
def test_a_quarter_is_kept_to_answer_in_and_a_second_at_most(
    clock: Seconds, is_short: IsShort, seconds: float, kept: float
) -> None:
    end = Deadline.within(seconds)
    clock.pass_s(seconds - kept - 0.25)
    assert not is_short(end)
    clock.pass_s(0.25)
    assert is_short(end)


def test_only_a_sooner_end_takes_the_place_of_one(clock: Seconds, is_short: IsShort) -> None:
    end = Deadline.within(60.0)
    end.no_later(100.0)
    assert end.left_s == 60.0
    end.no_later(2.0)
    assert end.left_s == 2.0
    clock.pass_s(1.25)
    assert not is_short(end)
    clock.pass_s(0.25)
    assert is_short(end)


def test_an_exit_has_begun_with_the_first_word(clock: Seconds) -> None:
    end = Deadline()
    end.begin(28.0)
    clock.pass_s(8.0)
    end.begin(28.0)
    assert end.left_s == 20.0


def test_who_hurries_has_only_time_to_answer_until_it_need_not(clock: Seconds, is_short: IsShort) -> None:
    end = Deadline.within(60.0)
    end.hurry()
    assert is_short(end)
    for short in (False, True, False):
        end.hurry(short)
        assert is_short(end) == short


@pytest.mark.parametrize("error", [None, ValueError("it failed")])
def test_what_is_held_ends_with_what_holds_it(error: Exception | None) -> None:
    async def work() -> int:
        if error:
            raise error
        return 7

    async def main() -> Any:
        return await Deadline.within(60.0).hold(work())

    if error:
        with pytest.raises(ValueError, match="it failed"):
            asyncio.run(main())
    else:
        assert asyncio.run(main()) == 7


@pytest.mark.parametrize("why", ["late", "left"])
def test_what_is_late_or_left_is_not_gone_on_with(why: str) -> None:
    ended: list[str] = []

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            ended.append("cancelled")
            raise

    async def main() -> None:
        holding = asyncio.ensure_future(Deadline.within(0.02 if why == "late" else 60.0).hold(work()))
        if why == "left":
            for _ in range(3):
                await asyncio.sleep(0)
            holding.cancel()
        with pytest.raises(DeadlineExceeded if why == "late" else asyncio.CancelledError):
            await holding
        await asyncio.sleep(0)
        assert ended == ["cancelled"]

    asyncio.run(main())


@pytest.mark.parametrize(
    ("hangs_up", "answered"), [(600, 570), (10, 9.5), (1, 0.95), (0.5, 0.45), (0.2, 0.15), (0.08, 0.04), (0.0, 0.0)]
)
def test_who_hangs_up_is_answered_a_little_before(hangs_up: float, answered: float) -> None:
    assert before(hangs_up) == pytest.approx(answered)
