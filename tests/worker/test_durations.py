"""What past starts tell of how long a phase takes: of the same model, device and precision, and however they ended."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from handler.core.errors import BudgetExceeded
from handler.worker.boots import KEPT
from handler.worker.clock import Clock, Ledger, Phase
from handler.worker.compilation import plan
from handler.worker.durations import Durations, took

MINE = ("a", "H200", "bf16")
ASSUMED = 90.0  # seconds, where nothing was measured


def start(*phases: tuple[str, float], **differing: Any) -> Ledger:
    timed = [Phase(name, 1.0, seconds) for name, seconds in phases]
    return Ledger(**{"model": "a", "device": "H200", "precision": "bf16", "phases": timed, **differing})


def past(*ledgers: Ledger) -> Durations:
    return Durations(tuple(one for ledger in ledgers for one in took(ledger)))


def test_what_a_phase_took_before() -> None:
    others = (start(("compile", 90.0), model="b"), start(("compile", 80.0), device="L4"), Ledger())
    here = (start(("compile", 20.0)), start(("compile", 31.5)), *others)
    assert past(*here).longest("compile", *MINE, ASSUMED) == 31.5
    assert past(*here).longest("warm", *MINE, ASSUMED) is None
    assert Durations().longest("compile", *MINE, ASSUMED) is None
    rounded = start(("compile", 60.0), precision="fp8"), start(("compile", 300.0), compile_failure="no compiler")
    found = past(*rounded, *here)
    known = {
        precision: found.longest("compile", "a", "H200", precision, ASSUMED) for precision in ("fp8", "bf16", "int8")
    }
    assert known == {"fp8": 60.0, "bf16": 31.5, "int8": None}


def test_a_start_that_ended_while_it_compiled_tells_how_long_that_takes_at_least() -> None:
    """Else each one after it would do the same, and none would serve."""
    clock = Clock(0.0, publish=lambda ledger: None)
    clock.ledger.model, clock.ledger.device, clock.ledger.precision = MINE
    clock.ledger.phase = "compile"
    with pytest.raises(BudgetExceeded) as caught:
        clock.require_time()
    clock.finish("failed", caught.value.message)
    ledger = replace(clock.ledger, total_s=240.0, phases=[Phase("import", 2.0, 8.0), Phase("weights", 10.0, 20.0)])
    assert past(ledger).longest("compile", *MINE, ASSUMED) == 210.0
    assert past(replace(ledger, reason="the GPU failed")).longest("compile", *MINE, ASSUMED) is None
    assert past(replace(ledger, outcome="stopped")).longest("compile", *MINE, ASSUMED) is None
    assert past(ledger).longest("weights", *MINE, ASSUMED) == 20.0
    assert plan("auto", "cuda", "MISS", "", 200, 210.0).mode == "EAGER"


@pytest.mark.parametrize(("compiled_s", "known"), [(0.05, None), (89.0, None), (91.0, 91.0)])
def test_a_start_whose_budget_ended_as_it_began_to_compile_has_measured_nothing(
    compiled_s: float, known: float | None
) -> None:
    """Other phases had taken the time: compiling takes longer than what was left, which is known already."""
    weights = Phase("weights", 0.0, 240.0 - compiled_s)
    reason = "cold start exceeded its budget of 240 s in phase 'compile'"
    cut = start(outcome="failed", reason=reason, phase="compile", total_s=240.0)
    cut.phases = [weights]
    assert past(cut).longest("compile", *MINE, ASSUMED) == known
    seconds = 60.0 if known is None else 91.0
    assert past(cut, start(("compile", 60.0))).longest("compile", *MINE, ASSUMED) == max(seconds, compiled_s)
    assert "(assumed)" in plan("auto", "cuda", "MISS", "", 200, past(cut).longest("compile", *MINE, 1e9)).reason


def test_a_phase_is_looked_for_in_the_last_starts_that_had_it() -> None:
    """However many starts of other models, or such as found everything compiled, came since."""
    others = [start(("compile", 99.0), model=f"m{i}") for i in range(20)]
    found = [start(("artifacts", 0.1)) for _ in range(20)]
    mine = [start(("compile", float(i))) for i in range(30, 50)]
    assert past(*others, *found, *mine).longest("compile", *MINE, ASSUMED) == 39.0


def left(volume: Path, name: str, said: dict[str, Any], seconds: float) -> None:
    (volume / "boots").mkdir(exist_ok=True)
    path = volume / "boots" / f"{name}.json"
    path.write_text(json.dumps(said))
    os.utime(path, (seconds, seconds))


def test_a_record_that_does_not_say_how_long_a_start_took_tells_nothing_of_its_end(tmp_path: Path) -> None:
    said = {"model": "a", "device": "H200", "precision": "bf16", "outcome": "failed", "phase": "compile"}
    left(tmp_path, "1", {**said, "reason": "it exceeded its budget"}, 1)
    assert Durations.on(tmp_path).longest("compile", *MINE, ASSUMED) is None


def test_the_records_of_an_earlier_and_of_a_later_version_tell_too(tmp_path: Path) -> None:
    """The first knows no kernels of attention yet, the second says what nobody here understands."""
    said = {"model": "a", "device": "H200", "precision": "bf16", "outcome": "ready"}
    phases = [{"name": "compile", "start_s": 9, "seconds": 30}]
    left(tmp_path, "1", {**said, "phases": phases}, 1)
    left(tmp_path, "2", {**said, "phases": [{**phases[0], "seconds": 40}], "tensor_cores": True}, 2)
    left(tmp_path, "3", {"phases": phases}, 3)
    assert Durations.on(tmp_path).longest("compile", *MINE, ASSUMED) == 40.0


def test_as_many_starts_are_remembered_as_are_kept(tmp_path: Path) -> None:
    said = {"model": "a", "device": "H200", "precision": "bf16"}
    for number in range(KEPT + 1):
        phases = [{"name": "compile" if number == 0 else "warm", "start_s": 0, "seconds": 1}]
        left(tmp_path, str(number), {**said, "phases": phases}, number)
    found = Durations.on(tmp_path)
    assert len(found.took) == KEPT
    assert found.longest("compile", *MINE, ASSUMED) is None
