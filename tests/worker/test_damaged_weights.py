"""Baked weights that are damaged, on a volume whose model is whole: workers load that, say so, and leave word."""

import errno
import gc
import importlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import PATIENT
from disks import failing

from handler import GPUS, MODELS, ImageRequest, Worker, preload
from handler.cli.bake import discard_damaged, publish_weights
from handler.cli.models import state
from handler.core.errors import SettingsError, VolumeFailed, WeightsCorrupt
from handler.model.hardware import expected
from handler.volume import sources
from handler.volume.damaged import MARK, mark
from handler.volume.manifest import MANIFEST
from handler.volume.publishing import publishing
from handler.volume.reader import ReadFile
from handler.volume.sources import EMBEDDED, weight_facts, weights_folder
from handler.worker.boots import last_boots

preloading = importlib.import_module("handler.worker.preload")
SPARK, SCHNELL = MODELS["spark"], MODELS["flux-schnell"]
SETTINGS = PATIENT.model_copy(update={"precision": "bf16"})
RECIPE = SPARK.recipe(ImageRequest(prompt="a red circle", seed=1, width=64, height=64, num_inference_steps=1))
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-100] ^= 4
    path.write_bytes(data)


def lengthen(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"\0")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A volume with spark's weights, baked."""
    at = tmp_path_factory.mktemp("made")
    with Worker.boot(SETTINGS.model_copy(update={"volume": at})) as worker:
        publish_weights(worker, at)
    return at


@pytest.fixture
def volume(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "volume"))


def on(volume: Path) -> Worker:
    return Worker.boot(SETTINGS.model_copy(update={"volume": volume}))


def baked(volume: Path) -> Path:
    return weights_folder(SPARK, volume, "bf16")


def test_one_flipped_bit_is_served_from_the_whole_model(volume: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder, damaged = baked(volume), f"{baked(volume) / WEIGHTS} is damaged between bytes 0 and "
    with on(volume) as whole:
        assert whole.ledger.weights == str(folder)
        wanted = whole.generate(RECIPE)[0].rgb
    flip(folder / WEIGHTS)
    with on(volume) as worker:
        assert worker.ledger.weights.startswith(f"{EMBEDDED / 'spark'}, for the baked weights are damaged: {damaged}")
        assert (worker.generate(RECIPE)[0].rgb == wanted).all()
    assert json.loads((folder / MARK).read_text())["reason"].startswith(damaged)
    assert any(message.startswith("spark is loaded without its baked weights") for message in caplog.messages)
    with failing(volume) as calls, on(volume) as later:
        assert damaged in later.ledger.weights
    assert not [call for call in calls if call.path.endswith(WEIGHTS)]  # nobody reads them again
    settings = SETTINGS.model_copy(update={"volume": volume})
    assert "the baked weights are damaged" in state(SPARK, settings, expected(settings)).reason
    assert last_boots(volume, 1)[0]["outcome"] == "ready"


def test_what_is_baked_again_is_used_again(volume: Path) -> None:
    flip(baked(volume) / WEIGHTS)
    with on(volume) as worker:
        discard_damaged(SPARK, volume, "bf16")
        publish_weights(worker, volume)
    assert not (baked(volume) / MARK).exists()
    assert sources.served_source(SPARK, volume, "bf16").folder == baked(volume)
    mark(baked(volume), "by a machine whose memory was bad")
    assert sources.served_source(SPARK, volume, "bf16").folder == EMBEDDED / "spark"
    discard_damaged(SPARK, volume, "bf16")
    assert sources.served_source(SPARK, volume, "bf16").folder == baked(volume)


@pytest.mark.parametrize("damage", [lengthen, Path.unlink])
def test_a_file_of_another_size_is_told_in_the_ledger(damage: Callable[[Path], Any], volume: Path) -> None:
    damage(baked(volume) / WEIGHTS)
    with on(volume) as worker:
        assert "for the baked weights are damaged" in worker.ledger.weights
        assert f"{baked(volume) / WEIGHTS}" in worker.ledger.weights


def test_a_volume_that_takes_no_mark_and_a_disk_that_fails(volume: Path, caplog: pytest.LogCaptureFixture) -> None:
    flip(baked(volume) / WEIGHTS)
    with failing(volume, errno.EROFS, lambda call: f".{MARK}" in call.path), on(volume) as worker:
        assert "is damaged between" in worker.ledger.weights
    assert "cannot be marked as damaged: Read-only file system" in caplog.text
    assert not (baked(volume) / MARK).exists()
    with failing(volume, errno.EIO, lambda call: call.path.endswith(WEIGHTS) and call.name == "read"):
        worker = on(volume)
    worker.close()
    assert f"Cannot read {baked(volume) / WEIGHTS}: {os.strerror(errno.EIO)}" in worker.ledger.weights
    assert not (baked(volume) / MARK).exists()  # another time it may be read


def test_a_bad_read_is_no_bad_file(volume: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One bit is wrong when the weights come the first time, as over a network, and right the second time."""
    read, wrong = os.preadv, list[str]()

    def flipping(descriptor: int, buffers: Any, *given: Any) -> int:
        count = read(descriptor, buffers, *given)
        name = os.readlink(f"/proc/self/fd/{descriptor}")
        if count > 1 and name.endswith(WEIGHTS) and not wrong:
            wrong.append(name)
            buffers[0][0] ^= 4
        return count

    monkeypatch.setattr(os, "preadv", flipping)
    with on(volume) as worker:
        assert worker.ledger.weights == str(baked(volume))
    assert wrong == [str(baked(volume) / WEIGHTS)]
    assert not (baked(volume) / MARK).exists()


def test_a_small_file_is_read_once_more_before_its_folder_is_marked(volume: Path) -> None:
    path = baked(volume) / "vae" / "config.json"
    error = WeightsCorrupt("It was no JSON object.", about=str(path))
    assert sources.spoilt(error, SPARK, volume) == {baked(volume): error.message}
    assert not (baked(volume) / MARK).exists()
    path.write_text("{")
    assert sources.spoilt(error, SPARK, volume) == {baked(volume): error.message}
    assert (baked(volume) / MARK).exists()


def test_what_is_removed_while_it_is_read_is_done_without(volume: Path) -> None:
    """As by `bake`, which makes damaged ones anew."""
    folder = baked(volume)
    error = VolumeFailed("Cannot read it: No such file or directory", about=str(folder / WEIGHTS))
    shutil.rmtree(folder)
    assert sources.spoilt(error, SPARK, volume) == {folder: error.message}
    assert not folder.exists()


@pytest.mark.parametrize("how", ["marked", "not marked"])
def test_where_there_is_no_other_source_the_start_fails_by_name(how: str, tmp_path: Path) -> None:
    folder = weights_folder(SCHNELL, tmp_path, "bf16")
    with publishing(folder, weight_facts(SCHNELL, "bf16")) as part:
        shutil.copytree(EMBEDDED / "spark", part, dirs_exist_ok=True, ignore=shutil.ignore_patterns(MANIFEST))
    flip(folder / WEIGHTS)
    settings = SETTINGS.model_copy(update={"volume": tmp_path, "model": "flux-schnell"})
    with pytest.raises(WeightsCorrupt, match=r"is damaged between .* bake flux-schnell"):
        Worker.boot(settings)
    assert not (folder / MARK).exists()


def test_what_is_preloaded_is_whole(volume: Path) -> None:
    flip(baked(volume) / WEIGHTS)
    found = preload(SETTINGS.model_copy(update={"volume": volume}), GPUS["L4"])
    assert found.weights
    assert found.weights.source.folder == EMBEDDED / "spark"
    assert (baked(volume) / MARK).exists()


def test_what_was_preloaded_in_vain_is_not_held_beside_what_serves(
    volume: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, held = preloading._begun, list[int]()

    def counted(*given: Any) -> Any:
        gc.collect()
        held.append(sum(type(each) is ReadFile for each in gc.get_objects()))
        return begun(*given)

    flip(baked(volume) / WEIGHTS)
    monkeypatch.setattr(preloading, "_begun", counted)
    preload(SETTINGS.model_copy(update={"volume": volume}), GPUS["L4"])
    assert len(held) == 2
    assert held[0] == held[1]


def test_an_error_about_something_else_is_no_reason(volume: Path) -> None:
    Path(f"{baked(volume)}-2").mkdir()
    for error in (
        SettingsError("KINDLING_VAE"),
        VolumeFailed("Cannot read it.", about=f"{baked(volume)}-2/a"),
        WeightsCorrupt(f"{baked(volume)}/a is named, but not at fault."),
        WeightsCorrupt("x", about=str(volume)),
    ):
        with pytest.raises(type(error)):
            sources.spoilt(error, SPARK, volume)
    assert not (baked(volume) / MARK).exists()


def test_a_mark_that_cannot_be_understood_is_one(volume: Path) -> None:
    for text in ("[]", "{", '{"reason": null}'):
        (baked(volume) / MARK).write_text(text)
        source, why = sources.baked_source(SPARK, volume, "bf16")
        assert (source, why) == (None, f"{baked(volume) / MARK} marks it")
