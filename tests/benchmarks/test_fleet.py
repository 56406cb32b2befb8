"""The simulated fleet: against formulas that are exact, by hand where it is small, and beside a real worker."""

import json
import math
import os
import random
import re
import shlex
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import poisson

SCRIPTS = ROOT / "benchmarks"
FOUND = re.compile(r"```sh\n(python benchmarks/fleet\.py --(?:platform|gpus).+?)\n```\n\n```\n(.+?)\n```", re.S)


@pytest.fixture(scope="module", autouse=True)
def scripts() -> Iterator[None]:
    """They find their neighbours as when they are run; `serving` is another file of the tests'."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SCRIPTS)
        patch.delitem(sys.modules, "serving", raising=False)
        yield


@pytest.fixture(scope="module")
def erlang() -> Any:
    import erlang

    return erlang


@pytest.fixture(scope="module")
def traffic() -> Any:
    import traffic

    return traffic


@pytest.fixture(scope="module")
def sim() -> Any:
    import simulation

    return simulation


@pytest.fixture(scope="module")
def fleet() -> Any:
    import fleet

    return fleet


def by_chance(rate: float, count: int, varied: bool = True) -> list[Any]:
    """Requests whose work varies as chance has it, or does not."""
    from traffic import Request

    rng, now, found = random.Random(1), 0.0, []
    for _ in range(count):
        now += rng.expovariate(rate)
        found.append(Request(now, rng.expovariate(1.0) if varied else 1.0))
    return found


def always(sim: Any, workers: int, **given: Any) -> Any:
    """A fleet of so many that are there from the beginning, one second for a picture."""
    return sim.Fleet(sim.Service(1.0), sim.Rule("count", 1), 0.0, math.inf, workers, least=workers, **given)


def at(*times: float) -> list[Any]:
    from traffic import Request

    return [Request(time) for time in times]


# The formulas themselves


@pytest.mark.parametrize(("load", "workers"), [(0.5, 1), (1.0, 2), (7.2, 9), (90.0, 100)])
def test_erlang_b_is_the_share_of_a_poisson_number(erlang: Any, load: float, workers: int) -> None:
    assert erlang.blocked(load, workers) == pytest.approx(poisson.pmf(workers, load) / poisson.cdf(workers, load))


def test_erlang_c_of_one_worker_is_its_load_and_of_too_few_is_one(erlang: Any) -> None:
    assert erlang.waiting(0.7, 1) == pytest.approx(0.7)
    assert erlang.waiting(1.0, 2) == pytest.approx(1 / 3)
    assert erlang.waiting(2.5, 2) == 1.0


def test_refusals_are_the_last_of_all_states(erlang: Any) -> None:
    load, workers, places = 2.2, 2, 3
    weights = [load**n / math.factorial(min(n, workers)) / workers ** max(0, n - workers) for n in range(6)]
    assert erlang.refused(load, workers, places) == pytest.approx(weights[-1] / sum(weights))
    assert erlang.refused(load, workers, 0) == pytest.approx(erlang.blocked(load, workers))


@pytest.mark.parametrize(("rate", "seconds"), [(10, 0.378), (1000, 1.071)])
def test_one_worker_less_is_too_few(erlang: Any, rate: float, seconds: float) -> None:
    found, load = erlang.workers_for(rate, seconds, seconds), rate * seconds
    late = [erlang.waiting(load, n) * math.exp(-(n - load)) for n in (found - 1, found)]
    assert late[0] > 0.05 >= late[1]


# The simulation against them


def held(values: Sequence[float], expected: float) -> None:
    """Their mean is what was expected, within four of its standard errors, by 40 batches; which are small."""
    size = len(values) // 40
    means = [statistics.fmean(values[size * n : size * (n + 1)]) for n in range(40)]
    error = statistics.stdev(means) / math.sqrt(40)
    assert error < 0.12 * expected
    assert statistics.fmean(values) == pytest.approx(expected, abs=4 * error)


@pytest.mark.parametrize(("workers", "busy"), [(1, 0.7), (3, 0.8), (8, 0.8)])
def test_waits_are_those_of_erlang_c(sim: Any, erlang: Any, workers: int, busy: float) -> None:
    rate = workers * busy
    waits = sim.simulate(by_chance(rate, 40_000), always(sim, workers)).waits
    held(waits, erlang.mean_wait_s(rate, 1.0, workers))
    held([wait > 0 for wait in waits], erlang.waiting(rate, workers))


def test_pictures_that_take_the_same_wait_half_as_long(sim: Any) -> None:
    """M/D/1, by Pollaczek and Khinchine."""
    held(sim.simulate(by_chance(0.8, 40_000, varied=False), always(sim, 1)).waits, 0.8 / (2 * 0.2))


@pytest.mark.parametrize(("workers", "places"), [(2, 0), (3, 2)])
def test_refusals_are_those_of_erlang_b(sim: Any, erlang: Any, workers: int, places: int) -> None:
    rate = workers * 1.1
    found = sim.simulate(by_chance(rate, 40_000), always(sim, workers, queue=places))
    assert found.lost == pytest.approx(erlang.refused(rate, workers, places), abs=0.01)


@pytest.mark.parametrize("idle_s", [2.0, 12.0, 40.0])
def test_cold_starts_are_the_gaps_longer_than_the_window(sim: Any, idle_s: float) -> None:
    """One worker and pictures that take no time: P(gap > window) is exp(-rate x window)."""
    rate, count = 0.1, 20_000
    instant = sim.Fleet(sim.Service(1e-9), sim.Rule("count", 1), 1e-9, idle_s, 1)
    found = sim.simulate(by_chance(rate, count, varied=False), instant)
    cold = math.exp(-rate * idle_s)
    assert found.cold_share == pytest.approx(cold, abs=0.012)
    assert found.gpu_s / count == pytest.approx((1 - cold) / rate, rel=0.02)


# What has to hold whatever comes

FLEETS = st.fixed_dictionaries(
    {
        "cold_s": st.floats(0, 30),
        "idle_s": st.floats(0, 60),
        "most": st.integers(2, 5),
        "least": st.integers(0, 2),
        "inside": st.integers(2, 4),
        "queue": st.one_of(st.just(math.inf), st.integers(0, 5)),
        "patience_s": st.one_of(st.just(math.inf), st.floats(1, 30)),
    }
)
RULES = st.tuples(
    st.sampled_from(["count", "delay"]), st.floats(0.5, 8), st.integers(0, 1), st.sampled_from([0.0, 5.0])
)
SERVICES = st.tuples(st.floats(0.1, 5), st.floats(0, 2), st.integers(1, 2), st.floats(0, 1))


def test_a_start_that_outlasts_the_last_picture_is_paid_for(sim: Any) -> None:
    fleet = sim.Fleet(sim.Service(1.0), sim.Rule("count", 1, buffer=1), 2.0, 0.0, most=2, least=1, inside=2)
    found = sim.simulate(at(0.0), fleet)
    assert (found.starting_s, found.busy_s, found.gpu_s) == (2.0, 1.0, 3.0)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.floats(0, 200), max_size=60), FLEETS, RULES, SERVICES)
def test_nothing_is_lost_or_made_up(
    times: list[float], given: dict[str, Any], rule: tuple[Any, ...], service: tuple[Any, ...]
) -> None:
    import simulation as sim

    wanted, requests = sim.Fleet(sim.Service(*service), sim.Rule(*rule), **given), at(*sorted(times))
    found = sim.simulate(requests, wanted)
    assert len(found.waits) + found.refused + found.gave_up == len(times)
    assert found == sim.simulate(requests, wanted)
    assert found.peak <= wanted.most
    assert found.gpu_s >= found.busy_s + found.starting_s - 1e-6
    assert all(0 <= wait < wanted.patience_s for wait in found.waits)
    assert all(late > wait for wait, late in zip(found.waits, found.latencies, strict=True))
    assert not found.refused or wanted.queue < math.inf


# By hand


def test_one_request_pays_for_its_start_its_picture_and_the_window(sim: Any) -> None:
    found = sim.simulate(at(3.0), sim.Fleet(sim.Service(5.0), sim.Rule("count", 1), 10.0, 60.0, 4))
    assert (found.waits, found.latencies) == ((10.0,), (15.0,))
    assert (found.gpu_s, found.starting_s, found.busy_s) == (75.0, 10.0, 5.0)
    assert (found.cold_share, found.starts, found.peak) == (1.0, 1, 1)
    assert found.per_thousand(0.01) == pytest.approx(750)


def test_by_delay_another_starts_for_who_has_waited_so_long(sim: Any) -> None:
    slow = sim.Fleet(sim.Service(100.0), sim.Rule("delay", 4), 10.0, 0.0, 4)
    found = sim.simulate(at(0.0, 1.0), slow)
    assert (found.waits, found.starts) == ((10.0, 14.0), 2)  # at 1 + 4 + 10; for the first one starts already
    assert sim.simulate(at(0.0, 1.0), replace(slow, most=1)).waits == (10.0, 109.0)


def test_by_count_as_many_as_there_are_requests_for(sim: Any) -> None:
    slow = sim.Fleet(sim.Service(100.0), sim.Rule("count", 2), 10.0, 0.0, 4)
    assert sim.simulate(at(0.0, 0.0, 0.0), slow).peak == 2
    assert sim.simulate(at(0.0, 0.0, 0.0), replace(slow, rule=sim.Rule("count", 2, buffer=1))).peak == 3
    looking = sim.Rule("count", 1, every_s=15.0)
    assert sim.simulate(at(1.0), replace(slow, rule=looking)).waits == (24.0,)


def test_those_that_always_run_are_never_cold_and_never_end(sim: Any) -> None:
    kept = sim.Fleet(sim.Service(5.0), sim.Rule("count", 1), 10.0, 1.0, 4, least=1)
    found = sim.simulate(at(0.0, 50.0), kept, until=1000.0)
    assert (found.waits, found.starts, found.cold, found.gpu_s) == ((0.0, 0.0), 0, 0, 1000.0)


def test_several_are_drawn_at_once_and_some_seconds_pass_after(sim: Any) -> None:
    batched = always(sim, 1, inside=3)
    batched = replace(batched, service=sim.Service(1.0, fixed_s=2.0, batch=2, between_s=0.5))
    assert sim.simulate(at(0.0, 0.0, 0.0), batched).latencies == (3.0, 7.5, 7.5)  # none other was there to go with it


def test_a_worker_keeps_what_it_was_given(sim: Any) -> None:
    """Which is why a platform that gives a worker many is slower than one whose queue all workers share."""
    given = at(0.0, 0.0, 0.0, 0.0), at(0.0, 0.0, 0.0, 0.0)
    own, shared = (sim.simulate(one, always(sim, 2, inside=n)) for one, n in zip(given, (2, 1), strict=True))
    assert sorted(own.waits) == sorted(shared.waits) == [0.0, 0.0, 1.0, 1.0]
    starting = sim.Fleet(sim.Service(1.0), sim.Rule("count", 1), 0.5, 0.0, 2, least=1, inside=4)
    assert max(sim.simulate(at(0.0, 0.0, 0.0, 0.0), starting).waits) == 3.0
    assert max(sim.simulate(at(0.0, 0.0, 0.0, 0.0), replace(starting, inside=1)).waits) < 3.0


def test_who_is_out_of_patience_has_gone(sim: Any) -> None:
    found = sim.simulate(at(0.0, 0.1, 0.2), always(sim, 1, patience_s=1.5))
    assert found.waits == (0.0, pytest.approx(0.9))
    assert (found.gave_up, found.lost) == (1, pytest.approx(1 / 3))


def test_the_others_may_end_where_one_is_enough(sim: Any) -> None:
    """Of idle workers that which worked last works on."""
    times = [0.0, 0.0, *range(10, 200, 10)]
    found = sim.simulate(at(*times), sim.Fleet(sim.Service(1.0), sim.Rule("count", 1), 1.0, 25.0, 2))
    assert found.starts == 2
    assert found.gpu_s == pytest.approx((190 + 1 + 25) + (1 + 1 + 25))


# Traffic


@pytest.mark.parametrize("shape", ["flat", "diurnal", "bursty"])
def test_a_seed_gives_the_same_day(traffic: Any, shape: str) -> None:
    once, again, other = (traffic.day(shape, 4000, (8.0, 22.0), seed) for seed in (1, 1, 2))
    assert once == again != other
    assert len(once) == pytest.approx(4000, rel=0.15)
    assert [one.at for one in once] == sorted(one.at for one in once)
    assert once[-1].at < 14 * traffic.HOUR + traffic.WITHIN_S


def counted(requests: Sequence[Any], parts: int, long: float) -> list[int]:
    found = [0] * parts
    for one in requests:
        found[min(parts - 1, int(one.at / long * parts))] += 1
    return found


def test_days_have_their_shapes(traffic: Any) -> None:
    long = 14 * traffic.HOUR
    by_shape = {shape: traffic.day(shape, 6000, (8.0, 22.0), 3) for shape in traffic.SHAPES}
    first, middle, last = counted(by_shape["diurnal"], 3, long)
    assert middle > 1.7 * first
    assert middle > 1.7 * last
    minutes = {shape: counted(day, 840, long) for shape, day in by_shape.items()}
    spread = {shape: statistics.variance(each) / statistics.fmean(each) for shape, each in minutes.items()}
    assert spread["flat"] == pytest.approx(1, abs=0.25)  # Poisson's
    assert spread["bursty"] > 5


def test_a_night_is_eight_hours_and_no_hours_are_all(traffic: Any) -> None:
    assert 7 < traffic.day("flat", 4000, (22.0, 6.0), 1)[-1].at / traffic.HOUR < 8
    assert 23 < traffic.day("flat", 4000, (0.0, 24.0), 1)[-1].at / traffic.HOUR < 24


def test_a_trace_is_read_in_seconds_or_times(traffic: Any, tmp_path: Path) -> None:
    (file := tmp_path / "trace").write_text("2026-11-29T08:00:10Z, 2\n2026-11-29T08:00:00Z\n\n")
    assert traffic.trace(file) == [traffic.Request(0.0), traffic.Request(10.0, 2.0)]
    file.write_text("100.5\n100.25 0.5\n")
    assert traffic.trace(file) == [traffic.Request(0.0, 0.5), traffic.Request(0.25)]
    file.write_text("1\nyesterday\n")
    with pytest.raises(ValueError, match="line 2: no seconds and no ISO 8601 time: 'yesterday'"):
        traffic.trace(file)


@pytest.mark.parametrize("line", ["nan", "inf", "1 0", "1 -5", "1 nan"])
def test_a_trace_of_what_cannot_be_is_refused(traffic: Any, tmp_path: Path, line: str) -> None:
    (file := tmp_path / "trace").write_text(f"1\n{line}\n")
    with pytest.raises(ValueError, match="line 2: a time is finite, and a work above 0"):
        traffic.trace(file)


# The command


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("--per-day", "inf"), ("--per-day", "-1"), ("--hours", "30-50"), ("--hours", "8"), ("--seconds", "-1")),
        *(("--seconds", "0"), ("--batch", "0"), ("--batch", "1.5"), ("--fixed", "-9"), ("--cold-start", "nan")),
        *(("--gpus", "0"), ("--gpus", "nan"), ("--gpus", "inf"), ("--lost", "2"), ("--dollars-an-hour", "-1")),
    ],
)
def test_numbers_that_cannot_be_are_refused(
    fleet: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], option: str, value: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["fleet.py", option, value])
    with pytest.raises(SystemExit, match="2"):
        fleet.arguments()
    assert f"argument {option}: a number from " in capsys.readouterr().err


def test_gpus_are_counted_where_no_price_is_known(fleet: Any) -> None:
    assert fleet.needed([10.0], "kubernetes").splitlines()[1].split()[-2:] == ["2", "nan"]


def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPTS / "fleet.py"), *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def test_the_cheapest_of_those_that_are_good_enough_is_marked(fleet: Any, sim: Any, traffic: Any) -> None:
    requests = traffic.day("flat", 500, (8.0, 20.0), 1)
    begun = sim.Fleet(sim.Service(2.0), sim.Rule("count", 4), 30.0, 0, 1, inside=16)
    rows = list(fleet.sweep(requests, traffic.DAY, begun, fleet.PLATFORMS["modal"]))
    options = type("Options", (), {"p95": 20.0, "lost": 0.001})
    best = fleet.cheapest(rows, options, 1.0)
    good = [row for row in rows if fleet.within(row, 20.0, 0.001)]
    assert best in good
    assert best[1].gpu_s == min(row[1].gpu_s for row in good)
    assert {row[0].idle_s for row in rows} == set(fleet.PLATFORMS["modal"].idle_s)
    widest = max(row[0].most for row in rows)
    assert all(row[1].peak < widest for row in rows if row[0].most == widest)  # more would change nothing


def test_no_bound_that_can_be_held_says_so() -> None:
    done = run("--per-day", "50", "--seconds", "5", "--p95", "1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("None of these is good enough")
    assert "*" not in done.stdout


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--gpu", "A40"], "Nothing is predicted for flux-schnell in fp8 on A40: say --seconds."),
        (["--platform", "kubernetes"], "No price of L40S on kubernetes is known: say --dollars-an-hour."),
        (
            ["--per-day", "0"],
            "Nobody asks for anything: let --per-day be more than 0, or --trace name a file with times.",
        ),
        (
            ["--trace", "README.md"],
            "The trace cannot be read: README.md, line 1: no seconds and no ISO 8601 time: '# Kind",
        ),
    ],
)
def test_what_is_not_known_is_asked_for(arguments: list[str], told: str) -> None:
    done = run(*arguments)
    assert done.returncode == 1
    assert done.stderr.startswith(told)
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("platform", ["modal", "fal", "kubernetes", "cloudrun"])
def test_each_platform_is_told_in_its_own_words(platform: str, tmp_path: Path) -> None:
    (trace := tmp_path / "trace").write_text("\n".join(str(60 * n) for n in range(40)))
    plot = tmp_path / "plot.png"
    asked = ["--trace", str(trace), "--seconds", "1", "--dollars-an-hour", "2", "--p95", "200", "--plot", str(plot)]
    done = run("--platform", platform, *asked)
    assert done.returncode == 0, done.stderr
    assert "40 requests, 1 s each" in done.stdout
    named = {"modal": "MODAL_MAX=", "fal": "--max-concurrency ", "kubernetes": "maxReplicaCount: ", "cloudrun": "maxS"}
    assert named[platform] in done.stdout.splitlines()[-1]
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_what_is_drawn_together_wants_fewer_workers(tmp_path: Path) -> None:
    """Sixteen at once every ten minutes: alone they take 48 s, eight together 2 x 10."""
    (trace := tmp_path / "trace").write_text("\n".join(str(600 * n) for n in range(6) for _ in range(16)))
    asked = ["--platform", "modal", "--trace", str(trace), "--seconds", "1", "--fixed", "2", "--cold-start", "30"]
    alone, together = (run(*asked, "--p95", "100", *more).stdout for more in ([], ["--batch", "8"]))
    paid = [float(re.findall(r"^ +5 .+?(\S+)$", table, re.M)[0]) for table in (alone, together)]
    assert paid[0] > paid[1] > 0


def test_the_guide_shows_what_it_prints(tmp_path: Path) -> None:
    blocks = FOUND.findall((ROOT / "docs" / "scale.md").read_text())
    assert len(blocks) == 2
    for command, printed in blocks:
        arguments = shlex.split(command.replace("\\\n", ""))[2:]
        if "--plot" in arguments:
            arguments[arguments.index("--plot") + 1] = str(tmp_path / "plot.png")
        assert run(*arguments).stdout.strip("\n") == printed


def test_a_real_worker_is_driven_and_foretold() -> None:
    done = run("--against-real", "--load", "0.5", "2", "--for", "2", "--side", "64")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["cold_start_s"] > 0
    assert found["log_bytes_a_request"] > 100
    assert found["metrics_series"] > 50
    for row in found["loads"]:
        assert row["failed"] == 0
        assert row["sent"] == row["answered"] + round(row["seen"]["refused"] * row["sent"])
        for side in ("seen", "foretold", "explained"):
            assert 0 <= row[side]["wait_p50_s"] <= row[side]["wait_p95_s"]
            assert 0 <= row[side]["refused"] < 1
