"""The boot log: a record of every start, and no volume, however broken, that holds one up."""

import json
import os
import threading
from dataclasses import asdict
from pathlib import Path

import pytest

from handler import boots
from handler.boots import BootLog, last_boots, measured
from handler.clock import Clock, Ledger, Phase, plan
from handler.errors import BudgetExceeded


def test_the_newest_state_is_on_the_volume(tmp_path: Path) -> None:
    log, ledger = BootLog(tmp_path), Ledger(model="spark", phase="weights")
    log(ledger)
    assert log.flush()
    assert [(boot["outcome"], boot["phase"]) for boot in last_boots(tmp_path, 5)] == [("starting", "weights")]
    ledger.outcome, ledger.reason = "failed", "budget"
    log(ledger)  # waits by itself: these are a failed start's last words
    assert [(boot["outcome"], boot["reason"]) for boot in last_boots(tmp_path, 5)] == [("failed", "budget")]
    assert [path.suffix for path in (tmp_path / "boots").iterdir()] == [".json"]


def test_only_the_newest_are_kept_and_shown_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(boots, "KEPT", 3)
    (tmp_path / "boots").mkdir()
    for day in range(1, 6):
        (tmp_path / "boots" / f"2020-01-0{day}.json").write_text(json.dumps({"day": day}))
    (tmp_path / "boots" / "2020-01-05.json").write_text("torn {")
    log = BootLog(tmp_path)
    log(Ledger(model="spark"))
    assert log.flush()
    assert [boot.get("day", "new") for boot in last_boots(tmp_path, 9)] == ["new", 4]


def test_a_volume_that_cannot_be_written_is_no_reason_to_fail(tmp_path: Path) -> None:
    (tmp_path / "boots").write_text("not a folder")
    log = BootLog(tmp_path)
    log(Ledger())
    assert log.flush()
    log(Ledger(outcome="failed"))
    assert last_boots(tmp_path, 1) == []


@pytest.mark.parametrize("damaged", ["", "null", "3", '{"model": ', "[" * 50_000])
def test_damaged_ledgers_are_left_out(damaged: str, tmp_path: Path) -> None:
    (tmp_path / "boots").mkdir()
    (tmp_path / "boots" / "9999.json").write_text(damaged)
    (tmp_path / "boots" / "1.json").write_text('{"model": "spark"}')
    assert last_boots(tmp_path, 9) == [{"boot": "1", "model": "spark"}]


def test_a_volume_that_hangs_holds_up_a_failed_start_only_briefly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    released = threading.Event()
    monkeypatch.setattr(boots, "PATIENCE_S", 0.05)
    monkeypatch.setattr(boots, "write_atomically", lambda path, data: released.wait(60))
    log = BootLog(tmp_path)
    log(Ledger())  # returns at once
    assert not log.flush()
    log(Ledger(outcome="failed"))  # returns after its patience
    released.set()


def test_what_a_phase_took_before() -> None:
    def boot(model: str, device: str, seconds: float, precision: str = "bf16", failure: str = "") -> dict[str, object]:
        phases = [Phase("compile", 1.0, seconds)]
        told = Ledger(model=model, device=device, precision=precision, phases=phases, compile_failure=failure)
        return asdict(told)

    past = [boot("a", "H200", 20.0), boot("a", "H200", 31.5), boot("b", "H200", 90.0), boot("a", "L4", 80.0), {}]
    assert measured(past, "compile", "a", "H200") == 31.5
    assert measured(past, "warm", "a", "H200") is None
    assert measured([], "compile", "a", "H200") is None
    rounded = [boot("a", "H200", 60.0, "fp8"), boot("a", "H200", 3.0, failure="no compiler"), *past]
    assert measured(rounded, "compile", "a", "H200", "fp8") == 60.0
    assert measured(rounded, "compile", "a", "H200", "bf16") == 31.5
    assert measured(rounded, "compile", "a", "H200", "int8") is None


def test_a_start_that_ended_while_it_compiled_tells_how_long_that_takes_at_least() -> None:
    """Else each one after it would do the same, and none would serve."""
    clock = Clock(0.0, publish=lambda ledger: None)
    clock.ledger.model, clock.ledger.device, clock.ledger.phase = "a", "H200", "compile"
    with pytest.raises(BudgetExceeded) as caught:
        clock.check()
    clock.finish("failed", caught.value.message)
    boot = asdict(clock.ledger) | {"total_s": 240.0, "phases": [asdict(Phase("weights", 10.0, 20.0))]}
    assert measured([boot], "compile", "a", "H200") == 210.0
    assert measured([boot | {"reason": "the GPU failed"}], "compile", "a", "H200") is None
    assert plan("auto", "cuda", "MISS", "", 200, 210.0).mode == "EAGER"


def test_a_phase_is_looked_for_in_the_last_starts_that_had_it() -> None:
    """However many starts of other models, or such as found everything compiled, came since."""
    others = [asdict(Ledger(model=f"m{i}", device="H200")) for i in range(20)]
    found = [asdict(Ledger(model="a", device="H200", phases=[Phase("artifacts", 1.0, 0.1)])) for _ in range(20)]
    mine = [asdict(Ledger(model="a", device="H200", phases=[Phase("compile", 1.0, float(i))])) for i in range(30, 50)]
    assert measured([*others, *found, *mine], "compile", "a", "H200") == 39.0


def test_names_sort_by_time_and_tell_processes_apart(tmp_path: Path) -> None:
    log = BootLog(tmp_path)
    log(Ledger())
    assert log.flush()
    (path,) = (tmp_path / "boots").iterdir()
    assert path.stem.endswith(str(os.getpid()))
