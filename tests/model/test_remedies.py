"""Each kind of source says how its files are brought again: whatever is wrong with them, and whoever finds it."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from handler import MODELS
from handler.core.errors import StartError, WeightsCorrupt
from handler.model.hardware import Hardware
from handler.model.loading.weights import load_components
from handler.volume import sources
from handler.volume.autoencoder import fetched_vae, vae_source
from handler.volume.hubcache import HUB_CACHE
from handler.volume.listing import weight_files
from handler.volume.manifest import MANIFEST, Kind, Manifest, Source, write_manifest
from handler.volume.publishing import publishing
from handler.volume.reader import Reader
from handler.volume.sources import EMBEDDED, baked_sources, fetched_folder, model_source, served_source

SPARK, SCHNELL, FP32 = MODELS["spark"], MODELS["flux-schnell"], Hardware("cpu", "CPU", "fp32", "")
VAE = f"madebyollin/taef1@{'0' * 40}"
HUB = HUB_CACHE / "models--black-forest-labs--FLUX.1-schnell" / "snapshots" / SCHNELL.revision


def copied(folder: Path, only: str = "") -> Path:
    """Spark's files, with a manifest, as those of a model of the same family or, `only` a part, of another VAE."""
    shutil.copytree(EMBEDDED / "spark" / only, folder / only)
    (folder / MANIFEST).unlink(missing_ok=True)
    write_manifest(folder, {})
    return folder


def embedded(volume: Path, monkeypatch: pytest.MonkeyPatch) -> Source:
    copied(volume / "weights" / "spark")
    monkeypatch.setattr(sources, "EMBEDDED", volume / "weights")
    return model_source(SPARK, volume)


def fetched(volume: Path, _: pytest.MonkeyPatch) -> Source:
    copied(fetched_folder(SCHNELL, volume))
    return model_source(SCHNELL, volume)


def cached(volume: Path, _: pytest.MonkeyPatch) -> Source:
    (copied(volume / HUB) / MANIFEST).unlink()
    return model_source(SCHNELL, volume)


def baked(volume: Path, _: pytest.MonkeyPatch) -> Source:
    copied(fetched_folder(SCHNELL, volume))
    target = sources.weights_folder(SCHNELL, volume, "fp32")
    with publishing(target, sources.weight_facts(SCHNELL, "fp32")) as part:
        shutil.copytree(EMBEDDED / "spark", part, dirs_exist_ok=True, ignore=shutil.ignore_patterns(MANIFEST))
    return served_source(SCHNELL, volume, "fp32")


def autoencoder(volume: Path, _: pytest.MonkeyPatch) -> Source:
    copied(fetched_vae(VAE, volume), "vae")
    return vae_source(VAE, volume)


def own(volume: Path, _: pytest.MonkeyPatch) -> Source:
    return vae_source(str(copied(volume / "mine", "vae") / "vae"), volume)


KINDS: dict[Kind, tuple[Callable[[Path, pytest.MonkeyPatch], Source], str]] = {
    "embedded": (embedded, "Is the installation complete? The model comes with it."),
    "fetched": (fetched, "Fetch it again with: python -m handler fetch flux-schnell"),
    "hub cache": (
        cached,
        "The platform's cache has it so; bring a copy of your own with: python -m handler fetch flux-schnell",
    ),
    "baked": (baked, "Bake it again with: KINDLING_PRECISION=fp32 python -m handler bake flux-schnell"),
    "autoencoder": (autoencoder, f"Fetch it again with: KINDLING_VAE={VAE} python -m handler fetch"),
    "folder": (own, "Put a whole copy in its place."),
}
REMOVED = ("fetched", "autoencoder")  # for `fetch` does not read again what has the right size


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


FAULTS: dict[str, Callable[[Path], Any]] = {
    "missing": Path.unlink,
    "cut": lambda path: os.truncate(path, path.stat().st_size - 9),
    "empty": lambda path: os.truncate(path, 0),
    "flipped": flipped,
    "another's": lambda path: save_file({}, path),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_bad_file_says_how_to_bring_it_again(
    kind: Kind, fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, remedy = KINDS[kind]
    source = made(tmp_path, monkeypatch)
    assert source.kind == kind
    FAULTS[fault](source.folder / weight_files(source)["vae"][0])
    if fault == "flipped" and not source.manifest:
        return  # which nobody can tell
    with pytest.raises(StartError) as caught, Reader(source) as reader:
        load_components(reader, FP32)
    removed = "Remove it. " if kind in REMOVED and fault != "missing" else ""
    assert str(source.folder / "vae") in caught.value.message
    assert caught.value.message.endswith(f". {removed}{remedy}")


@pytest.mark.parametrize("fault", ["missing", "cut"])
@pytest.mark.parametrize("kind", ["embedded", "fetched", "autoencoder"])
def test_so_does_a_look_for_what_is_complete(
    kind: Kind, fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, remedy = KINDS[kind]
    source = made(tmp_path, monkeypatch)
    again = {"embedded": lambda: model_source(SPARK, tmp_path), "fetched": lambda: model_source(SCHNELL, tmp_path)}
    FAULTS[fault](source.folder / weight_files(source)["vae"][0])
    with pytest.raises(WeightsCorrupt) as caught:
        again.get(kind, lambda: vae_source(VAE, tmp_path))()
    assert caught.value.message.endswith(remedy)


@pytest.mark.parametrize("fault", ["missing", "cut"])
def test_baked_weights_that_are_passed_over_are_to_be_baked_again(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made, remedy = KINDS["baked"]
    source = made(tmp_path, monkeypatch)
    FAULTS[fault](source.folder / weight_files(source)["vae"][0])
    assert served_source(SCHNELL, tmp_path, "fp32").kind == "fetched"
    assert caplog.messages[-1].startswith("baked weights are passed over: ")
    assert caplog.messages[-1].endswith(f". {remedy}")


def test_a_manifest_that_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Also of what is baked, whose precision nobody can tell then."""
    folder = baked(tmp_path, monkeypatch).folder
    (folder / MANIFEST).write_text("{")
    assert baked_sources(SCHNELL, tmp_path) == []
    assert caplog.messages[-1].endswith("is not a manifest. Bake it again with: python -m handler bake flux-schnell")
    (fetched_folder(SCHNELL, tmp_path) / MANIFEST).write_text("{")
    with pytest.raises(WeightsCorrupt, match=r"is not a manifest\. Remove it\. Fetch .* handler fetch flux-schnell$"):
        model_source(SCHNELL, tmp_path)


@pytest.mark.parametrize("kind", ["autoencoder", "folder"])
def test_a_configuration_of_an_autoencoder_that_is_none(
    kind: Kind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, remedy = KINDS[kind]
    source = made(tmp_path, monkeypatch)
    config = source.folder / "vae" / "config.json"
    name = VAE if kind == "autoencoder" else str(config.parent)
    for text in ("", json.dumps({"_class_name": 5})):
        config.write_text(text)
        write_manifest(source.folder, {})
        with pytest.raises(WeightsCorrupt) as caught:
            vae_source(name, tmp_path)
        assert caught.value.message.endswith(remedy)


def test_what_is_baked_of_peoples_files_is_baked_again_with_them(tmp_path: Path) -> None:
    manifest = Manifest({"kind": "weights", "precision": "fp8", "contents": "ab"}, {})
    told = Source(tmp_path, manifest, None, "baked", "sdxl").remedy
    assert told.endswith("KINDLING_PRECISION=fp8 python -m handler bake sdxl, with the same KINDLING_WEIGHTS")
