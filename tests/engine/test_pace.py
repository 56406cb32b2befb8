"""How long pictures will take, by what others took: two costs told apart, whatever a cold run adds."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from handler.engine.pace import APART, KEPT, Pace, Run

COSTS = st.floats(0.0, 100.0)
WORKS = st.floats(1e-3, 1e3)
SECONDS = st.floats(1e-3, 1e4)
RUNS = st.lists(st.builds(Run, WORKS, SECONDS), min_size=1, max_size=KEPT).map(tuple)


def pace(*runs: tuple[float, float]) -> Pace:
    found = Pace()
    for work, seconds in runs:
        found = found.after([work], seconds)
    return found


def one(found: Pace, work: float) -> float:
    seconds = found.seconds([work])
    assert seconds is not None
    return seconds


def test_before_the_first_picture_nothing_is_known() -> None:
    assert Pace().seconds([1.0]) is None
    assert pace((1.0, 2.0)).seconds([]) == 0.0


def test_small_pictures_do_not_make_large_ones_seem_slow() -> None:
    """25 ms for a 64th of the work of one that takes 190 ms: in proportion it would be 1.6 s, eight times too long."""
    small = pace(*[(1 / 64, 0.025)] * 9)
    assert one(small, 1.0) == pytest.approx(0.2)
    both = small.after([1.0], 0.19)
    assert both.seconds([1.0] * 32) == pytest.approx(32 * 0.19)
    assert both.seconds([1 / 64] * 32) == pytest.approx(32 * 0.025)


@given(COSTS, COSTS, st.lists(WORKS, min_size=2, max_size=KEPT), WORKS)
def test_the_two_costs_are_found_where_there_are_two(
    fixed_s: float, work_s: float, works: list[float], asked: float
) -> None:
    found = pace(*((work, fixed_s + work_s * work) for work in works))
    if max(works) >= APART * min(works):
        assert one(found, asked) == pytest.approx(fixed_s + work_s * asked, rel=1e-6, abs=1e-6)
        assert found.growth == 1


@given(RUNS, WORKS, WORKS)
def test_no_cost_is_negative_and_more_work_never_takes_less(runs: tuple[Run, ...], work: float, more: float) -> None:
    found = Pace.of(runs)
    assert min(found.fixed_s, found.work_s) >= 0
    assert 0 <= one(found, min(work, more)) <= one(found, max(work, more)) < math.inf


@given(RUNS, st.lists(WORKS, max_size=9), st.floats(0.1, 10), st.floats(0.1, 10))
def test_no_unit_matters(runs: tuple[Run, ...], asked: list[float], slower: float, larger: float) -> None:
    """Of time or of work: but for what rounding does to sizes that are just apart."""
    scaled = Pace.of(tuple(Run(run.work, run.seconds * slower) for run in runs))
    assert scaled.seconds(asked) == pytest.approx((Pace.of(runs).seconds(asked) or 0.0) * slower, rel=1e-6, abs=1e-9)
    doubled = Pace.of(tuple(Run(run.work * 2, run.seconds) for run in runs))
    wanted = Pace.of(runs).seconds(asked)
    assert doubled.seconds([work * 2 for work in asked]) == pytest.approx(wanted, rel=1e-6, abs=1e-9)


@given(WORKS, SECONDS, st.floats(1.0, 1e3), st.integers(1, KEPT))
def test_of_one_size_alone_another_is_estimated_between_all_fixed_and_all_in_proportion(
    work: float, seconds: float, times: float, count: int
) -> None:
    """By the same factor from both."""
    found = pace(*[(work, seconds)] * count)
    assert one(found, work) == pytest.approx(seconds)
    assert one(found, work * times) == pytest.approx(seconds * math.sqrt(times))
    assert one(found, work / times) == pytest.approx(seconds / math.sqrt(times))


@given(st.floats(0, 10), st.floats(0.1, 10), st.integers(0, 5), st.floats(10, 1e4))
def test_a_cold_run_does_not_spoil_it(fixed_s: float, work_s: float, place: int, cold: float) -> None:
    """Of two sizes, three runs each; also before there is a second size."""
    runs = [(work, fixed_s + work_s * work) for work in (0.25, 0.25, 0.25, 4.0, 4.0, 4.0)]
    work, seconds = runs[place]
    runs[place] = (work, seconds + cold)
    found = pace(*runs)
    for asked in (0.25, 1.0, 4.0):
        assert one(found, asked) == pytest.approx(fixed_s + work_s * asked, rel=1e-6)


def test_the_second_picture_already_ends_what_the_first_was_slow_by() -> None:
    assert one(pace((1.0, 30.0), (1.0, 2.0)), 1.0) == 2.0
    assert one(pace((0.25, 0.5), (1.0, 30.0), (1.0, 2.0)), 1.0) == 2.0


def test_sizes_that_hardly_differ_tell_nothing_of_what_work_costs() -> None:
    """A slope between them would be noise."""
    found = pace((1.0, 2.0), (1.1, 1.0), (1.0, 2.0), (1.1, 2.1))
    assert found.growth == 0.5
    assert 1.9 < one(found, 1.0) < 2.1
    assert 3.8 < one(found, 4.0) < 4.2


def test_more_than_in_proportion_is_a_line_from_nothing() -> None:
    """As attention over many pixels takes; and what takes less with more work is fixed."""
    steep = pace((1.0, 1.0), (4.0, 8.0), (1.0, 1.0), (4.0, 8.0))
    assert (steep.fixed_s, steep.work_s, steep.growth) == (0.0, 1.0, 1.0)
    falling = pace((1.0, 3.0), (4.0, 2.0), (1.0, 3.0))
    assert (falling.fixed_s, falling.work_s) == (3.0, 0.0)


def test_what_was_drawn_at_once_took_a_share_each() -> None:
    assert Pace().after([0.25] * 4, 2.0).runs == (Run(0.25, 0.5),)
    assert one(Pace().after([0.25] * 4, 2.0), 0.25) == 0.5


def test_the_newest_runs_count_and_a_rare_size_is_not_forgotten() -> None:
    found = pace((64.0, 32.0), (64.0, 30.0), *((1.0, float(i)) for i in range(1, 41)))
    assert len(found.runs) == KEPT
    assert found.runs[:3] == (Run(64.0, 32.0), Run(64.0, 30.0), Run(1.0, 27.0))
    fresh = pace(*((1.0, float(i)) for i in range(1, 41)), *[(64.0, 99.0)] * 40)
    assert [run.work for run in fresh.runs].count(64.0) == KEPT // 2
    assert fresh.runs[-1] == Run(64.0, 99.0)


@given(st.lists(st.tuples(WORKS, SECONDS), min_size=1, max_size=3 * KEPT))
def test_never_more_runs_are_kept_and_the_last_always_is(runs: list[tuple[float, float]]) -> None:
    found = pace(*runs)
    assert len(found.runs) == min(len(runs), KEPT)
    work, seconds = runs[-1]
    assert found.runs[-1] == Run(work, seconds)
