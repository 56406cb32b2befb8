"""The budget: phases are timed, and no hang survives it."""

import json
import subprocess
import sys
import threading
import time

import pytest

from handler import Clock
from handler.clock import Ledger, process_age
from handler.errors import BudgetExceeded

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


def quiet(ledger: Ledger) -> None:
    pass


def test_phases_are_timed_from_birth() -> None:
    said: list[str] = []
    clock = Clock(100, age=lambda: 7.0, announce=said.append, publish=quiet)
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
        [sys.executable, "-c", "import time; time.sleep(0.3); from handler.clock import *; print(process_age())"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert 0.3 <= float(out.stdout) < 60
    assert process_age() > 0


def test_a_spent_budget_names_the_phase() -> None:
    clock = Clock(5, age=lambda: 4.99, publish=quiet)
    with pytest.raises(BudgetExceeded, match=r"5 s in phase 'weights'"), clock.phase("weights"):
        time.sleep(0.05)
    with pytest.raises(BudgetExceeded):
        Clock(5, age=lambda: 6.0, publish=quiet).arm()


def test_watchdog_closes_the_ledger_once(capfd: pytest.CaptureFixture[str]) -> None:
    ended, codes = threading.Event(), []
    published: list[Ledger] = []

    def abort(code: int) -> None:
        codes.append(code)
        ended.set()

    clock = Clock(0.05, age=lambda: 0.0, publish=published.append, abort=abort)
    clock.arm()
    assert ended.wait(10)
    assert codes == [1]
    assert not clock.finish("ready")
    assert [ledger.outcome for ledger in published] == ["failed"]
    assert "budget of 0.05 s in phase 'start'" in capfd.readouterr().err


def test_finishing_disarms_the_watchdog() -> None:
    codes: list[int] = []
    clock = Clock(0.05, age=lambda: 0.0, publish=quiet, abort=codes.append)
    clock.arm()
    assert clock.finish("ready")
    for thread in threading.enumerate():
        if thread.name == "cold-start-watchdog":
            thread.join(10)
    assert codes == []


@pytest.mark.parametrize("how", ["block_on_a_read", "block_in_native_code"])
def test_a_hang_ends_the_process_and_names_phase_and_place(how: str) -> None:
    out = subprocess.run(
        [sys.executable, "-c", HANG.replace("{how}", how)], capture_output=True, text=True, timeout=60, check=False
    )
    assert out.returncode == 1
    assert "phase weights" in out.stderr
    assert how in out.stderr  # the dumped stack names the function that hangs
    if how == "block_on_a_read":
        assert "in phase 'weights'" in out.stderr
        assert '"outcome": "failed"' in out.stderr
