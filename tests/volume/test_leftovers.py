"""What a publisher that was killed leaves: seen by doctor, removed once nobody can be writing to it any more."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from handler.__main__ import main
from handler.core.birth import Birth
from handler.volume.leftovers import DEAD_S, leftovers
from handler.volume.publishing import publishing
from handler.worker.boots import BootLog
from handler.worker.clock import Ledger

KILLED = """if True:
    import os, signal, sys
    from pathlib import Path
    from handler.volume.manifest import write_atomically
    from handler.volume.publishing import publishing
    os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)  # in the middle of a write
    volume = Path(sys.argv[1])
    if len(sys.argv) > 2:
        (volume / "boots").mkdir()
        write_atomically(volume / "boots" / "a.json", b"{}")
    with publishing(volume / "baked" / "spark" / "key", {}) as part:
        (part / "deep").mkdir()
        (part / "deep" / "weights").write_bytes(bytes(1000))
"""


def killed(volume: Path, *what: str) -> None:
    """Leave what a real process leaves."""
    command = [sys.executable, "-c", KILLED, str(volume), *what]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL


def age(path: Path, seconds: float) -> None:
    for each in (path, *path.rglob("*")):
        os.utime(each, (time.time() - seconds,) * 2, follow_symlinks=False)


def publish(volume: Path, name: str = "other") -> None:
    with publishing(volume / "baked" / "spark" / name, {}) as part:
        (part / "file").write_bytes(b"new")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_doctor_sees_what_was_left_and_says_how_to_remove_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    killed(tmp_path)
    killed(tmp_path, "a record")
    [part] = (tmp_path / "baked" / "spark").iterdir()
    [record] = (tmp_path / "boots").iterdir()
    found = {one.path: one for one in leftovers(tmp_path)}
    assert set(found) == {part, record}
    assert found[part].bytes >= 1000
    assert 0 <= found[part].age_s < DEAD_S
    monkeypatch.setenv("KINDLING_VOLUME", str(tmp_path))
    assert main(["doctor"]) == 0
    told = capsys.readouterr().out.splitlines()
    [command] = [line.strip() for line in told if line.strip().startswith("rm -rf")]
    subprocess.run(command, shell=True, check=True)
    assert leftovers(tmp_path) == []
    assert main(["doctor", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["leftovers"] == []


def test_what_is_surely_dead_goes_with_the_next_publication(tmp_path: Path) -> None:
    killed(tmp_path)
    [part] = (tmp_path / "baked" / "spark").iterdir()
    publish(tmp_path)
    assert names(part.parent) == [part.name, "other"]
    age(part, DEAD_S + 60)
    (part / "deep" / "more").touch()  # somebody is still writing
    publish(tmp_path, "third")
    assert part.exists()
    age(part, DEAD_S + 60)
    publish(tmp_path, "fourth")
    assert names(part.parent) == ["fourth", "other", "third"]


def test_records_that_were_never_put_in_place_go_with_the_next_start(tmp_path: Path) -> None:
    killed(tmp_path, "a record")
    [part] = (tmp_path / "boots").iterdir()
    age(part, DEAD_S + 60)
    log = BootLog(tmp_path, Birth.anew())
    log(Ledger(outcome="failed"))
    assert not part.exists()
    assert len(names(tmp_path / "boots")) == 1


def test_what_is_not_ours_stays(tmp_path: Path) -> None:
    """Hidden names of others, and what a link leads to."""
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "file").touch()
    publish(tmp_path)
    folder = tmp_path / "baked" / "spark"
    for name in (".hidden", ".nfs0000000000000001", ".key.0123456z"):
        (folder / name).mkdir()
        age(folder / name, 2 * DEAD_S)
    (folder / ".key.01234567").symlink_to(theirs)
    age(theirs, 2 * DEAD_S)
    os.utime(folder / ".key.01234567", (0, 0), follow_symlinks=False)
    publish(tmp_path, "third")
    assert names(folder) == [".hidden", ".key.0123456z", ".nfs0000000000000001", "other", "third"]
    assert (theirs / "file").exists()
