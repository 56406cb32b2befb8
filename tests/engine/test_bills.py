"""Spend files of many workers: those that have ended are folded, and no sum changes, whoever folds, and how often."""

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from disks import Call, failing

from handler.engine.bills import ENDED_S, MANY, Bill, Bills

FACTS = {"gpu": "NVIDIA H200"}


def ended(folder: Path, count: int, dollars: float = 0.5) -> None:
    """Files of as many workers, which ended two hours ago."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        path = folder / f"worker-{number}.json"
        path.write_text(json.dumps(FACTS | {"dollars": dollars}))
        os.utime(path, (time.time() - 2 * ENDED_S,) * 2)


def look(bills: Bills, identity: str = "me", dollars: float = 1.0) -> float:
    """What a minute does: the dollars of the others."""
    bills.write(identity, FACTS | {"dollars": dollars})
    return bills.dollars(without=identity)


def names(folder: Path) -> list[str]:
    return sorted(path.name.partition("-")[0] for path in folder.iterdir())


def test_workers_that_have_ended_cost_no_look(tmp_path: Path) -> None:
    ended(tmp_path, 3 * MANY)
    bills = Bills(tmp_path)
    assert look(bills) == 150.0  # 300 files are read, once
    assert look(bills) == 150.0  # and folded
    assert names(tmp_path) == ["folded", "me.json"]
    with failing(tmp_path) as calls:
        assert look(bills) == 150.0
        assert look(Bills(tmp_path), "new") == 151.0
    assert len(calls) < 50
    said = json.loads(next(tmp_path.glob("folded-*")).read_text())
    assert said["dollars"] == 150.0  # as a worker of an older version reads it


def test_few_and_those_that_run_stay_as_they_are(tmp_path: Path) -> None:
    ended(tmp_path, MANY - 1)
    for number in range(MANY):
        (tmp_path / f"running-{number}.json").write_text('{"dollars": 1}')
    bills = Bills(tmp_path)
    for _ in range(3):
        assert look(bills) == (MANY - 1) * 0.5 + MANY
    assert len(names(tmp_path)) == 2 * MANY


def test_folding_twice_or_half_changes_no_sum(tmp_path: Path) -> None:
    """Two workers at once, or one that is killed between the two steps."""
    ended(tmp_path / "a", MANY)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    for folder, who in (("a", "one"), ("b", "two")):
        bills = Bills(tmp_path / folder)
        look(bills, who)
        look(bills, who)
    for path in (tmp_path / "b").iterdir():
        shutil.copy2(path, tmp_path / "a")
    ended(tmp_path / "a", MANY // 2)
    assert names(tmp_path / "a").count("folded") == 2
    assert look(Bills(tmp_path / "a"), "three") == MANY * 0.5 + 2


def test_a_worker_that_was_frozen_counts_what_it_says_then(tmp_path: Path) -> None:
    ended(tmp_path, MANY)
    bills = Bills(tmp_path)
    look(bills)
    (tmp_path / "worker-3.json").write_text('{"dollars": 7.5}')  # between the look and the folding
    assert look(bills) == MANY * 0.5 + 7
    assert (tmp_path / "worker-3.json").exists()
    (tmp_path / "worker-4.json").write_text('{"dollars": 9.5}')
    assert look(bills) == look(Bills(tmp_path)) == MANY * 0.5 + 7 + 9
    (tmp_path / "worker-4.json").write_text('{"dollars": 0.25}')  # nobody costs less than it did
    assert look(bills) == MANY * 0.5 + 7


def test_who_looks_while_another_folds_sees_all(tmp_path: Path) -> None:
    """All that it has just listed goes, as soon as it reads the first."""
    ended(tmp_path, MANY)
    mine, other = Bills(tmp_path), Bills(tmp_path)
    look(other, "other")
    folded: list[float] = []

    def fold(call: Call) -> bool:
        if call == Call("stat", "worker-0.json") and not folded:
            folded.append(0.0)
            folded[0] = look(other, "other")
        return False

    with failing(tmp_path, chosen=fold):
        assert mine.dollars(without="me") == MANY * 0.5 + 1
    assert folded == [MANY * 0.5]
    assert mine.unread == {}  # what has gone is not what cannot be read


def test_what_one_has_folded_no_other_folds_again(tmp_path: Path) -> None:
    """Else each would write another file of it every minute."""
    ended(tmp_path, MANY)
    workers = {name: Bills(tmp_path) for name in ("a", "b", "c")}
    for _ in range(3):
        for name, bills in workers.items():
            look(bills, name)
    assert names(tmp_path) == ["a.json", "b.json", "c.json", "folded"]
    assert [look(bills, name) for name, bills in workers.items()] == [MANY * 0.5 + 2] * 3


def test_files_of_folded_ones_are_folded_too(tmp_path: Path) -> None:
    for number in range(MANY):
        path = tmp_path / f"folded-{number:016x}.json"
        path.write_text(json.dumps({"dollars": 1, "folded": {f"worker-{number}": 1.0}}))
        os.utime(path, (time.time() - 2 * ENDED_S,) * 2)
    bills = Bills(tmp_path)
    assert look(bills) == look(bills) == MANY
    assert names(tmp_path) == ["folded", "me.json"]


def test_what_makes_no_sense_stays_and_counts_nothing(tmp_path: Path) -> None:
    ended(tmp_path, MANY)
    odd: dict[str, Any] = {"dollars": 1.0, "folded": {"a": "x"}}
    for number, said in enumerate((odd, odd | {"folded": {"a": -1.0}}, odd | {"folded": [1]}, [])):
        (tmp_path / f"odd-{number}.json").write_text(json.dumps(said))
        os.utime(tmp_path / f"odd-{number}.json", (0, 0))
    bills = Bills(tmp_path)
    assert look(bills) == look(bills) == MANY * 0.5
    assert names(tmp_path) == ["folded", "me.json", *["odd"] * 4]
    assert bills.unread == {f"odd-{number}.json": "damaged" for number in range(4)}
    with pytest.raises(ValueError, match="no worker costs as much"):
        Bill(1e6)


def test_a_volume_that_takes_nothing_folds_nothing(tmp_path: Path) -> None:
    ended(tmp_path, MANY)
    bills = Bills(tmp_path)
    look(bills)
    with failing(tmp_path, 30, lambda call: call.path.startswith(".folded")):
        assert look(bills) == MANY * 0.5
    assert len(names(tmp_path)) == MANY + 1
