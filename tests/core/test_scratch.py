"""What a process leaves in the folder for temporary files: nothing, however it ends."""

import fcntl
import gc
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from handler.core import scratch
from handler.core.scratch import Scratch, prefix, sweep

HOLD = """
import sys
from handler.core.scratch import Scratch
held = Scratch()
(held.path / "kernel").write_text("x")
print(held.path, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(scratch, "OTHERS", ())  # a changed `sweep` is tried too, and shall find nothing else here
    return tmp_path


def holding() -> tuple["subprocess.Popen[str]", Path]:
    """A process that holds a folder with a file, until it reads no more."""
    command = [sys.executable, "-c", HOLD]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout
    return holder, Path(holder.stdout.readline().strip())


def test_a_folder_goes_with_what_it_is_for(temporary: Path) -> None:
    with Scratch() as held:
        (held.path / "folder").mkdir()
        (held.path / "folder" / "file").touch()
        assert [*temporary.iterdir()] == [held.path]
        assert held.path.stat().st_mode & 0o77 == 0
    assert [*temporary.iterdir()] == []
    held.close()  # once more does nothing
    held = Scratch()
    del held
    assert [*temporary.iterdir()] == []


def test_sweeping_raises_nothing(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def too_deep(*_: object, **__: object) -> None:
        raise RecursionError

    (temporary / f"{prefix()}deep").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", too_deep)
        sweep()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary / "gone"))
    sweep()


def test_a_process_that_ends_at_once_takes_its_folders_along(temporary: Path) -> None:
    code = "from handler.core.scratch import Scratch, leave\nheld = Scratch()\nleave(3)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 3
    assert [*temporary.iterdir()] == []


def test_a_full_disk_is_swept_though_python_passes_it_over(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (temporary / f"{prefix()}left").mkdir()
    (temporary / "elsewhere").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary / "elsewhere"))
    sweep()
    assert [*temporary.iterdir()] == [temporary / "elsewhere"]


def test_what_another_machine_left_on_a_shared_disk_stays(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For its lock would seem free here. One that cannot be told takes nobody else's."""
    others = []
    (boot := temporary / "boot_id").write_text("another")
    for known in (boot, temporary / "none"):
        with monkeypatch.context() as patch:
            patch.setattr(scratch, "BOOT", known)
            prefix.cache_clear()
            others.append(temporary / f"{prefix()}left")
    prefix.cache_clear()
    boot.unlink()
    assert not any(other.name.startswith(prefix()) for other in others)
    for other in others:
        other.mkdir()
    sweep()
    assert sorted(temporary.iterdir()) == sorted(others)


def test_another_users_folder_stays(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (temporary / f"{prefix()}theirs").mkdir()
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    sweep()
    assert (temporary / f"{prefix()}theirs").exists()


def test_a_fork_takes_nothing_along(temporary: Path) -> None:
    held = Scratch()
    if not (fork := os.fork()):
        try:
            held.close()
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitpid(fork, 0)[1] == 0
    assert held.path.exists()
    held.close()
    assert not held.path.exists()


def test_it_may_have_gone_before_and_no_file_stays_open(temporary: Path) -> None:
    gc.collect()  # what earlier tests have left open
    before = os.listdir("/proc/self/fd")
    with Scratch() as held:
        shutil.rmtree(held.path)
    (temporary / f"{prefix()}left").mkdir()
    with Scratch():
        sweep()
    assert os.listdir("/proc/self/fd") == before


@pytest.mark.parametrize("end", [signal.SIGINT, None])
def test_it_goes_with_the_process(temporary: Path, end: signal.Signals | None) -> None:
    holder, folder = holding()
    with holder:
        assert (folder / "kernel").exists()
        if end:
            holder.send_signal(end)
        holder.communicate()
    assert [*temporary.iterdir()] == []


def test_what_a_killed_process_leaves_goes_with_the_next_and_what_a_live_one_holds_stays(temporary: Path) -> None:
    others = [temporary / "kindling-scratch", temporary / "kindling-new-1", temporary / "x-kindling-scratch-1"]
    for other in others:
        other.mkdir()
    (temporary / f"{prefix()}link").symlink_to(others[0])
    (temporary / f"{prefix()}file").touch()
    os.mkfifo(temporary / f"{prefix()}pipe")
    killed, left = holding()
    with killed:
        killed.kill()
    live, held = holding()
    with live:
        with Scratch() as ours:
            assert left.exists()
            sweep()
            assert not left.exists()
            assert (held / "kernel").exists()
            assert ours.path.exists()
        live.kill()
    sweep()
    stay = [*others, *(temporary / f"{prefix()}{kind}" for kind in ("link", "file", "pipe"))]
    assert sorted(temporary.iterdir()) == sorted(stay)


def test_where_there_are_no_locks_nothing_is_taken_for_left(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(37, "No locks available")

    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", no_locks)
        held = Scratch()
    with held:
        sweep()
        assert held.path.exists()
    assert [*temporary.iterdir()] == []
