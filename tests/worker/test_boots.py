"""The boot log: a record of every start, and no volume, however broken, that holds one up."""

import errno
import json
import os
import threading
import time
from dataclasses import asdict
from pathlib import Path

import pytest

from fakes import raises
from handler.core.birth import Birth
from handler.core.errors import BudgetExceeded
from handler.worker import boots
from handler.worker.boots import BootLog, last_boots, measured
from handler.worker.clock import Clock, Ledger, Phase
from handler.worker.compilation import plan


def boot_log(volume: Path) -> BootLog:
    return BootLog(volume, Birth.anew())


def left(volume: Path, name: str, text: str, hours: float) -> Path:
    """A record that the volume says was written so many hours ago; later, if they are negative."""
    (volume / "boots").mkdir(exist_ok=True)
    path = volume / "boots" / f"{name}.json"
    path.write_text(text)
    os.utime(path, (then := time.time() - 3600 * hours, then))
    return path


def test_the_newest_state_is_on_the_volume(tmp_path: Path) -> None:
    log, ledger = boot_log(tmp_path), Ledger(model="spark", phase="weights")
    log(ledger)
    assert log.flush()
    assert [(boot["outcome"], boot["phase"]) for boot in last_boots(tmp_path, 5)] == [("starting", "weights")]
    ledger.outcome, ledger.reason = "failed", "budget"
    log(ledger)  # waits by itself: these are a failed start's last words
    assert [(boot["outcome"], boot["reason"]) for boot in last_boots(tmp_path, 5)] == [("failed", "budget")]
    assert [path.suffix for path in (tmp_path / "boots").iterdir()] == [".json"]


def test_only_the_newest_are_kept_and_shown_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(boots, "KEPT", 3)
    for day in range(1, 6):
        left(tmp_path, f"2020-01-0{day}", "torn {" if day == 5 else json.dumps({"day": day}), 24 * (6 - day))
    log = boot_log(tmp_path)
    log(Ledger(model="spark"))
    assert log.flush()
    assert [boot.get("day", "new") for boot in last_boots(tmp_path, 9)] == ["new", 4]


def test_the_first_start_on_a_volume_makes_it(tmp_path: Path) -> None:
    log = boot_log(tmp_path / "not" / "there")
    log(Ledger(model="spark"))
    assert log.flush()
    assert [boot["model"] for boot in last_boots(tmp_path / "not" / "there", 9)] == ["spark"]


def test_a_volume_that_cannot_be_written_is_no_reason_to_fail(tmp_path: Path) -> None:
    (tmp_path / "boots").write_text("not a folder")
    log = boot_log(tmp_path)
    log(Ledger())
    assert log.flush()
    log(Ledger(outcome="failed"))
    assert last_boots(tmp_path, 1) == []


def test_the_volumes_clock_orders_and_no_workers_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker whose clock is years ahead left as many records as are kept: they are older, and go first."""
    monkeypatch.setattr(boots, "KEPT", 3)
    for number in range(3):
        left(tmp_path, f"2099-01-0{number + 1}T00-00-00-ahead-{number}", f'{{"reason": "{number}"}}', 9 - number)
    log = boot_log(tmp_path)
    log(Ledger(reason="mine"))
    assert log.flush()
    assert [boot["reason"] for boot in last_boots(tmp_path, 9)] == ["mine", "2", "1"]


def test_a_worker_never_removes_what_it_wrote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even where as many as are kept were written since, by others that start."""
    monkeypatch.setattr(boots, "KEPT", 3)
    for number in range(4):
        left(tmp_path, str(number), "{}", -30 / 3600)
    log = boot_log(tmp_path)
    log(Ledger(reason="mine"))
    assert log.flush()
    assert [boot.get("reason") for boot in last_boots(tmp_path, 9)] == [None, None, None, "mine"]


def test_records_of_a_date_to_come_are_older_than_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else as many of them as are kept would let each start remove the last true one."""
    monkeypatch.setattr(boots, "KEPT", 3)
    for number in range(3):
        left(tmp_path, f"ahead-{number}", '{"reason": "ahead"}', -24 * (number + 1))
    told = []
    for reason in ("first", "second", "third", "fourth"):
        log = boot_log(tmp_path)
        log(Ledger(reason=reason))
        assert log.flush()
        told.append([boot["reason"] for boot in last_boots(tmp_path, 9)])
    assert told[0] == ["first", "ahead", "ahead"]
    assert told[1] == ["second", "first", "ahead"]
    assert told[3] == ["fourth", "third", "second"]


def test_who_could_not_write_knows_no_time_and_dates_nothing_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = boot_log(tmp_path)
    log(Ledger())
    assert log.flush()
    [own] = (tmp_path / "boots").iterdir()
    os.utime(own, (then := time.time() - 3600, then))
    other = left(tmp_path, "other", "{}", 0.5)  # after what this one wrote last
    monkeypatch.setattr(boots, "write_atomically", lambda *_: raises(OSError(errno.ENOSPC, "full"))())
    log(Ledger(phase="weights"))
    assert log.flush()
    assert other.stat().st_mtime > 0


PHASES = '{"model": "spark", "device": "CPU", "phases": [{"name": "compile", "start_s": 1, "seconds": %s}]}'


@pytest.mark.parametrize(
    "damaged",
    [
        *(
            "",
            "null",
            "3",
            '{"model": ',
            "[" * 50_000,
            '{"a":' * 5000 + "1" + "}" * 5000,
            "[" * 99 + "]" * 99,
            "\0",
            "\xff",
        ),
        *(
            PHASES % value
            for value in ("1" + "0" * 400, "1e400", "NaN", "-Infinity", '"x"', "null", "[]", "1e300", "-1")
        ),
        *('{"phases": 5}', '{"phases": [5]}', '{"phases": [{}]}', '{"total_s": "soon"}', '{"reason": 5}', "[{}]"),
        '{"model": "\\ud800"}',
    ],
    ids=lambda text: text[:40],
)
def test_damaged_ledgers_are_left_out(damaged: str, tmp_path: Path) -> None:
    left(tmp_path, "1", '{"model": "spark"}', 1)
    left(tmp_path, "9999", damaged, 0).write_bytes(damaged.encode("latin-1"))
    assert last_boots(tmp_path, 1) == [{"boot": "1", "model": "spark"}]
    assert measured(last_boots(tmp_path, 9), "compile", "spark", "CPU") is None


def test_a_volume_that_hangs_holds_up_a_failed_start_only_briefly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    released = threading.Event()
    monkeypatch.setattr(boots, "PATIENCE_S", 0.05)
    monkeypatch.setattr(boots, "write_atomically", lambda path, data: released.wait(60))
    log = boot_log(tmp_path)
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
    phases = [asdict(Phase("import", 2.0, 8.0)), asdict(Phase("weights", 10.0, 20.0))]
    boot = asdict(clock.ledger) | {"total_s": 240.0, "phases": phases}
    assert measured([boot], "compile", "a", "H200") == 210.0
    assert measured([boot | {"reason": "the GPU failed"}], "compile", "a", "H200") is None
    assert plan("auto", "cuda", "MISS", "", 200, 210.0).mode == "EAGER"


def test_a_record_that_does_not_say_how_long_a_start_took_tells_nothing_of_its_end(tmp_path: Path) -> None:
    said = {"model": "a", "device": "H200", "outcome": "failed", "phase": "compile", "reason": "it exceeded its budget"}
    left(tmp_path, "1", json.dumps(said), 1)
    assert measured(last_boots(tmp_path, 1), "compile", "a", "H200") == 0.0


def test_a_phase_is_looked_for_in_the_last_starts_that_had_it() -> None:
    """However many starts of other models, or such as found everything compiled, came since."""
    others = [asdict(Ledger(model=f"m{i}", device="H200")) for i in range(20)]
    found = [asdict(Ledger(model="a", device="H200", phases=[Phase("artifacts", 1.0, 0.1)])) for _ in range(20)]
    mine = [asdict(Ledger(model="a", device="H200", phases=[Phase("compile", 1.0, float(i))])) for i in range(30, 50)]
    assert measured([*others, *found, *mine], "compile", "a", "H200") == 39.0


def test_what_is_no_record_or_has_just_gone_is_passed_over(tmp_path: Path) -> None:
    left(tmp_path, "1", '{"model": "spark"}', 1)
    for name in ("notes.txt", ".half.json", "2.json.part"):
        (tmp_path / "boots" / name).write_text('{"model": "none"}')
    for name in ("0", "2"):
        (tmp_path / "boots" / f"{name}.json").symlink_to("gone")
    assert last_boots(tmp_path, 9) == [{"boot": "1", "model": "spark"}]


def test_workers_that_are_alike_in_all_have_records_of_their_own(tmp_path: Path) -> None:
    """Same second, same host, same process id, as containers that are restored from one snapshot have."""
    logs = [boot_log(tmp_path) for _ in range(3)]
    for log in logs:
        log(Ledger())
        assert log.flush()
    assert len(last_boots(tmp_path, 9)) == 3
