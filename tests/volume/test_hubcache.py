"""Hub caches and folders of `hf download`, made by the hub's own client from a hub on loopback, whole and not."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from conftest import PATIENT
from test_fetch import hub as hub

from handler import MODELS, ImageRequest, Worker
from handler.core.errors import WeightsMissing
from handler.volume import hubcache
from handler.volume.hubcache import CACHES, HUB_CACHE
from handler.volume.manifest import MANIFEST
from handler.volume.sources import EMBEDDED, fetched_folder, model_source
from hub_plane import TREE, Hub
from hub_plane import Repository as Shelf

SCHNELL, LIGHTNING = MODELS["flux-schnell"], MODELS["sdxl-lightning"]
OTHER, WEIGHTS = "1" * 40, "transformer/diffusion_pytorch_model.safetensors"
NEVER = ("handler fetch", "this version needs")  # of no use to who has a cache


def opened(hub: Hub, commit: str = SCHNELL.revision) -> Shelf:
    """A FLUX.1-schnell with spark's weights, at `commit`."""
    shelf = hub.open(SCHNELL.repository, commit)
    shelf.add_folder(EMBEDDED / "spark")
    del shelf.files[MANIFEST]
    shelf.add("README.md", commit.encode())
    return shelf


@pytest.fixture(autouse=True)
def shelf(hub: Hub) -> Shelf:
    hub.repositories.clear()
    return opened(hub)


def cached(cache: Path, commit: str = SCHNELL.revision) -> Path:
    return Path(huggingface_hub.snapshot_download(SCHNELL.repository, revision=commit, cache_dir=cache))


def refused(volume: Path) -> str:
    with pytest.raises(WeightsMissing) as caught:
        model_source(SCHNELL, volume)
    told = caught.value.message
    assert not any(word in told for word in NEVER), told
    return told


def carry_out(told: str, hub: Hub) -> None:
    """The command that an error ends with."""
    words = shlex.split(told.rpartition("Complete it with: ")[2])
    environ = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_TELEMETRY": "1"}
    while "=" in words[0]:
        name, _, value = words.pop(0).partition("=")
        environ[name] = value
    words[0] = str(Path(sys.executable).with_name(words[0]))
    subprocess.run(words, env=environ, check=True, capture_output=True)


@pytest.mark.parametrize("cache", [*CACHES, Path("anywhere/hub")], ids=str)
def test_a_cache_is_found_where_the_hubs_client_puts_it(cache: Path, tmp_path: Path) -> None:
    snapshot = cached(tmp_path / cache)
    if cache not in CACHES:
        with pytest.raises(WeightsMissing, match="nothing in"):
            model_source(SCHNELL, tmp_path)
        return
    source = model_source(SCHNELL, tmp_path)
    assert (source.folder, source.kind, source.manifest) == (snapshot, "hub cache", None)


def test_another_commit_with_the_same_files_serves(hub: Hub, tmp_path: Path) -> None:
    opened(hub, OTHER)
    snapshot = cached(tmp_path / HUB_CACHE, OTHER)
    settings = PATIENT.model_copy(update={"volume": tmp_path, "model": "flux-schnell"})
    with Worker.boot(settings) as worker:
        assert worker.ledger.weights == str(snapshot)
        request = ImageRequest(prompt="a red circle", seed=1, width=64, height=64, num_inference_steps=1)
        assert worker.generate(worker.spec.recipe(request))[0].rgb.shape == (64, 64, 3)
    listings = [asked for asked in hub.asked if asked.path == TREE]
    assert len(listings) == 2  # by the download, and by the start, once
    shutil.rmtree(tmp_path / HUB_CACHE)
    cached(tmp_path / HUB_CACHE)
    model_source(SCHNELL, tmp_path)
    assert len([asked for asked in hub.asked if asked.path == TREE]) == 3  # of the row's own commit nobody asks


@pytest.mark.parametrize("name", [WEIGHTS, "scheduler/scheduler_config.json", "tokenizer/tokenizer_config.json"])
def test_another_commit_with_other_files_is_told_by_file(name: str, hub: Hub, tmp_path: Path) -> None:
    other = opened(hub, OTHER)
    other.add(name, other.files[name].data + b" ")
    cached(tmp_path / HUB_CACHE, OTHER)
    told = refused(tmp_path)
    assert f"{OTHER} of {SCHNELL.repository}, has other files than {SCHNELL.revision}" in told
    assert f"made for: {name}. A cached model of RunPod's cannot be mended from here; fill a network volume" in told
    cached(tmp_path / "hub", OTHER)
    shutil.rmtree(tmp_path / HUB_CACHE)
    carry_out(refused(tmp_path), hub)
    assert model_source(SCHNELL, tmp_path).folder.name == SCHNELL.revision


def test_a_cache_of_plain_files_is_not_called_another(hub: Hub, tmp_path: Path) -> None:
    """As the hub's client makes where there are no links, and who copies one with those followed."""
    opened(hub, OTHER)
    file = cached(tmp_path / HUB_CACHE, OTHER) / WEIGHTS
    data = file.read_bytes()
    file.unlink()
    file.write_bytes(data)
    told = refused(tmp_path)
    assert f"cannot be compared with {SCHNELL.revision}, which this version was made for: nothing says whose" in told
    assert f"bytes {WEIGHTS} are" in told


def test_where_nobody_can_ask_the_hub_it_is_said(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened(hub, OTHER)
    cached(tmp_path / "hub", OTHER)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    told = refused(tmp_path)
    assert f"whether its files are those of {SCHNELL.revision}, which this version was made for, cannot be told" in told
    assert "HF_HUB_OFFLINE" in told


def test_a_blob_that_is_gone(hub: Hub, tmp_path: Path) -> None:
    snapshot = cached(tmp_path / "hub")
    (snapshot / WEIGHTS).resolve().unlink()
    told = refused(tmp_path)
    assert f"leads to 1 files that are not there, such as {WEIGHTS}" in told
    carry_out(told, hub)
    assert model_source(SCHNELL, tmp_path).folder == snapshot


def test_a_blob_that_nobody_reads_may_be_gone(shelf: Shelf, tmp_path: Path) -> None:
    others = ("flux1-schnell.safetensors", "safety_checker/model.safetensors", "transformer/diffusion.bin")
    for name in others:
        shelf.add(name, name.encode())
    snapshot = cached(tmp_path / "hub")
    for name in others:
        (snapshot / name).resolve().unlink()
    assert model_source(SCHNELL, tmp_path).folder == snapshot


@pytest.mark.parametrize("name", [WEIGHTS, "model_index.json", "vae/config.json"])
def test_a_snapshot_that_is_still_coming(name: str, hub: Hub, tmp_path: Path) -> None:
    snapshot = cached(tmp_path / "hub")
    shutil.rmtree(snapshot / Path(name).parent) if name == "vae/config.json" else (snapshot / name).unlink()
    wanted = {"vae/config.json": "vae/"}.get(name, name if name != WEIGHTS else "transformer/*.safetensors")
    assert f"is incomplete: it has no {wanted}" in refused(tmp_path)
    (snapshot.parents[1] / "blobs" / "0.incomplete").touch()
    told = refused(tmp_path)
    assert f"is still coming, or its download was cut off: it has no {wanted}" in told
    carry_out(told, hub)
    assert model_source(SCHNELL, tmp_path).folder == snapshot


def test_files_in_half_precision_alone_are_read(shelf: Shelf, tmp_path: Path) -> None:
    for name in [name for name in shelf.files if name.endswith(".safetensors")]:
        shelf.add(name.replace(".safetensors", ".fp16.safetensors"), shelf.files.pop(name).data)
    snapshot = cached(tmp_path / "hub")
    with Worker.boot(PATIENT.model_copy(update={"volume": tmp_path, "model": "flux-schnell"})) as worker:
        assert worker.ledger.weights == str(snapshot)


def test_pickles_alone_are_told(shelf: Shelf, tmp_path: Path) -> None:
    shelf.add(WEIGHTS.replace(".safetensors", ".bin"), shelf.files.pop(WEIGHTS).data)
    cached(tmp_path / "hub")
    told = refused(tmp_path)
    assert "it has no transformer/*.safetensors that is read, only diffusion_pytorch_model.bin" in told


@pytest.mark.parametrize("folder", ["FLUX.1-schnell", "models/mine", "hf/FLUX.1-schnell"])
def test_a_plain_download_is_found(folder: str, hub: Hub, tmp_path: Path) -> None:
    path = tmp_path / folder
    huggingface_hub.snapshot_download(SCHNELL.repository, revision=SCHNELL.revision, local_dir=path)
    assert model_source(SCHNELL, tmp_path).folder == path
    (path / WEIGHTS).unlink()
    carry_out(refused(tmp_path), hub)
    assert model_source(SCHNELL, tmp_path).folder == path
    shutil.rmtree(path)
    opened(hub, OTHER)
    huggingface_hub.snapshot_download(SCHNELL.repository, revision=OTHER, local_dir=tmp_path / "FLUX.1-schnell")
    assert model_source(SCHNELL, tmp_path).folder == tmp_path / "FLUX.1-schnell"


def test_a_download_over_another_that_was_cut_off_is_told(hub: Hub, tmp_path: Path) -> None:
    folder, other = tmp_path / "FLUX.1-schnell", opened(hub, OTHER)
    other.add(WEIGHTS, other.files[WEIGHTS].data + b" ")
    huggingface_hub.snapshot_download(SCHNELL.repository, revision=OTHER, local_dir=folder)
    huggingface_hub.hf_hub_download(SCHNELL.repository, "model_index.json", revision=SCHNELL.revision, local_dir=folder)
    told = refused(tmp_path)
    assert f"has other files than {SCHNELL.revision}, which this version was made for: {WEIGHTS}" in told
    carry_out(told, hub)
    assert model_source(SCHNELL, tmp_path).folder == folder


def test_a_download_without_its_notes_is_named_at_least(hub: Hub, tmp_path: Path) -> None:
    for name in ("FLUX.1-schnell", "pictures"):
        huggingface_hub.snapshot_download(SCHNELL.repository, revision=SCHNELL.revision, local_dir=tmp_path / name)
        shutil.rmtree(tmp_path / name / ".cache")
    told = refused(tmp_path)
    assert f"cannot be compared with {SCHNELL.revision}" in told
    carry_out(told, hub)
    assert model_source(SCHNELL, tmp_path).folder == tmp_path / "FLUX.1-schnell"
    shutil.rmtree(tmp_path / "FLUX.1-schnell")
    with pytest.raises(WeightsMissing, match=f"and whose what is in {tmp_path}/pictures is, nobody noted"):
        model_source(SCHNELL, tmp_path)


def test_a_model_of_two_repositories_is_in_no_cache(tmp_path: Path) -> None:
    assert LIGHTNING.base
    folder = tmp_path / "hub" / f"models--{LIGHTNING.base.repository.replace('/', '--')}" / "snapshots"
    shutil.copytree(EMBEDDED / "spark", folder / LIGHTNING.base.revision)
    with pytest.raises(WeightsMissing) as caught:
        model_source(LIGHTNING, tmp_path)
    told = caught.value.message
    assert f"is one half of {LIGHTNING.id}, and {LIGHTNING.grafts[0].file} of {LIGHTNING.repository} the other" in told
    assert told.endswith("python -m handler fetch sdxl-lightning")
    (tmp_path / HUB_CACHE).parent.mkdir()
    (tmp_path / "hub").rename(tmp_path / HUB_CACHE)
    with pytest.raises(WeightsMissing, match=r"fill a network volume with it: .*runpod_deploy\.py"):
        model_source(LIGHTNING, tmp_path)


def test_what_this_user_may_not_look_into_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every new ext4 volume has a lost+found of root's; workers are none."""
    closed = tmp_path / "lost+found"
    closed.mkdir()

    def refusing(really: Any) -> Any:
        def look(path: Path) -> Any:
            if path == closed:
                raise PermissionError(13, "Permission denied", str(path))
            return really(path)

        return look

    for name in ("scandir", "listdir"):
        monkeypatch.setattr(os, name, refusing(getattr(os, name)))
    with pytest.raises(WeightsMissing, match="Fetch it with"):
        model_source(SCHNELL, tmp_path)
    snapshot = cached(tmp_path / "hub")
    assert model_source(SCHNELL, tmp_path).folder == snapshot


def test_a_fetch_that_was_begun_goes_before(tmp_path: Path) -> None:
    cached(tmp_path / "hub")
    assert hubcache.found(SCHNELL, tmp_path)[0]
    fetched_folder(SCHNELL, tmp_path).mkdir(parents=True)
    assert model_source(SCHNELL, tmp_path).kind == "hub cache"
    shutil.rmtree(tmp_path / "hub")
    with pytest.raises(WeightsMissing, match="is incomplete"):
        model_source(SCHNELL, tmp_path)
