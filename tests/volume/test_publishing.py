"""Publishing is one act: whole folders appear and stay, whoever else publishes; what is no good gives way."""

import errno
import logging
import os
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import PATIENT, ROOT

from handler import MODELS, Worker
from handler.cli import bake, doctor, models
from handler.core.errors import NumericalError, VolumeFailed, WeightsCorrupt, WeightsMissing
from handler.model.compiling import artifacts
from handler.model.compiling.failures import Failures
from handler.model.compiling.package import kinds_of
from handler.model.hardware import Hardware
from handler.volume import publishing as publishing_module
from handler.volume.manifest import MANIFEST, write_manifest
from handler.volume.publishing import publishing, retire, whole
from handler.volume.sources import baked_sources, served_source, weight_facts, weights_folder

SPARK = MODELS["spark"]
FACTS = {"kind": "test"}
MEMORY = Path("/proc/self/mem")  # an empty file, by its size, of which no byte can be read
PUBLISHERS, ROUNDS = 3, 12
PUBLISHER = """
import sys
from pathlib import Path
from handler.volume.publishing import publishing
for line in sys.stdin:
    with publishing(Path(line.strip()), {"kind": "test"}) as part:
        (part / "file").write_text(sys.argv[1])
    print("done", flush=True)
"""


def put(target: Path, text: str) -> None:
    with publishing(target, FACTS) as part:
        (part / "file").write_text(text)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def torn(target: Path) -> None:
    """A folder that somebody began: no manifest."""
    target.mkdir()
    (target / "file").write_text("half")


def flipped(target: Path) -> None:
    """A folder of the right sizes, with other bytes."""
    put(target, "whole")
    (target / "file").write_text("w0ole")


def spotted(target: Path) -> None:
    """One of several files has other bytes."""
    with publishing(target, FACTS) as part:
        for name in ("a", "file", "z"):
            (part / name).write_text("whole")
    (target / "file").write_text("w0ole")


def foreign(target: Path) -> None:
    """A whole folder, made for something else."""
    target.mkdir()
    (target / "file").write_text("other")
    write_manifest(target, {"kind": "another"})


def illegible(target: Path) -> None:
    put(target, "whole")
    (target / MANIFEST).write_text("{")


def shortened(target: Path) -> None:
    put(target, "whole")
    os.truncate(target / "file", 2)


BAD = [torn, flipped, spotted, foreign, illegible, shortened]


@pytest.mark.parametrize("spoil", BAD)
def test_what_is_no_good_gives_way(spoil: object, tmp_path: Path) -> None:
    assert callable(spoil)
    spoil(target := tmp_path / "key")
    assert not whole(target, FACTS)
    put(target, "new")
    assert whole(target, FACTS)
    assert (target / "file").read_text() == "new"
    assert names(tmp_path) == ["key"]


def test_all_files_are_as_readable_as_the_manifest(tmp_path: Path) -> None:
    """Whose mode is the umask's. A worker that runs as another user passed over weights that only this one may read."""
    with publishing(tmp_path / "key", FACTS) as part:
        (part / "vae").mkdir()
        (part / "vae" / "model.safetensors").touch(0o600)
    asked = (tmp_path / "key" / MANIFEST, tmp_path / "key" / "vae" / "model.safetensors")
    assert len({path.stat().st_mode for path in asked}) == 1


def test_what_is_whole_stays(tmp_path: Path) -> None:
    put(tmp_path / "key", "first")
    put(tmp_path / "key", "second")
    assert (tmp_path / "key" / "file").read_text() == "first"
    assert names(tmp_path) == ["key"]


@pytest.mark.parametrize("exchanges", [True, False], ids=["exchanged", "moved aside"])
@pytest.mark.parametrize("spoil", BAD)
def test_the_slower_of_two_never_removes_what_the_faster_put_there(
    spoil: object, exchanges: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has seen a folder that is no good, and is about to take that away, when the faster puts a whole one there."""
    assert callable(spoil)
    spoil(target := tmp_path / "key")
    seen, done, exchange = threading.Event(), threading.Event(), publishing_module._exchanged

    def slowly(part: Path, where: Path) -> bool:
        if threading.current_thread().name == "slower" and not done.is_set():
            seen.set()
            assert done.wait(30)
        return exchanges and exchange(part, where)

    monkeypatch.setattr(publishing_module, "_exchanged", slowly)
    slower = threading.Thread(target=put, args=(target, "slow"), name="slower")
    slower.start()
    assert seen.wait(30)
    put(target, "fast")
    faster = target.stat().st_ino
    done.set()
    slower.join(30)
    assert (target / "file").read_text() == "fast"
    assert target.stat().st_ino == faster
    assert whole(target, FACTS)
    assert names(tmp_path) == ["key"]


@pytest.mark.parametrize("base", ["", None], ids=["as the process stands", "absolute"])
def test_two_folders_change_places(base: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    part, target = (Path(tmp_path if base is None else base) / name for name in ("part", "target"))
    for folder in (part, target):
        folder.mkdir()
        (folder / "name").write_text(folder.name)
    assert publishing_module._exchanged(part, target)
    assert [(folder / "name").read_text() for folder in (part, target)] == ["target", "part"]
    assert not publishing_module._exchanged(part, tmp_path / "none")


@pytest.mark.parametrize("library", [SimpleNamespace(), SimpleNamespace(renameat2=lambda *_: -1)])
def test_where_folders_cannot_change_places_the_old_one_is_moved_aside(
    library: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A C library without the call, or a file system that does not know it."""
    with publishing(tmp_path / "key", {"made for": "another"}) as part:
        (part / "file").write_text("old")
    monkeypatch.setattr(publishing_module.ctypes, "CDLL", lambda _: library)
    with publishing(tmp_path / "key", FACTS) as part:
        (part / "file").write_text("new")
    assert (tmp_path / "key" / "file").read_text() == "new"
    assert whole(tmp_path / "key", FACTS)
    assert names(tmp_path) == ["key"]


@pytest.fixture
def publishers() -> Iterator[list["subprocess.Popen[str]"]]:
    """Processes that publish to each folder they are told."""
    command, pipe = [sys.executable, "-c", PUBLISHER], subprocess.PIPE
    found = [
        subprocess.Popen([*command, f"by {i}"], cwd=ROOT, stdin=pipe, stdout=pipe, text=True) for i in range(PUBLISHERS)
    ]
    yield found
    for each in found:
        with each:
            each.kill()


def test_processes_that_publish_at_once_leave_one_whole_folder(
    publishers: list["subprocess.Popen[str]"], tmp_path: Path
) -> None:
    for number in range(ROUNDS):
        target = tmp_path / f"key-{number}"
        BAD[number % len(BAD)](target)
        for each in publishers:
            assert each.stdin
            each.stdin.write(f"{target}\n")
            each.stdin.flush()
        for each in publishers:
            assert each.stdout
            assert each.stdout.readline() == "done\n"
            assert (target / MANIFEST).is_file()  # from the first that is done, it is never away
        assert whole(target, FACTS)
        assert (target / "file").read_text().startswith("by ")
    assert names(tmp_path) == sorted(f"key-{number}" for number in range(ROUNDS))


def test_what_is_retired_goes_unless_another_is_there_by_now(tmp_path: Path) -> None:
    target = tmp_path / "baked" / SPARK.id / "key"
    put(target, "does not work")
    [found] = baked_sources(SPARK, tmp_path)
    retire(found)
    assert not target.exists()
    retire(found)  # somebody else was as fast
    put(target, "works")
    retire(found)
    assert (target / "file").read_text() == "works"
    assert names(target.parent) == ["key"]


@pytest.mark.skipif(not MEMORY.exists(), reason="Linux only")
def test_what_cannot_be_read_is_neither_called_damaged_nor_lost(tmp_path: Path) -> None:
    folder, facts = weights_folder(SPARK, tmp_path, "int8"), weight_facts(SPARK, "int8")
    with publishing(folder, facts) as part:
        (part / "file").touch()
    (folder / "file").unlink()
    (folder / "file").symlink_to(MEMORY)
    [found] = baked_sources(SPARK, tmp_path)
    told = os.strerror(errno.EIO)
    with pytest.raises(VolumeFailed, match=f"Cannot read {folder}: {told}"):
        bake.discard_damaged(SPARK, tmp_path, "int8")
    with pytest.raises(VolumeFailed, match=told):
        retire(found, keep=lambda aside: whole(aside, facts))
    assert names(folder.parent) == [folder.name]


def test_damaged_weights_go_unless_others_have_made_them_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While one still reads what is damaged. Weights are rounded alike, so the manifest is the same again."""
    folder, facts = weights_folder(SPARK, tmp_path, "int8"), weight_facts(SPARK, "int8")

    def make() -> None:
        with publishing(folder, facts) as part:
            (part / "file").write_text("whole")

    def slowly(place: Path, wanted: dict[str, str]) -> bool:
        found = whole(place, wanted)
        monkeypatch.setattr(bake, "whole", whole)
        make()
        return found

    make()
    (folder / "file").write_text("w0ole")
    monkeypatch.setattr(bake, "whole", slowly)
    bake.discard_damaged(SPARK, tmp_path, "int8")
    assert whole(folder, facts)
    assert names(folder.parent) == [folder.name]


def test_a_volume_that_takes_nothing_says_so(tmp_path: Path) -> None:
    (tmp_path / "baked").write_text("a file where a folder should be")
    with pytest.raises(VolumeFailed, match="Cannot write"), publishing(tmp_path / "baked" / "x" / "key", {}):
        pass


# baked weights


def test_baked_weights_that_are_damaged_are_made_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder, facts = weights_folder(SPARK, tmp_path, "fp32"), weight_facts(SPARK, "fp32")
    settings = PATIENT.model_copy(update={"volume": tmp_path, "compile": "off"})
    assert bake.publish_weights(Worker.boot(settings), tmp_path) == folder
    weights = next(folder.glob("transformer/*.safetensors"))
    for spoil in (shorten, flip):
        spoil(weights)
        assert not whole(folder, facts)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            bake.discard_damaged(SPARK, tmp_path, "fp32")
        assert f"The weights in {folder} are damaged; they are made again." in caplog.text
        assert bake.publish_weights(Worker.boot(settings), tmp_path) == folder
        assert whole(folder, facts)
        assert Worker.boot(settings).ledger.weights == str(folder)
    before = folder.stat().st_ino
    bake.discard_damaged(SPARK, tmp_path, "fp32")
    assert folder.stat().st_ino == before


def shorten(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


def test_damaged_weights_stay_where_there_is_nothing_to_make_them_from(tmp_path: Path) -> None:
    spec = MODELS["flux-schnell"]
    folder = weights_folder(spec, tmp_path, "bf16")
    with publishing(folder, weight_facts(spec, "bf16")) as part:
        (part / "model_index.json").write_text("{}")
    (folder / "model_index.json").write_text("[]")
    with pytest.raises(WeightsMissing, match="python -m handler fetch flux-schnell"):
        bake.discard_damaged(spec, tmp_path, "bf16")
    assert served_source(spec, tmp_path, "bf16").folder == folder


# compiled packages


def transformer_of(worker: Worker) -> torch.nn.Module:
    found: torch.nn.Module = worker._pipeline.transformer
    return found


def packed(made: Path, transformer: torch.nn.Module, text: str) -> None:
    """A package by its names, with no code in it: it cannot be bound."""
    with zipfile.ZipFile(made, "w") as file:
        for kind in kinds_of(transformer):
            file.writestr(f"package/data/aotinductor/{kind}/text", text)


def package(volume: Path, worker: Worker) -> Path:
    """One that fits this worker, published; its folder."""
    packed(made := volume / artifacts.PACKAGE, transformer_of(worker), "old")
    return artifacts.publish(made, SPARK, worker.hardware, volume)


@pytest.fixture(scope="module")
def worker() -> Worker:
    return Worker.boot(PATIENT)


def test_a_package_that_cannot_be_bound_is_made_again(worker: Worker, tmp_path: Path) -> None:
    folder, hardware = package(tmp_path, worker), worker.hardware
    found = artifacts.restore(transformer_of(worker), SPARK, hardware, tmp_path)
    assert (found.outcome, found.source and found.source.folder) == ("ERROR", folder)
    failures = Failures("auto", SPARK, hardware, tmp_path)
    failures.discredit(found, MemoryError())  # says nothing about the package
    assert folder.exists()
    failures.discredit(found, found.error)
    assert not folder.exists()
    assert artifacts.look(SPARK, hardware, tmp_path).outcome == "MISS"


@pytest.mark.parametrize("state", ["whole", "damaged", "a pipe", "gone"])
def test_the_check_up_reads_a_package_as_a_start_would(state: str, worker: Worker, tmp_path: Path) -> None:
    made, settings = package(tmp_path, worker) / artifacts.PACKAGE, PATIENT.model_copy(update={"volume": tmp_path})
    if state == "damaged":
        made.write_bytes(bytes(made.stat().st_size))
    if state in ("a pipe", "gone"):
        made.unlink()
    if state == "a pipe":
        os.mkfifo(made)
    started = artifacts.restore(transformer_of(worker), SPARK, worker.hardware, tmp_path)
    plan = doctor.cold_start(settings, worker.hardware)["plan"]
    told = models.state(SPARK, settings, worker.hardware).baked, plan["mode"]
    assert told == (("HIT", "COMPILED") if state == "whole" else ("ERROR", "EAGER"))
    assert ("blocks.pt2 is not what its manifest says" in plan["reason"]) != (state == "whole")
    assert ("blocks.pt2 is not what its manifest says" in started.reason) != (state == "whole")


def test_a_package_that_was_read_wrong_once_stays(worker: Worker, tmp_path: Path) -> None:
    """Or that another worker has just put in the place of a damaged one."""
    folder, failures = package(tmp_path, worker), Failures("auto", SPARK, worker.hardware, tmp_path)
    found = replace(artifacts.look(SPARK, worker.hardware, tmp_path), outcome="ERROR")
    for error in (WeightsCorrupt("blocks.pt2 is not what its manifest says"), OSError(errno.ESTALE, "Stale handle")):
        failures.discredit(found, error)
    assert folder.exists()
    (made := folder / artifacts.PACKAGE).write_bytes(bytes(made.stat().st_size))
    failures.discredit(found, WeightsCorrupt("blocks.pt2 is not what its manifest says"))
    assert not folder.exists()


def test_the_nearest_package_is_not_blamed_for_ones_own(worker: Worker, tmp_path: Path) -> None:
    folder = package(tmp_path, worker)
    other = Hardware("cpu", "CPU", "bf16", "a test")
    found = artifacts.look(SPARK, other, tmp_path)
    assert found.outcome == "STALE"
    Failures("auto", SPARK, other, tmp_path).discredit(found, RuntimeError("bad kernel"))
    assert folder.exists()


@pytest.mark.parametrize("error", [RuntimeError("bad kernel"), NumericalError("NaN")])
def test_a_package_that_is_found_and_does_not_work_is_made_again(
    error: Exception, worker: Worker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first worker draws eagerly and takes it away, the second compiles."""
    draws = {"worker": fail(error)}

    def bind(transformer: torch.nn.Module, *_: object) -> None:
        for block in transformer.transformer_blocks:
            if draws:
                block.forward = draws["worker"]

    def compile_blocks(transformer: torch.nn.Module, _: object, made: Path, __: object) -> float:
        packed(made, transformer, "new")
        return 0.0

    monkeypatch.setattr("handler.model.compiling.artifacts.bind_blocks", bind)
    monkeypatch.setattr("handler.worker.worker.bind_blocks", bind)
    monkeypatch.setattr("handler.worker.worker.compile_blocks", compile_blocks)
    settings = PATIENT.model_copy(update={"volume": tmp_path, "compile": "on"})
    package(tmp_path, worker)
    first = Worker.boot(settings)
    assert (first.found.outcome, first.ledger.plan) == ("HIT", "EAGER")
    draws.clear()
    second = Worker.boot(settings)
    assert (second.found.outcome, second.ledger.plan, second.unpublished) == ("MISS", "COMPILED", True)
    assert b"new" in (second.publish(tmp_path) / artifacts.PACKAGE).read_bytes()
    again = Worker.boot(settings)
    assert (again.found.outcome, again.ledger.plan) == ("HIT", "COMPILED")


def fail(error: Exception) -> object:
    def forward(*_: object, **__: object) -> None:
        raise error

    return forward


def test_bake_makes_a_package_again_that_does_not_work(
    worker: Worker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = package(tmp_path, worker)
    broken: list[object] = [fail(RuntimeError("bad kernel"))]

    def bind(transformer: torch.nn.Module, *_: object) -> None:
        for block in transformer.transformer_blocks:
            if broken:
                block.forward = broken[0]
        broken.clear()

    monkeypatch.setattr("handler.model.compiling.artifacts.bind_blocks", bind)
    monkeypatch.setattr("handler.worker.worker.bind_blocks", lambda *_: None)
    monkeypatch.setattr("handler.worker.worker.compile_blocks", lambda model, _, made, __: packed(made, model, "new"))
    told = bake.bake(PATIENT.model_copy(update={"volume": tmp_path}))
    assert str(folder) in told.artifacts
    assert b"new" in (folder / artifacts.PACKAGE).read_bytes()
