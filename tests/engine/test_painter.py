"""The engine's thread with jobs in its hands: what it times, for how long it is patient, and that nobody is left."""

import threading
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from fakes import RECIPE
from handler import Settings
from handler.catalog.models import find
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
)
from handler.engine import executor, watchdog
from handler.engine import queue as queue_module
from handler.engine.executor import HUNG, Executor
from handler.engine.pace import Pace, Run
from handler.engine.queue import Job, Queue, hand
from handler.engine.watchdog import Watchdog
from handler.worker.clock import Ledger, Phase
from threads import Seconds, have_ended, inside

LARGE = replace(RECIPE, size=(512, 512), steps=8)  # the work of eight
LINE = Pace.of((Run(1.0, 10.0), Run(2.0, 20.0)))  # ten seconds for each unit of work


class Bench:
    """A executor without an engine, by a clock that only the test moves; each picture takes `takes` seconds."""

    def __init__(self, **settings: Any) -> None:
        self.clock, self.takes = Seconds(), 1.0
        self.failed: list[tuple[KindlingError, list[Job]]] = []
        self.put_back: list[Job] = []
        self.told: dict[int, Any] = {}
        self.asked: list[list[Any]] = []
        self.steps: set[int] | None = None  # which take one; None: all
        self.during: Any = lambda: None
        phases = [Phase("import", 0, 50.0), Phase("warm", 50.0, 3.0), Phase("weights", 53.0, 20.0)]
        self.executor = Executor(
            Settings(**settings), find("spark"), Ledger(phases=phases), self.fail, self.put_back.extend
        )

    def fail(self, error: KindlingError, jobs: Sequence[Job]) -> None:
        self.failed.append((error, list(jobs)))

    def job(self, recipe: Any = RECIPE, waits_s: float = 0.0, deadline: float = float("inf"), queue: Any = None) -> Job:
        number = len(self.told)
        self.told[number] = None
        answer = lambda outcome: self.told.__setitem__(number, outcome)  # noqa: E731
        entered = self.clock() - waits_s
        work = self.executor.work(recipe)
        return Job(recipe, lambda *_: None, work, deadline, answer, queue=queue, entered=entered)

    def draw(self, *jobs: Job, outcomes: Any = None) -> list[Any]:
        """Draw them, with these outcomes; what they were told."""

        def draw_some(recipes: Any, on_steps: Any) -> Any:
            self.asked.append(recipes)
            for number, on_step in enumerate(on_steps):
                if self.steps is None or number in self.steps:
                    on_step(1, None)
            self.during()
            self.clock.pass_s(self.takes)
            drawn: list[Any] = [(recipe.seed, {"denoise": self.takes}) for recipe in recipes]
            return outcomes(drawn) if outcomes else drawn

        self.executor.draw(draw_some, jobs)
        return list(self.told.values())


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Bench:
    made = Bench(hang_s=120)
    moved = SimpleNamespace(perf_counter=made.clock, monotonic=made.clock)
    for module in (executor, queue_module, watchdog):
        monkeypatch.setattr(module, "time", moved)
    return made


def test_each_picture_is_told_how_long_it_waited_for_its_turn(bench: Bench) -> None:
    told = bench.draw(bench.job(waits_s=3.5), bench.job(waits_s=0.25))
    assert [stages for _, stages in told] == [{"queue": 3.5, "denoise": 1.0}, {"queue": 0.25, "denoise": 1.0}]


def test_who_cannot_be_told_that_a_picture_begins_is_left_out_alone(bench: Bench) -> None:
    """The loop that waited for it may be closed."""
    gone, other = bench.job(), bench.job()

    def closed() -> None:
        raise RuntimeError("Event loop is closed")

    gone.on_begin = closed
    first, second = bench.draw(gone, other)
    assert isinstance(first, Internal)
    assert second == (RECIPE.seed, {"queue": 0.0, "denoise": 1.0})
    assert bench.failed == []


@pytest.mark.parametrize(
    ("recipe", "work"),
    [
        (RECIPE, 1.0),
        (LARGE, 8.0),
        (replace(RECIPE, size=(512, 256)), 2.0),
        (replace(RECIPE, size=(128, 256)), 0.5),
        (replace(RECIPE, steps=8), 2.0),
    ],
)
def test_the_pace_knows_the_work_and_the_share_of_all_that_was_drawn_at_once(
    bench: Bench, recipe: Any, work: float
) -> None:
    assert bench.executor.pace == Pace()
    bench.takes = 6.0
    bench.draw(bench.job(recipe), bench.job(recipe))
    assert bench.executor.work(recipe) == work
    assert bench.executor.pace.runs == (Run(work, 3.0),)


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_run_in_which_one_failed_took_as_long_for_all(bench: Bench, place: int) -> None:
    bench.takes = 6.0

    def fails(drawn: list[Any]) -> list[Any]:
        return [*drawn[:place], NumericalError("NaN."), *drawn[place + 1 :]]

    told = bench.draw(*(bench.job() for _ in range(3)), outcomes=fails)
    assert [isinstance(each, NumericalError) for each in told] == [number == place for number in range(3)]
    assert bench.executor.pace.runs == (Run(1.0, 2.0),)


@pytest.mark.parametrize("place", [0, 1, 2])
def test_what_failed_before_its_first_step_took_no_part_in_the_run(bench: Bench, place: int) -> None:
    """As one whose prompt cannot be read: the others took all of the time."""
    bench.takes, bench.steps = 6.0, {0, 1, 2} - {place}

    def fails(drawn: list[Any]) -> list[Any]:
        return [*drawn[:place], NumericalError("no prompt"), *drawn[place + 1 :]]

    bench.draw(*(bench.job() for _ in range(3)), outcomes=fails)
    assert bench.executor.pace.runs == (Run(1.0, 3.0),)


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("error", [NumericalError, OutOfMemory, ValueError, DeviceLost])
def test_what_gave_no_picture_tells_nothing_of_the_pace(bench: Bench, error: Any, shared: bool, count: int) -> None:
    """Nor does it count as drawn: of equal errors, and of one that all share."""
    drawn: list[str] = []
    bench.executor._triage.drawn = lambda: drawn.append("a picture")  # type: ignore[method-assign]
    one = error("all of it")
    bench.draw(
        *(bench.job() for _ in range(count)),
        outcomes=lambda some: [one if shared else error("all of it") for _ in some],
    )
    assert (bench.executor.pace, drawn) == (Pace(), [])


@pytest.mark.parametrize("between", [None, "fails", "comes out"])
def test_batches_without_room_are_counted_until_a_picture_comes_out(bench: Bench, between: str | None) -> None:
    """Each time two at once do, and then each alone: a whole batch that fails between them proves nothing."""

    def fails(drawn: list[Any]) -> list[Any]:
        return [OutOfMemory("no room") for _ in drawn]

    def canary(drawn: list[Any]) -> list[Any]:
        return drawn if bench.asked[-1][0].prompt == "warm-up" else fails(drawn)

    for number in range(3):
        both = [bench.job(), bench.job()]
        bench.draw(*both, outcomes=canary)
        assert bench.put_back[-2:] == both
        bench.draw(both[0], outcomes=canary)
        if number == 1 and between:
            bench.draw(bench.job(), bench.job(), outcomes=fails if between == "fails" else None)
    assert [isinstance(error, Exhausted) for error, _ in bench.failed] == [True] * (between != "comes out")


def test_the_pace_is_that_of_the_last_pictures(bench: Bench) -> None:
    for takes in (500.0, 400.0, *range(1, 17)):
        bench.takes = takes
        bench.draw(bench.job())
    assert bench.executor.pace.runs == tuple(Run(1.0, float(takes)) for takes in range(1, 17))
    assert bench.executor.pace.seconds([1.0, 1.0]) == 16.0


def paced(*runs: tuple[float, float]) -> Pace:
    return Pace.of(tuple(Run(*run) for run in runs)) if runs else Pace()


@pytest.mark.parametrize(
    ("runs", "recipes", "patience"),
    [
        ((), [RECIPE], 120.0),  # hang_s; ten times the warm-up is 30
        ((), [LARGE], 240.0),
        ((), [LARGE, LARGE], 480.0),
        ([(1.0, 20.0)], [RECIPE], 200.0),
        ([(4.0, 20.0), (1.0, 17.0)], [replace(RECIPE, size=(64, 64))], 170.0),  # no less than for the model's own size
        ([(1.0, 20.0), (2.0, 40.0)], [LARGE], 1600.0),
        ([(1.0, 20.0), (2.0, 30.0)], [LARGE], 900.0),
        ([(2.0, 2.0), (1.0, 1.0)], [RECIPE], 120.0),
        ([(2.0, 4.0), (1.0, 2.0)], [LARGE, RECIPE], 180.0),
    ],
)
def test_patience_follows_the_pace_or_else_the_warm_up(
    bench: Bench, runs: list[tuple[float, float]], recipes: list[Any], patience: float
) -> None:
    assert HUNG == 10
    bench.executor.pace = paced(*runs)
    due: list[Any] = []
    bench.during = lambda: due.append(bench.executor.watch._due)
    begun = bench.clock()
    bench.draw(*map(bench.job, recipes))
    assert due == [begun + patience]


def test_each_step_that_ends_gives_the_next_as_much_time(bench: Bench) -> None:
    """Though all of them take longer than one may."""
    left: list[float] = []

    def draw_some(recipes: Any, on_steps: Any) -> Any:
        for done in range(1, 9):
            bench.clock.pass_s(100.0)
            left.append((bench.executor.watch._due or 0.0) - bench.clock())
            on_steps[0](done, None)
        return [(1, {})]

    bench.executor.draw(draw_some, [bench.job()])
    assert left == [20.0] * 8


def test_the_proof_that_a_worker_can_still_draw_is_watched_too(bench: Bench) -> None:
    """As the request before it, and it is a small picture of the model's own words."""
    due: list[float] = []
    canaries: list[Any] = []

    def draw_some(recipes: Any, on_steps: Any) -> Any:
        if recipes[0].prompt != "warm-up":
            raise MemoryError
        canaries.extend(recipes)
        bench.clock.pass_s(7.0)
        on_steps[0](1, None)
        due.append((bench.executor.watch._due or 0.0) - bench.clock())
        return [(1, {})]

    bench.executor._triage.judge = lambda error, canary, *_: canary() or NumericalError("judged")  # type: ignore
    bench.executor.draw(draw_some, [bench.job()])
    assert due == [120.0]
    assert [(each.size, each.taken, each.seed) for each in canaries] == [((64, 64), find("spark").min_steps, 0)]


@pytest.mark.parametrize("ends", ["drawn", "failed", "bug"])
def test_an_idle_worker_is_never_hung(bench: Bench, ends: str) -> None:
    """A day after its last picture, however that ended."""
    alarms: list[Any] = []
    bench.executor.watch = watching = Watchdog(lambda: alarms.append("hung"))
    outcomes = {"drawn": None, "failed": lambda _: [NumericalError("NaN.")], "bug": lambda _: []}[ends]
    try:
        bench.draw(bench.job(), outcomes=outcomes)
    except ValueError:
        assert ends == "bug"
    bench.clock.pass_s(86_400.0)
    watching.start()
    inside(watching._thread, threading.Condition.wait)
    watching.close()
    assert have_ended(watching._thread)
    assert not alarms


def test_who_is_stuck_is_noticed_once_and_whom_it_has_in_hand_is_told(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    jobs = [bench.job(), bench.job()]

    def stuck() -> None:
        bench.clock.pass_s(120.0)
        bench.executor.watch.start()
        assert have_ended(bench.executor.watch._thread)

    bench.during = stuck
    bench.draw(*jobs)
    [(error, hung)] = bench.failed
    assert (type(error), hung) == (DeviceLost, jobs)
    assert "test_painter.py" in caplog.text


def test_a_watch_that_rests_hears_the_next_beat_at_once() -> None:
    """Else it would sleep until it is told to end; what it watches hangs at once here."""
    hung = threading.Event()
    watching = Watchdog(hung.set)
    watching.start()
    inside(watching._thread, threading.Condition.wait)
    watching.beat(0.0)
    assert hung.wait(30)
    assert have_ended(watching._thread)


def test_a_watch_sees_nothing_before_the_first_beat_and_ends_when_told() -> None:
    watching = Watchdog(lambda: pytest.fail("there was nothing"))
    watching.start()
    inside(watching._thread, threading.Condition.wait)
    watching.close()
    assert have_ended(watching._thread)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_bug_while_drawing_leaves_nobody_without_an_answer(bench: Bench, count: int) -> None:
    """Such as a worker that gives another number of outcomes than it was asked for."""
    with pytest.raises(ValueError, match="zip"):
        bench.draw(bench.job(), bench.job(), outcomes=lambda drawn: [drawn[0]] * count)
    assert [type(each) for each in bench.told.values()] == [Internal] * 2
    assert (bench.executor.jobs, bench.executor.watch._due, bench.put_back) == ((), None, [])


def test_what_ends_a_program_while_a_failure_is_judged_leaves_nobody_without_an_answer(bench: Bench) -> None:
    def exits(*_: Any) -> Any:
        raise KeyboardInterrupt

    bench.executor._triage.judge = exits  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        bench.draw(bench.job(), bench.job(), outcomes=lambda drawn: [NumericalError("NaN."), drawn[1]])
    first, second = bench.told.values()
    assert (type(first), second[0]) == (Internal, RECIPE.seed)
    assert bench.executor.jobs == ()


@pytest.mark.parametrize("place", [0, 1, 2])
def test_whose_time_is_up_at_its_turn_costs_no_step_and_harms_nobody(bench: Bench, place: int) -> None:
    ends = [float("inf")] * 3
    ends[place] = bench.clock()
    told = bench.draw(*(bench.job(replace(RECIPE, seed=seed), deadline=at) for seed, at in enumerate(ends)))
    assert [type(each) for each in told] == [DeadlineExceeded if number == place else tuple for number in range(3)]
    assert [[recipe.seed for recipe in recipes] for recipes in bench.asked] == [[n for n in range(3) if n != place]]
    assert not bench.failed


def test_where_all_have_ended_before_their_turn_nothing_is_drawn(bench: Bench) -> None:
    gone, late = bench.job(), bench.job(deadline=bench.clock() - 1)
    gone.end(Cancelled("gone"))
    assert [type(each) for each in bench.draw(gone, late)] == [Cancelled, DeadlineExceeded]
    assert (bench.asked, bench.executor.watch._due, bench.executor.jobs) == ([], None, ())


@pytest.mark.parametrize("place", [1, 2])
def test_those_that_did_not_fit_wait_again_without_an_answer(bench: Bench, place: int) -> None:
    jobs = [bench.job() for _ in range(3)]
    bench.draw(*jobs, outcomes=lambda drawn: [None if n == place else each for n, each in enumerate(drawn)])
    assert bench.put_back == [jobs[place]]
    assert [told is None for told in bench.told.values()] == [n == place for n in range(3)]


@pytest.mark.parametrize("place", [0, 1])
def test_who_waits_for_more_of_a_request_that_failed_is_told_so_at_once(bench: Bench, place: int) -> None:
    """But nobody else who waits."""
    queue, request = Queue(9, 9.0), object()
    drawn = [replace(bench.job(queue=queue), request=request) for _ in range(2)]
    waiting, other = replace(bench.job(), request=request), bench.job()
    queue.join([waiting, other], Pace(), admitted=True)

    def fails(some: list[Any]) -> list[Any]:
        return [NumericalError("NaN.") if n == place else each for n, each in enumerate(some)]

    bench.draw(*drawn, outcomes=fails)
    assert (waiting.over, other.over, len(queue)) == (True, False, 1)
    assert queue.ended == {("drawn", "denoise"): 1, ("numerical_error", "denoise"): 1, ("cancelled", "queue"): 1}


def test_who_waits_on_a_loop_that_is_closed_is_waited_for_no_longer() -> None:
    import asyncio

    loop = asyncio.new_event_loop()
    answer: Any = loop.create_future()
    loop.close()
    hand(answer, NotReady("too late"))
    assert not answer.done()


def test_what_has_ended_meanwhile_is_not_put_back_and_the_others_keep_their_order(bench: Bench) -> None:
    queue = Queue(9, 9.0)
    jobs = [bench.job() for _ in range(5)]
    queue.join(jobs[1:], Pace(), admitted=False)
    taken = queue.take(lambda _: 3)
    assert taken == jobs[1:4]
    for job in taken:
        job.begun = True
    jobs[2].end(Cancelled("gone"))
    assert queue.put_back(taken) == []
    jobs[1].end(Cancelled("gone too"))
    assert queue.take(lambda _: 9) == [jobs[3], jobs[4]]
    assert queue.ended == {("cancelled", "denoise"): 1, ("cancelled", "queue"): 1}
    queue.join([jobs[0]], Pace(), admitted=False)
    assert queue.close() == [jobs[0]]
    assert queue.put_back([jobs[3]]) == [jobs[3]]
    assert not queue.join([jobs[0]], Pace(), admitted=True)
    assert queue.take(lambda _: 9) == []


@pytest.mark.parametrize("place", [0, 1, 2])
def test_what_harmed_others_waits_for_a_run_of_its_own(bench: Bench, place: int) -> None:
    queue, jobs = Queue(9, 9.0), [bench.job() for _ in range(3)]
    jobs[place].alone = True
    queue.join(jobs, Pace(), admitted=False)
    runs = [queue.take(lambda _: 9) for _ in range(2)]
    together = [job for job in jobs if not job.alone]
    assert runs == ([[jobs[0]], together] if place == 0 else [together, [jobs[place]]])


def test_a_line_is_as_long_as_its_work(bench: Bench) -> None:
    queue = Queue(9, 100.0)
    queue.join([bench.job(), bench.job(LARGE)], Pace(), admitted=False)
    assert (len(queue), queue.wait_s(Pace()), queue.wait_s(LINE)) == (2, None, 90.0)
    queue.require_room(Pace())
    queue.require_room(LINE, 90.0)
    for pace, left_s, retry_s in ((LINE, 89.0, 90), (paced((1.0, 11.5), (2.0, 23.0)), float("inf"), 104)):
        with pytest.raises(QueueFull) as caught:
            queue.require_room(pace, left_s)
        assert caught.value.retry_s == retry_s


def test_small_pictures_do_not_make_what_waits_seem_long(bench: Bench) -> None:
    """32 that take 6 s in all, after such as are a 64th of the work and take an eighth of the time."""
    queue = Queue(99, 300.0)
    queue.join([bench.job() for _ in range(32)], Pace(), admitted=False)
    for pace in (paced(*[(1 / 64, 0.0235)] * 16), paced(*[(1 / 64, 0.0235)] * 15, (1.0, 0.188))):
        wait_s = queue.wait_s(pace)
        assert wait_s == pytest.approx(6.0, rel=0.01)
        queue.require_room(pace, 10.0)


def test_a_full_line_says_when_to_come_back_or_five_seconds_where_nobody_knows(bench: Bench) -> None:
    queue = Queue(1, 100.0)
    queue.join([bench.job(LARGE)], Pace(), admitted=False)
    for pace, retry_s in ((Pace(), 5), (paced((8.0, 20.0)), 20), (paced((8.0, 0.08)), 1)):
        with pytest.raises(QueueFull) as caught:
            queue.join([bench.job()], pace, admitted=False)
        assert caught.value.retry_s == retry_s
    assert queue.join([bench.job()], paced((1.0, 1e6)), admitted=True)


def test_a_request_is_one_however_many_pictures_it_asks_for(bench: Bench) -> None:
    """Their seconds bound them."""
    queue, several, one = Queue(2, 100.0), [bench.job() for _ in range(5)], object()
    for job in several:
        job.request = one
    queue.join(several, Pace(), admitted=False)
    assert (len(queue), queue.requests) == (5, 1)
    with pytest.raises(QueueFull, match="about 125 s, more than the 100 s allowed"):
        queue.join([bench.job()], paced((1.0, 25.0)), admitted=False)
    queue.join([bench.job()], Pace(), admitted=False)
    with pytest.raises(QueueFull, match="2 requests are waiting already"):
        queue.join([bench.job()], Pace(), admitted=False)
    queue.take(lambda _: 1)
    assert (len(queue), queue.requests) == (5, 2)  # it waits still
    queue.take(lambda _: 4)
    assert (len(queue), queue.requests) == (1, 1)


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize(
    ("error", "again"), [(ValueError("a"), True), (NumericalError("NaN."), False), (OutOfMemory("no room"), True)]
)
def test_who_failed_together_may_come_out_well_alone(bench: Bench, error: Any, again: bool, count: int) -> None:
    """A fault that several share may be one's own, or there was no room; who failed alone is told so."""
    jobs = [bench.job() for _ in range(count)]
    bench.executor._triage.judge = lambda error, *_: NumericalError("judged")  # type: ignore[method-assign]
    bench.draw(*jobs, outcomes=lambda drawn: [error] * count)
    waits = again and count > 1
    assert bench.put_back == (jobs if waits else [])
    assert [job.alone for job in jobs] == [waits] * count
    assert [told is None for told in bench.told.values()] == [waits] * count
    assert bench.executor.together == (not (waits and isinstance(error, OutOfMemory)))


@pytest.mark.parametrize("drawn", [0, 1])
def test_who_failed_beside_others_that_did_not_is_told_so(bench: Bench, drawn: int) -> None:
    """Also where each fails by a fault of its own."""
    errors = [ValueError("a"), ValueError("b")]
    bench.executor._triage.judge = lambda error, *_: NumericalError(str(error))  # type: ignore[method-assign]
    told = bench.draw(bench.job(), bench.job(), outcomes=lambda some: [*some[:drawn], *errors[drawn:]])
    assert [str(each) for each in told[drawn:]] == ["a", "b"][drawn:]
    assert bench.put_back == []


def test_what_waits_may_take_just_as_long_as_is_allowed_and_as_who_asks_has_left(bench: Bench) -> None:
    queue = Queue(9, 100.0)
    queue.join([bench.job(LARGE), replace(bench.job(LARGE), work=2.0)], Pace(), admitted=False)
    queue.require_room(LINE)  # 100 s of 100
    with pytest.raises(QueueFull, match="more than this request may take"):
        queue.join([bench.job(deadline=bench.clock() + 99.5)], LINE, admitted=False)
    assert queue.join([bench.job(deadline=bench.clock() + 100.0)], LINE, admitted=False)
    with pytest.raises(DeadlineExceeded):
        queue.join([bench.job(deadline=bench.clock())], Pace(), admitted=False)


def test_what_waits_for_another_run_is_not_lost_with_the_worker_as_it_is_put_back(bench: Bench) -> None:
    """Somebody else may draw it by then."""
    one, other = bench.job(), bench.job()
    watcher = threading.Thread(target=bench.executor.lost, args=[threading.Event(), DeviceLost("gone")], name="watcher")
    put_back = bench.put_back.extend

    def begin(jobs: Sequence[Job]) -> None:
        put_back(jobs)
        watcher.start()
        watcher.join(0.5)  # it waits

    bench.executor._put_back = begin
    bench.draw(one, other, outcomes=lambda drawn: [drawn[0], None])
    watcher.join()
    assert bench.put_back == [other]
    assert [jobs for _, jobs in bench.failed] == [[]]
