"""Volumes that are full: looked at before much is written, and told as what they are."""

import errno
import os
import shutil
import subprocess
import sys
import tempfile
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from conftest import PATIENT
from disks import full_disk
from safetensors.torch import save_file

from handler import Worker
from handler.__main__ import main
from handler.cli.bake import bake, publish_weights
from handler.cli.doctor import volume_state
from handler.core.birth import Birth
from handler.core.errors import FetchFailed, VolumeFailed
from handler.volume.hub import Repository, explained
from handler.volume.publishing import publishing
from handler.volume.room import refused, remedy, require, require_writable, unwritable
from handler.worker.boots import BootLog, last_boots
from handler.worker.clock import Ledger

TENSORS = {"a": torch.zeros(1 << 16)}
Usage = namedtuple("Usage", "total used free")


def no_room(free: int) -> object:
    return lambda path: Usage(1 << 40, 0, free)


def test_what_a_library_in_rust_says_of_a_full_disk(tmp_path: Path) -> None:
    told, target = f"Cannot write .*: {os.strerror(errno.EFBIG)}", tmp_path / "baked" / "a"
    with pytest.raises(VolumeFailed, match=told), full_disk(1 << 12), publishing(target, {}) as folder:
        save_file(TENSORS, folder / "model.safetensors")
    assert list((tmp_path / "baked").iterdir()) == []  # nothing half-written stays


def test_what_is_no_fault_of_the_disk_stays_what_it_is(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), publishing(tmp_path / "a", {}):
        raise ZeroDivisionError
    assert refused(ValueError("(os error)")) == ""
    assert refused(RuntimeError("I/O error: (os error 28)")) == os.strerror(errno.ENOSPC)
    assert refused(OSError("nobody knows")) == "nobody knows"


def test_room_is_looked_at_where_a_folder_will_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    require(tmp_path / "not" / "there" / "yet", 1, "Files")
    monkeypatch.setattr("shutil.disk_usage", no_room(500_000_000))
    with pytest.raises(VolumeFailed, match=r"Files need 2\.5 GB, .* has 0\.5 GB free\."):
        require(tmp_path / "not", 2.5e9, "Files")


@pytest.mark.parametrize("precision", ["int8", "fp32"])  # rounded, and cast
def test_a_bake_that_has_no_room_ends_before_it_loads(
    precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", no_room(1_000_000))
    settings = PATIENT.model_copy(update={"volume": tmp_path, "precision": precision})
    with pytest.raises(VolumeFailed, match=rf"weights of spark in {precision} need 0\.0\d+ GB, .* has 0\.001 GB free"):
        bake(settings)
    assert last_boots(tmp_path, 1) == []


def test_a_bake_that_may_not_write_ends_before_it_loads(tmp_path: Path) -> None:
    (tmp_path / "baked").touch()
    with pytest.raises(VolumeFailed, match=r"Cannot write .*baked"):
        bake(PATIENT.model_copy(update={"volume": tmp_path}))
    assert last_boots(tmp_path, 1) == []


def test_weights_are_not_begun_where_they_cannot_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spark: Worker
) -> None:
    monkeypatch.setattr("shutil.disk_usage", no_room(1_000_000))
    with pytest.raises(VolumeFailed, match="spark in fp32 need"):
        publish_weights(spark, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_while_weights_are_written(tmp_path: Path, spark: Worker) -> None:
    with full_disk(1 << 20), pytest.raises(VolumeFailed, match=os.strerror(errno.EFBIG)):
        publish_weights(spark, tmp_path)
    assert list((tmp_path / "baked" / "spark").iterdir()) == []


@pytest.mark.parametrize(
    ("error", "kind", "told"),
    [
        (RuntimeError("Data processing error: No space left on device (os error 28)"), VolumeFailed, "No space left"),
        (OSError(errno.ENOSPC, "No space left on device"), VolumeFailed, "No space left"),
        (RuntimeError("the connection broke"), FetchFailed, "the connection broke"),
        (OSError("Consistency check failed"), FetchFailed, "Consistency check failed"),
    ],
)
def test_a_fetch_tells_the_disk_from_the_network(
    error: Exception, kind: type[Exception], told: str, tmp_path: Path
) -> None:
    with pytest.raises(kind, match=told), explained("a model", Repository("a/b", "0"), tmp_path):
        raise error


def test_a_full_volume_is_no_reason_for_a_start_to_fail(tmp_path: Path) -> None:
    with full_disk():
        log = BootLog(tmp_path, Birth.anew())
        log(Ledger(outcome="failed"))
    assert last_boots(tmp_path, 9) == []
    assert list((tmp_path / "boots").iterdir()) == []


def test_a_picture_that_has_no_room_is_a_line_and_no_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("KINDLING_COLD_START_BUDGET_S", "3600")
    path = str(tmp_path / "a.png")
    with full_disk(64):
        assert main(["generate", "a red circle", "--size", "64x64", "--steps", "1", "-o", path, "--json"]) == 1
    assert f"kindling: Cannot write {path}: {os.strerror(errno.EFBIG)}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("code", "remedy"),
    [
        (
            errno.EACCES,
            f"To mend it, have its owner run this, for the worker is user {os.getuid()}: chmod -R a+rwX /volume.",
        ),
        (errno.EROFS, "If that is not meant, mount it writable."),
        (errno.ENOSPC, "To mend it, make room."),
        (errno.EIO, "To mend it, see what ails it."),
    ],
)
def test_a_volume_that_cannot_be_written_comes_with_its_remedy(code: int, remedy: str) -> None:
    told = unwritable(Path("/volume"), OSError(code, os.strerror(code)))
    assert f"/volume cannot be written ({os.strerror(code)})" in told
    assert told.endswith(f" {remedy}")


@pytest.mark.parametrize("how", ["mounted read-only", "another's"])
def test_a_worker_that_may_not_write_says_so_once_at_its_start_and_serves(how: str, tmp_path: Path) -> None:
    volume, picture = tmp_path / "volume", tmp_path / "a.png"
    volume.mkdir(mode=0o555)
    command = [sys.executable, "-m", "handler", "generate", "a circle", "--size", "64x64", "-o", str(picture)]
    if how == "mounted read-only":
        mount = f"mount --bind {volume} {volume} && mount -o remount,bind,ro {volume}"
        if subprocess.run(["unshare", "-m", "sh", "-c", mount], capture_output=True, check=False).returncode:
            pytest.skip("needs leave to mount")
        command = ["unshare", "-m", "sh", "-c", f'{mount} && exec "$@"', "-", *command]
    else:
        command = [*others_folder(volume), *command]
    out = subprocess.run(
        command, env={**os.environ, "KINDLING_VOLUME": str(volume)}, capture_output=True, text=True, check=False
    )
    assert (out.returncode, picture.stat().st_size > 0) == (0, True), out.stderr
    [told] = [line for line in out.stderr.splitlines() if "cannot be written" in line]
    reason, remedy = {
        "mounted read-only": ("Read-only file system", "mount it writable."),
        "another's": ("Permission denied", f"chmod -R a+rwX {volume}."),
    }[how]
    assert f"The volume {volume} cannot be written ({reason})" in told
    assert told.endswith(remedy)
    assert list(volume.iterdir()) == []


def others_folder(volume: Path) -> list[str]:
    """Make `volume` another user's; what to put before a command that shall have no more rights there than others."""
    if os.getuid():
        return []
    if not (setpriv := shutil.which("setpriv")):
        pytest.skip("needs setpriv, of util-linux")
    os.chown(volume, 1000, 1000)
    return [setpriv, "--bounding-set=-all", "--inh-caps=-all"]


def test_commands_tell_the_remedy_of_a_volume_that_is_anothers(tmp_path: Path) -> None:
    """A real process, which may not write: as root's would be without its privileges, or by a folder's mode."""
    (volume := tmp_path / "volume").mkdir(mode=0o555)
    command = [*others_folder(volume), sys.executable, "-m", "handler", "bake", "spark"]
    environ = {**os.environ, "KINDLING_VOLUME": str(volume)}
    out = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    assert out.returncode == 1
    assert out.stderr.splitlines()[-1] == (
        f"kindling: Cannot write {volume}/baked/spark: Permission denied. To mend it, have the owner of {volume} run "
        f"this, for this is user {os.getuid()}: chmod -R a+rwX {volume}."
    )


def test_a_remedy_is_for_what_is_on_the_volume_alone() -> None:
    denied = PermissionError(errno.EACCES, os.strerror(errno.EACCES), "/elsewhere/a.png")
    assert remedy(Path("/volume"), denied) == remedy(Path("/volume"), OSError(errno.ENOSPC, "full", "/volume/a")) == ""
    assert remedy(Path("/elsewhere"), denied).endswith("chmod -R a+rwX /elsewhere.")


def test_doctor_tells_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that any user but root could not write."""

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    state = volume_state(tmp_path)
    assert not state["writable"]
    assert "chmod -R a+rwX" in state["refusal"]


def test_a_disk_that_is_full_is_not_writable(tmp_path: Path) -> None:
    with full_disk():
        state = volume_state(tmp_path)
        with pytest.raises(VolumeFailed, match=r"Cannot write .*: File too large"):
            require_writable(tmp_path / "new")
    assert not state["writable"]
    assert "cannot be written (File too large)" in state["refusal"]
