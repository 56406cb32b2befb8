"""The budget: phases are timed, and no hang survives it."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from handler import Clock, Settings, Worker
from handler.core.birth import Birth, process_age
from handler.core.errors import BudgetExceeded, OutOfMemory, SettingsError, StartError, WeightsMissing
from handler.core.outlet import LAST_S
from handler.server.shutdown import ANSWER_S
from handler.worker.boots import PATIENCE_S
from handler.worker.clock import Ledger
from handler.worker.compilation import COMPILE_S, FIRST_PICTURE_S, MARGIN, plan
from handler.worker.ending import Ending
from threads import begun, have_ended

HANG = """
import ctypes, os, sys, time
from handler import Clock
def block_on_a_read():
    reader, writer = os.pipe()
    os.read(reader, 1)
def block_in_native_code():  # PyDLL keeps the GIL, so that no Python thread can run
    ctypes.PyDLL(None).sleep(60)
clock = Clock(2.0 + Clock(9).elapsed, announce=lambda phase: print("phase", phase, file=sys.stderr, flush=True))
clock.arm()
with clock.phase("weights"):
    {how}()
"""


STILL = Birth(0.0, clock=lambda: 0.0)  # just now, however long the test takes


def born(seconds: float) -> Birth:
    """The birth of a worker that many seconds ago."""
    return Birth(time.monotonic() - seconds)


def quiet(ledger: Ledger) -> None:
    pass


def test_phases_are_timed_from_birth() -> None:
    said: list[str] = []
    clock = Clock(100, birth=born(7.0), announce=said.append, publish=quiet)
    clock.arm()
    with clock.phase("import"):
        time.sleep(0.01)
    with clock.phase("weights"):
        pass
    assert clock.finish("ready", "why")
    first, second = clock.ledger.phases
    assert said == ["import", "weights"] == [first.name, second.name]
    assert first.start_s >= 7
    assert first.seconds >= 0.01
    assert second.start_s >= first.start_s + first.seconds - 0.002
    assert clock.ledger.total_s >= 7
    line = json.loads(clock.ledger.line())["cold_start"]
    assert (line["outcome"], line["reason"], len(line["phases"])) == ("ready", "why", 2)


def test_age_is_the_process_age() -> None:
    out = subprocess.run(
        [sys.executable, "-c", "import time; time.sleep(0.3); from handler.core.birth import *; print(process_age())"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert 0.3 <= float(out.stdout) < 60
    assert process_age() > 0


def test_a_spent_budget_names_the_phase() -> None:
    clock = Clock(5, birth=born(4.99), publish=quiet)
    with pytest.raises(BudgetExceeded, match=r"5 s in phase 'weights'"), clock.phase("weights"):
        time.sleep(0.05)
    with pytest.raises(BudgetExceeded):
        Clock(5, birth=born(6.0), publish=quiet).arm()


def test_whoever_comes_after_the_watchdog_goes_on_once_that_has_told() -> None:
    """Who is told that a start failed may end its process at once, and a record would never be written."""
    telling, go_on, ended = threading.Event(), threading.Event(), threading.Event()
    clock = Clock(0.05, birth=STILL, publish=quiet, abort=lambda _: ended.set())

    def record(ledger: Ledger) -> None:
        telling.set()
        go_on.wait(60)

    clock.record = record
    clock.arm()
    assert telling.wait(60)
    late = threading.Thread(target=clock.finish, args=["failed", "out of time"])
    late.start()
    late.join(0.1)
    assert late.is_alive()
    go_on.set()
    late.join(60)
    assert ended.wait(60)


def test_watchdog_closes_the_ledger_once(capfd: pytest.CaptureFixture[str]) -> None:
    ended, codes = threading.Event(), []
    published: list[Ledger] = []

    def abort(code: int) -> None:
        codes.append(code)
        ended.set()

    clock = Clock(0.05, birth=STILL, publish=published.append, abort=abort)  # 0.05 s after it is armed, not before
    clock.arm()
    assert ended.wait(30)
    assert codes == [124]
    assert not clock.finish("ready")
    assert [ledger.outcome for ledger in published] == ["failed"]
    assert "budget of 0.05 s in phase 'start'" in capfd.readouterr().err


def test_where_no_thread_can_run_the_process_ends_two_seconds_past_its_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """By what needs no GIL, and before it nothing does: so the thread has said what it could."""
    told: list[Any] = []
    later = lambda seconds, **options: told.append((seconds, options))  # noqa: E731
    monkeypatch.setattr("handler.worker.clock.faulthandler.dump_traceback_later", later)
    monkeypatch.setattr(Ending, "set", lambda ending, seconds: told.append(seconds))
    clock = Clock(100, birth=STILL, publish=quiet)
    with begun() as threads:
        clock.arm()
    assert clock.finish("ready")
    assert told == [102.0, (102.0, {"exit": True, "file": 2})]
    assert have_ended(*threads.values())


def test_what_is_still_told_at_the_end_may_take_all_its_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """A log that nobody reads, a volume that hangs, and callers who take their answer slowly, one after the other."""
    ends, ended = list[float](), threading.Event()
    monkeypatch.setattr("os._exit", lambda code: ended.set())
    later = lambda seconds, **options: ends.append(seconds)  # noqa: E731
    monkeypatch.setattr("handler.worker.clock.faulthandler.dump_traceback_later", later)
    monkeypatch.setattr(Ending, "set", lambda ending, seconds: True)
    Clock(0.05, birth=STILL, publish=quiet, abort=os._exit).arm()
    assert ended.wait(30)
    assert ends[1] > LAST_S + PATIENCE_S + ANSWER_S + LAST_S


def test_a_start_that_is_armed_while_it_is_stopped_is_not_ended_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a program gives up an engine whose thread is just about to arm its clock."""
    told: list[str] = []
    clock = Clock(100, birth=STILL, publish=quiet)

    def cancel(ending: Ending) -> None:
        told.append("cancel")
        if not clock._lock.locked():
            clock.arm()

    monkeypatch.setattr("handler.worker.clock.faulthandler.dump_traceback_later", lambda *_, **__: None)
    monkeypatch.setattr(Ending, "set", lambda ending, seconds: told.append("set"))
    monkeypatch.setattr(Ending, "cancel", cancel)
    with begun() as threads:
        assert clock.finish("stopped")
        clock.arm()
    assert told == ["cancel"]
    assert have_ended(*threads.values())


def test_a_start_that_was_stopped_before_it_was_armed_is_not_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a program gives up an engine that it has just started: it goes on, and must not be ended later."""
    told: list[Any] = []
    monkeypatch.setattr(
        "handler.worker.clock.faulthandler.dump_traceback_later", lambda *given, **_: told.append(given)
    )
    clock = Clock(100, birth=STILL, publish=quiet)
    assert clock.finish("stopped")
    with begun() as threads:
        clock.arm()
    assert (threads, told) == ({}, [])


def test_what_fails_once_the_watchdog_ends_the_process_does_not_disarm_it(monkeypatch: pytest.MonkeyPatch) -> None:
    disarmed, ended = list[str](), threading.Event()
    monkeypatch.setattr("handler.worker.clock.faulthandler.cancel_dump_traceback_later", lambda: disarmed.append("now"))
    clock = Clock(0.05, birth=STILL, publish=quiet, abort=lambda _: ended.set())
    clock.arm()
    assert ended.wait(30)
    assert not clock.finish("failed")
    assert disarmed == []


def test_finishing_disarms_the_watchdog() -> None:
    codes: list[int] = []
    clock = Clock(60, birth=STILL, publish=quiet, abort=codes.append)
    with begun() as threads:
        clock.arm()
    assert clock.finish("ready")
    assert have_ended(*threads.values())  # long before the budget does
    assert not clock.finish("ready")
    assert (list(threads), codes) == (["cold-start-watchdog"], [])


OPENED = """
import os
from handler import Clock
before = os.listdir("/proc/self/fd")
for _ in range(3):
    clock = Clock.anew(60)
    clock.arm()
    clock.finish("ready")
print(before == os.listdir("/proc/self/fd"))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux opens a pipe anew")
def test_a_start_that_is_over_leaves_no_file_open() -> None:
    done = subprocess.run([sys.executable, "-c", OPENED], capture_output=True, text=True, check=True)
    assert done.stdout == "True\n"


@pytest.mark.parametrize("how", ["block_on_a_read", "block_in_native_code"])
def test_a_hang_ends_the_process_and_names_phase_and_place(how: str) -> None:
    out = subprocess.run(
        [sys.executable, "-c", HANG.replace("{how}", how)], capture_output=True, text=True, timeout=60, check=False
    )
    assert out.returncode == 124
    assert "phase weights" in out.stderr
    assert how in out.stderr  # the dumped stack names the function that hangs
    assert "exceeded its budget of" in out.stderr
    (line,) = (json.loads(line) for line in out.stderr.splitlines() if line.startswith('{"cold_start"'))
    assert (line["cold_start"]["outcome"], line["cold_start"]["phase"]) == ("failed", "weights")
    assert ("native code" in line["cold_start"]["reason"]) == (how == "block_in_native_code")


def test_where_the_c_library_has_no_timers_faulthandler_ends_the_process() -> None:
    code = "import handler.worker.ending as ending\nending.LIBC = object()\n" + HANG
    out = subprocess.run(
        [sys.executable, "-c", code.replace("{how}", "block_in_native_code")],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert out.returncode == 1
    assert "block_in_native_code" in out.stderr


NEEDED = MARGIN * COMPILE_S + FIRST_PICTURE_S


@pytest.mark.parametrize(
    ("policy", "device", "outcome", "left", "past", "mode", "compiles", "says"),
    [
        ("off", "cuda", "HIT", 200, 10, "EAGER", False, "KINDLING_COMPILE=off"),
        ("auto", "cuda", "HIT", 1, None, "COMPILED", False, "HIT: why"),
        ("auto", "cpu", "HIT", 1, None, "COMPILED", False, "HIT: why"),
        ("on", "cpu", "HIT", 200, None, "COMPILED", False, "HIT: why"),
        ("auto", "cpu", "MISS", 200, None, "EAGER", False, "on a CPU only 'bake' compiles"),
        ("auto", "cpu", "STALE", 200, 1, "EAGER", False, "STALE: why"),
        ("on", "cpu", "MISS", 200, 40, "COMPILED", True, "about 40 s (measured)"),
        ("auto", "cuda", "MISS", NEEDED, None, "COMPILED", True, f"about {COMPILE_S:.0f} s (assumed)"),
        ("auto", "cuda", "MISS", NEEDED - 1, None, "EAGER", False, f"too much for the {NEEDED - 1:.0f} s left"),
        ("auto", "cuda", "STALE", 200, 40, "COMPILED", True, "STALE: why"),
        ("auto", "cuda", "ERROR", 200, 40, "COMPILED", True, "ERROR: why"),
        ("auto", "cuda", "ERROR", 50, 40, "EAGER", False, "too much for the 50 s left"),
        ("on", "cuda", "MISS", 50, 40, "EAGER", False, "too much"),
        ("auto", "cuda", "MISS", -3, None, "EAGER", False, "too much"),
    ],
)
def test_the_plan(
    policy: str, device: str, outcome: str, left: float, past: float | None, mode: str, compiles: bool, says: str
) -> None:
    chosen = plan(policy, device, outcome, "why", left, past)
    assert (chosen.mode, chosen.compiles) == (mode, compiles)
    assert says in chosen.reason


def test_a_plan_to_compile_always_leaves_its_margin() -> None:
    for left in range(0, 240, 3):
        for past in (None, 5.0, 30.0, 100.0):
            chosen = plan("auto", "cuda", "MISS", "", left, past)
            assert not chosen.compiles or left >= MARGIN * (past or COMPILE_S) + FIRST_PICTURE_S


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OutOfMemory("It does not fit.", "size"), "It does not fit."),
        (WeightsMissing("No weights.", "model"), "No weights."),
        (SettingsError("KINDLING_X is wrong.", "KINDLING_X"), "KINDLING_X is wrong."),
        (ValueError("bad magic"), "spark could not be loaded: ValueError: bad magic"),
    ],
)
def test_whatever_ends_a_start_is_a_start_error_and_closes_the_ledger(error: Exception, told: str) -> None:
    clock = Clock(100, birth=STILL, publish=quiet)
    with pytest.raises(StartError) as caught, clock.start("spark"):
        raise error
    assert (caught.value.message, caught.value.param) == (told, getattr(error, "param", None))
    assert (caught.value is error) == isinstance(error, StartError)
    assert (clock.ledger.outcome, clock.ledger.reason) == ("failed", told.removeprefix("spark could not be loaded: "))
    assert not clock.finish("ready")


def test_each_state_of_a_start_is_announced_and_recorded() -> None:
    said: list[Any] = []
    clock = Clock(100, birth=STILL, announce=said.append, publish=lambda ledger: said.append(("end", ledger.outcome)))
    clock.record = lambda ledger: said.append((ledger.phase, ledger.outcome))
    with clock.phase("import"):
        said.append("inside")
    clock.finish("ready")
    assert said == ["import", ("import", "starting"), "inside", ("end", "ready"), ("import", "ready")]
    assert Ledger().phases is not Ledger().phases


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(0), GeneratorExit()])
@pytest.mark.parametrize("phase", ["volume", "import"])
def test_whoever_ends_a_start_disarms_it(
    error: BaseException, phase: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C in a notebook, or a library that wants to exit: the program that goes on is not ended later."""

    def ends(*_: object, **__: object) -> None:
        raise error

    place = {"volume": "handler.worker.worker.outlook", "import": "handler.worker.worker.detect"}[phase]
    monkeypatch.setattr(place, ends)
    killed: list[int] = []
    clock = Clock(3600, publish=lambda ledger: None, abort=killed.append)
    with pytest.raises(type(error)):
        Worker.boot(Settings(volume=tmp_path), clock)
    assert (clock.ledger.outcome, clock.ledger.reason) == ("stopped", f"{type(error).__name__} in phase '{phase}'")
    assert not clock.finish("ready")  # so it was disarmed
    for thread in threading.enumerate():
        if thread.name == "cold-start-watchdog":
            thread.join(10)
    assert killed == []


def test_the_program_lives_on_after_ctrl_c_in_a_start(tmp_path: Path) -> None:
    """With both watchdogs as they are: past the budget nothing happens."""
    code = """
import sys, time
from handler import Clock, Settings, Worker
from handler.core.birth import Birth
import handler.worker.worker
def interrupt(*_, **__): raise KeyboardInterrupt
handler.worker.worker.outlook = interrupt
clock = Clock(0.5, Birth.anew(), publish=lambda ledger: None)
try:
    Worker.boot(Settings(volume=sys.argv[1]), clock)
except KeyboardInterrupt:
    pass
while clock.remaining > -2.5:  # longer than GRACE_S past it
    time.sleep(0.05)
print("alive")
"""
    out = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert (out.returncode, out.stdout) == (0, "alive\n"), out.stderr
