"""The spend meter: seconds since birth times a price, the month's total over workers, the cap, volumes that refuse."""

import json
import logging
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from disks import full_disk

from fakes import RECIPE, FakeFamily
from handler import Clock, Engine, Settings, Worker
from handler.catalog.prices import unheld
from handler.core.birth import Birth
from handler.core.errors import NotReady, SettingsError, SpendCapReached
from handler.engine.spend import Meter, judge, seconds_this_month

NOON = datetime(2026, 11, 15, 12, tzinfo=UTC)
HOUR = 3600.0


class Time:
    """The date, moved by hand, and seconds since 1970 that follow it."""

    def __init__(self, now: datetime = NOON) -> None:
        self.born = self.moment = now

    def seconds(self) -> float:
        return self.moment.timestamp()

    def birth(self) -> Birth:
        return Birth(self.born.timestamp(), clock=self.seconds)

    def now(self) -> datetime:
        return self.moment

    def pass_hours(self, hours: float) -> None:
        self.moment += timedelta(hours=hours)


def meter(volume: Path, time: Time, gpu: str = "NVIDIA H200", **settings: Any) -> Meter:
    chosen = Settings(volume=volume, gpu_price=settings.pop("gpu_price", 2.0), **settings)
    return Meter(chosen, lambda: gpu, time.birth(), time.now)


@pytest.mark.parametrize(
    ("dollars", "cap", "action", "outcome"),
    [
        (99.0, None, "refuse", "OK"),
        (None, 10.0, "refuse", "UNPRICED"),
        (9.99, 10.0, "refuse", "OK"),
        (10.0, 10.0, "alert", "ALERT"),
        (10.0, 10.0, "refuse", "REFUSE"),
    ],
)
def test_the_verdict_and_its_reason(dollars: float | None, cap: float | None, action: str, outcome: str) -> None:
    verdict = judge(dollars, cap, action)
    assert verdict.outcome == outcome
    assert ("10" in verdict.reason) == (cap is not None)


def test_only_this_months_part_of_a_long_life_counts() -> None:
    assert seconds_this_month(60, NOON) == 60
    assert seconds_this_month(40 * 24 * HOUR, NOON) == 14.5 * 24 * HOUR


def test_dollars_are_seconds_since_birth_times_the_price(tmp_path: Path) -> None:
    time = Time()
    found = meter(tmp_path, time)
    time.pass_hours(1.5)
    assert found.state()["dollars_this_process"] == pytest.approx(3.0)
    assert "KINDLING_GPU_PRICE=2" in found.state()["price"]["reason"]


def test_all_workers_of_a_volume_add_up_and_each_writes_its_own_file(tmp_path: Path) -> None:
    time = Time()
    meters = [meter(tmp_path, time) for _ in range(3)]  # alike in all: they began at once, in equal containers
    time.pass_hours(1)
    for found in [*meters, meters[0]]:
        found.tick()
    state = meters[0].state()
    assert state["dollars_this_process"] == pytest.approx(2.0)
    assert state["dollars_this_month"] == pytest.approx(6.0)
    assert state["counted"] == "all workers here"
    assert len(list((tmp_path / "spend" / "2026-11").iterdir())) == 3


def test_a_cap_holds_for_workers_that_are_alike(tmp_path: Path) -> None:
    """As many as are restored from one snapshot: same second, same host, same process id."""
    time = Time()
    meters = [meter(tmp_path, time, monthly_cap=30, cap_action="refuse") for _ in range(2)]
    time.pass_hours(9.5)
    for found in meters * 2:
        found.tick()
    for found in meters:
        assert found.state()["dollars_this_month"] == pytest.approx(38)
        with pytest.raises(SpendCapReached):
            found.require_budget()


def test_what_a_snapshot_has_become_is_another_worker(tmp_path: Path) -> None:
    """It costs from its restoration on; what the snapshot cost to take stays counted."""
    taken = Birth(time.monotonic() - 14 * 24 * HOUR)
    found = Meter(Settings(volume=tmp_path, gpu_price=2.0, monthly_cap=1e6), lambda: "NVIDIA H200", taken)
    found.start()
    found.stop()
    before = found.state()["dollars_this_process"]
    found.renew()
    found.stop()
    assert found.state()["dollars_this_process"] < 1 < before
    assert len(list(tmp_path.glob("spend/*/*.json"))) == 2
    assert found.state()["dollars_this_month"] == pytest.approx(before, rel=0.1)


def test_a_worker_that_has_ended_still_counts_until_the_month_ends(tmp_path: Path) -> None:
    time = Time()
    ended = meter(tmp_path, time)
    time.pass_hours(3)
    ended.tick()
    mine = meter(tmp_path, time)
    mine.tick()
    assert mine.state()["dollars_this_month"] == pytest.approx(12.0)
    time.pass_hours(24 * 20)  # into December
    assert mine.state()["month"] == "2026-12"
    assert mine.state()["dollars_this_month"] == pytest.approx(mine.state()["dollars_this_process"])
    assert mine.state()["dollars_this_process"] == pytest.approx(2.0 * (4 * 24 + 15))


VALUES = ('"x"', '"5"', "NaN", "-Infinity", "-5", "1" + "0" * 400, "1" * 5000, "1e999", "1e308", "true", "null", "[5]")
DAMAGED = [
    "",
    "{",
    "[]",
    "{}",
    "\0",
    "[" * 50_000,
    '{"dollars": ' * 5000,
    *(f'{{"dollars": {value}}}' for value in VALUES),
]


def test_files_that_make_no_sense_count_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "spend" / "2026-11"
    folder.mkdir(parents=True)
    for number, text in enumerate(DAMAGED):
        (folder / f"{number}.json").write_text(text)
    (folder / "folder.json").mkdir()
    (folder / "good.json").write_text('{"dollars": 1.5}')
    found = meter(tmp_path, Time())
    found.tick()
    assert found.state()["dollars_this_month"] == pytest.approx(1.5)
    (folder / "good.json").unlink()
    (folder / "good.json").write_text('{"dollars": 2.5}')
    found.tick()
    assert found.state()["dollars_this_month"] == pytest.approx(2.5)


@pytest.mark.parametrize(("dollars", "counts"), [(744_000, True), (744_000.01, False), (0, True), (-0.01, False)])
def test_no_worker_costs_more_in_a_month_than_the_dearest_hours(tmp_path: Path, dollars: float, counts: bool) -> None:
    """Of 1000 dollars, in 31 days: whoever says more is not believed."""
    folder = tmp_path / "spend" / "2026-11"
    folder.mkdir(parents=True)
    (folder / "other.json").write_text(json.dumps({"dollars": dollars}))
    found = meter(tmp_path, Time())
    found.tick()
    assert found.state()["dollars_this_month"] == (dollars if counts else 0)


def test_refuse_stops_drawing_and_alert_does_not(tmp_path: Path) -> None:
    time = Time()
    alert = meter(tmp_path, time, monthly_cap=1)
    refuse = meter(tmp_path, time, monthly_cap=1, cap_action="refuse")
    refuse.require_budget()
    time.pass_hours(0.5)
    alert.require_budget()
    with pytest.raises(SpendCapReached) as caught:
        refuse.require_budget()
    assert (caught.value.status, caught.value.code, caught.value.retryable) == (429, "spend_cap_reached", False)
    assert refuse.state()["verdict"]["outcome"] == "REFUSE"


def test_each_crossing_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    time = Time()
    found = meter(tmp_path, time, monthly_cap=1)
    with caplog.at_level(logging.WARNING, "handler.engine.spend"):
        found.tick()
        time.pass_hours(1)
        found.tick()
        found.tick()
        assert len(caplog.messages) == 1
        assert "2.00 dollars are spent this month, the cap is 1" in caplog.messages[0]
        time.moment = datetime(2026, 12, 1, 0, 1, tzinfo=UTC)
        found.tick()
        time.pass_hours(1)
        found.tick()
    assert len(caplog.messages) == 2


def test_a_cap_without_a_price_is_told_and_refuses_nobody(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    found = meter(tmp_path, Time(), gpu="CPU", gpu_price=None, monthly_cap=1, cap_action="refuse")
    with caplog.at_level(logging.WARNING, "handler.engine.spend"):
        found.tick()
    found.require_budget()
    assert "cannot be held" in caplog.text
    assert found.state()["dollars_this_month"] is None
    assert not (tmp_path / "spend").exists()


def test_nothing_is_counted_before_the_gpu_is_known(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    found = meter(tmp_path, Time(), gpu="", gpu_price=None, monthly_cap=1)
    found.tick()
    assert found.state()["price"]["reason"] == "the GPU is not known yet"
    assert not caplog.messages


def test_a_volume_nobody_may_write_counts_this_process_alone_and_says_so(tmp_path: Path) -> None:
    (tmp_path / "spend").write_text("in the way of every write")
    time = Time()
    found = meter(tmp_path, time, monthly_cap=1, cap_action="refuse")
    time.pass_hours(1)
    found.tick()
    assert found.state()["counted"].startswith("this process alone: the volume cannot be written (")
    with pytest.raises(SpendCapReached):
        found.require_budget()


def test_what_others_cost_counts_on_a_volume_that_takes_nothing_more(tmp_path: Path) -> None:
    time = Time()
    other, mine = (meter(tmp_path, time, monthly_cap=3, cap_action="refuse") for _ in range(2))
    time.pass_hours(1)
    other.tick()
    with full_disk():
        mine.tick()
    with pytest.raises(SpendCapReached):
        mine.require_budget()
    assert "but they cannot see what this one costs: the volume cannot be written (" in mine.state()["counted"]


class Beats:
    """In place of the event that ends the meter's thread: an hour passes at each wait, until there were `count`."""

    def __init__(self, volume: Path, time: Time, count: int, then: Any = lambda number: None) -> None:
        self.volume, self.time, self.count, self.then = volume, time, count, then
        self.waits: list[tuple[float, list[float]]] = []

    def written(self) -> list[float]:
        return [json.loads(path.read_bytes())["dollars"] for path in self.volume.glob("spend/*/*.json")]

    def wait(self, seconds: float) -> bool:
        self.waits.append((seconds, self.written()))
        self.time.pass_hours(1)
        self.then(len(self.waits))
        return len(self.waits) == self.count


def test_a_file_is_written_at_once_then_every_minute_and_at_the_end(tmp_path: Path) -> None:
    time = Time()
    beats: Any = Beats(tmp_path, time, 3)
    meter(tmp_path, time)._run(beats)
    assert beats.waits == [(60.0, [0.0]), (60.0, [2.0]), (60.0, [4.0])]
    assert beats.written() == [6.0]


def test_as_long_as_the_gpu_is_not_known_it_is_looked_for_every_second(tmp_path: Path) -> None:
    time, gpu = Time(), [""]
    beats: Any = Beats(tmp_path, time, 4, lambda number: gpu.__setitem__(0, "NVIDIA H200" if number > 1 else ""))
    Meter(Settings(volume=tmp_path, gpu_price=2.0), lambda: gpu[0], time.birth(), time.now)._run(beats)
    assert beats.waits == [(1.0, []), (1.0, []), (60.0, [4.0]), (60.0, [6.0])]
    assert beats.written() == [8.0]


def test_the_cap_is_looked_at_again_every_minute(tmp_path: Path) -> None:
    """What others spend meanwhile stops this one too."""
    time = Time()
    mine, other = (meter(tmp_path, time, monthly_cap=9, cap_action="refuse") for _ in range(2))
    beats: Any = Beats(tmp_path, time, 2, lambda number: other.tick())
    verdicts: list[str] = []
    beats.then = lambda number: (verdicts.append(mine.verdict.outcome), other.tick())
    mine._run(beats)
    assert verdicts == ["OK", "OK"]
    time.pass_hours(1)
    mine.tick()
    assert mine.state()["dollars_this_month"] == pytest.approx(6.0 + 4.0)
    with pytest.raises(SpendCapReached):
        mine.require_budget()


def test_the_thread_writes_at_the_end_and_stops(tmp_path: Path) -> None:
    time = Time()
    found = meter(tmp_path, time)
    found.start()
    time.pass_hours(2)
    found.stop()
    assert found._thread not in threading.enumerate()
    (written,) = (tmp_path / "spend" / "2026-11").iterdir()
    assert json.loads(written.read_bytes())["dollars"] == pytest.approx(4.0)


def test_a_meter_that_never_started_stops(tmp_path: Path) -> None:
    meter(tmp_path, Time()).stop()


def test_settings() -> None:
    chosen = Settings.from_env({"KINDLING_GPU_PRICE": "3.6", "KINDLING_MONTHLY_CAP": "100"})
    assert (chosen.gpu_price, chosen.monthly_cap, chosen.cap_action) == (3.6, 100, "alert")
    for name, value in {"GPU_PRICE": "nan", "MONTHLY_CAP": "0", "CAP_ACTION": "stop", "PLATFORM": "moon"}.items():
        with pytest.raises(SettingsError, match=name):
            Settings.from_env({f"KINDLING_{name}": value})
    with pytest.raises(SettingsError, match="gpu_price: should be a finite number"):
        Settings(gpu_price=float("inf"))


def test_the_platform_is_found_by_what_it_sets_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Settings().platform == "other"
    monkeypatch.setenv("RUNPOD_POD_ID", "w1")
    assert Settings().platform == "runpod"
    assert Settings.from_env({"KINDLING_PLATFORM": "modal"}).platform == "modal"


def test_a_worker_that_could_not_hold_the_cap_does_not_draw() -> None:
    """It shall refuse past the cap, and nobody knows what it costs."""
    workers: list[Worker] = []

    def boot(settings: Settings, clock: Clock) -> Worker:
        workers.append(FakeFamily().boot(settings, clock))
        return workers[0]

    engine = Engine(Settings(monthly_cap=10, cap_action="refuse"), boot=boot)
    engine.start()
    with pytest.raises(SettingsError, match=r"KINDLING_CAP_ACTION=refuse could not be held: .*set KINDLING_GPU_PRICE"):
        engine.wait_booted()
    assert engine.state == "failed"
    engine.stop()
    with pytest.raises(NotReady, match="closed"):  # the engine keeps the error, whose frames know the worker
        workers[0].generate(RECIPE)
    for settings in ({"gpu_price": 1.0}, {"cap_action": "alert"}, {"monthly_cap": None}):
        assert not unheld(Settings(**{"monthly_cap": 10, "cap_action": "refuse", **settings}), "CPU")
