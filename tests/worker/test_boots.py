"""The boot log: a record of every start, and no volume, however broken, that holds one up."""

import errno
import json
import os
import threading
import time
from pathlib import Path

import pytest

from fakes import raises
from handler.core.birth import Birth
from handler.worker import boots
from handler.worker.boots import BootLog, last_boots
from handler.worker.clock import Ledger
from handler.worker.durations import Durations


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
        left(tmp_path, f"2020-01-0{day}T00-00-00-a", "torn {" if day == 5 else json.dumps({"day": day}), 24 * (6 - day))
    log = boot_log(tmp_path)
    log(Ledger(model="spark"))
    assert log.flush()
    assert [boot.get("day", "new") for boot in last_boots(tmp_path, 9)] == ["new", 4]


def test_the_first_start_on_a_volume_makes_it(tmp_path: Path) -> None:
    log = boot_log(tmp_path / "not" / "there")
    log(Ledger(model="spark"))
    assert log.flush()
    assert [boot["model"] for boot in last_boots(tmp_path / "not" / "there", 9)] == ["spark"]


def test_a_volume_that_cannot_be_written_is_no_reason_to_fail_and_is_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "boots").write_text("not a folder")
    log = boot_log(tmp_path)
    log(Ledger())
    assert log.flush()
    log(Ledger(outcome="failed"))
    assert last_boots(tmp_path, 1) == []
    [told] = caplog.messages
    assert told.startswith(f"The volume {tmp_path} cannot be written (File exists): it is served from, but")


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
        left(tmp_path, f"2020-01-01T00-00-00-{number}", "{}", -30 / 3600)
    log = boot_log(tmp_path)
    log(Ledger(reason="mine"))
    assert log.flush()
    assert [boot.get("reason") for boot in last_boots(tmp_path, 9)] == [None, None, None, "mine"]


def test_what_is_not_a_workers_own_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever keeps other JSON there, or lets a link lead elsewhere, finds it as it was."""
    monkeypatch.setattr(boots, "KEPT", 1)
    old = left(tmp_path, "2020-01-01T00-00-00-a", "{}", 9)
    theirs = [left(tmp_path, name, "{}", hours) for name, hours in (("notes", 99), ("package", -99))]
    precious = tmp_path / "precious.json"
    precious.write_text("{}")
    link = tmp_path / "boots" / "2020-01-02T00-00-00-b.json"
    link.symlink_to(precious)
    os.utime(precious, (then := time.time() + 10**6, then))
    before = [path.stat().st_mtime_ns for path in (*theirs, precious)]
    log = boot_log(tmp_path)
    log(Ledger())
    assert log.flush()
    assert not old.exists()
    assert link.is_symlink()
    assert [path.stat().st_mtime_ns for path in (*theirs, precious)] == before


def test_records_of_a_date_to_come_are_older_than_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else as many of them as are kept would let each start remove the last true one."""
    monkeypatch.setattr(boots, "KEPT", 3)
    for number in range(3):
        left(tmp_path, f"2099-01-01T00-00-00-ahead-{number}", '{"reason": "ahead"}', -24 * (number + 1))
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
    other = left(tmp_path, "2020-01-01T00-00-00-other", "{}", 0.5)  # after what this one wrote last
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
            for value in ("1" + "0" * 400, "1e400", "NaN", '"NaN"', "-Infinity", '"x"', "null", "[]", "1e300", "-1")
        ),
        *(
            '{"phases": 5}',
            '{"phases": [5]}',
            '{"phases": [{}]}',
            '{"total_s": "soon"}',
            '{"total_s": "NaN"}',
            '{"total_s": -1}',
        ),
        *('{"reason": 5}', "[{}]"),
        '{"model": "\\ud800"}',
    ],
    ids=lambda text: text[:40],
)
def test_damaged_ledgers_are_left_out_and_told(damaged: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    left(tmp_path, "1", '{"model": "spark"}', 1)
    left(tmp_path, "9999", damaged, 0).write_bytes(damaged.encode("latin-1"))
    assert last_boots(tmp_path, 1) == [{"boot": "1", "model": "spark"}]
    assert f"a start is passed over: {tmp_path / 'boots' / '9999.json'} is no record of one" in caplog.text
    assert Durations.on(tmp_path) == Durations()
    assert caplog.text.count("a start is passed over") == 1


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


def test_what_is_no_record_or_has_just_gone_is_passed_over(tmp_path: Path) -> None:
    left(tmp_path, "1", '{"model": "spark"}', 1)
    for name in ("notes.txt", ".half.json", "2.json.part"):
        (tmp_path / "boots" / name).write_text('{"model": "none"}')
    for name in ("0", "2"):
        (tmp_path / "boots" / f"{name}.json").symlink_to("gone")
    os.mkfifo(tmp_path / "boots" / "3.json")
    (tmp_path / "boots" / "4.json").mkdir()
    assert last_boots(tmp_path, 9) == [{"boot": "1", "model": "spark"}]


def test_workers_that_are_alike_in_all_have_records_of_their_own(tmp_path: Path) -> None:
    """Same second, same host, same process id, as containers that are restored from one snapshot have."""
    logs = [boot_log(tmp_path) for _ in range(3)]
    for log in logs:
        log(Ledger())
        assert log.flush()
    assert len(last_boots(tmp_path, 9)) == 3
