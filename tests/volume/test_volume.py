"""The volume: what is complete is found, what is torn is named, what is published is whole."""

import hashlib
import json
import os
import threading
import zlib
from dataclasses import replace
from pathlib import Path

import pytest

from handler import MODELS
from handler.core.errors import VolumeFailed, WeightsCorrupt, WeightsMissing
from handler.volume import manifest
from handler.volume.manifest import CHUNK, MANIFEST, Entry, checked, read_manifest, summarize, write_manifest
from handler.volume.publishing import publishing
from handler.volume.sources import (
    baked_sources,
    fetched_folder,
    model_source,
    served_source,
    weight_facts,
)

SCHNELL = MODELS["flux-schnell"]


@pytest.fixture
def volume(tmp_path: Path) -> Path:
    """A volume with a complete, tiny flux-schnell."""
    folder = fetched_folder(SCHNELL, tmp_path)
    (folder / "vae").mkdir(parents=True)
    (folder / "model_index.json").write_text("{}")
    (folder / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(os.urandom(1000))
    write_manifest(folder, {"model": SCHNELL.id})
    return tmp_path


def test_a_complete_model_is_found_with_its_manifest(volume: Path) -> None:
    source = model_source(SCHNELL, volume)
    assert source.folder == fetched_folder(SCHNELL, volume)
    assert source.manifest
    assert set(source.manifest.files) == {"model_index.json", "vae/diffusion_pytorch_model.safetensors"}


def test_the_embedded_model_has_a_manifest() -> None:
    source = model_source(MODELS["spark"], Path("unused"))
    assert source.manifest
    for name, entry in source.manifest.files.items():
        assert summarize(source.folder / name) == entry, f"{name} changed: run spark.train's publish again"


def test_each_chunk_has_a_checksum(tmp_path: Path) -> None:
    path = tmp_path / "big"
    with path.open("wb") as file:
        file.truncate(2 * CHUNK + 5)
    whole = summarize(path)
    assert (whole.size, len(whole.crc32)) == (2 * CHUNK + 5, 3)
    with path.open("r+b") as file:
        file.seek(CHUNK + 9)
        file.write(b"\1")
    changed = summarize(path)
    assert [a == b for a, b in zip(whole.crc32, changed.crc32, strict=True)] == [True, False, True]
    assert changed.sha256 != whole.sha256


def test_checksums_are_of_chunks_however_few_bytes_come_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = b"abcdefghij"
    (path := tmp_path / "file").write_bytes(data)
    monkeypatch.setattr(manifest, "CHUNK", 4)
    wanted = Entry(10, hashlib.sha256(data).hexdigest(), tuple(map(zlib.crc32, (data[:4], data[4:8], data[8:]))))
    assert summarize(path) == wanted
    read = os.readv
    monkeypatch.setattr(os, "readv", lambda descriptor, buffers: read(descriptor, [buffers[0][:3]]))
    assert summarize(path) == wanted
    path.write_bytes(b"")
    assert summarize(path) == Entry(0, hashlib.sha256().hexdigest(), ())


def test_what_is_put_in_place_is_on_the_disk_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a machine that loses its power has an empty file in the place of the old one."""
    said: list[object] = []
    replace_ = Path.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: said.append(os.fstat(descriptor).st_size))
    monkeypatch.setattr(Path, "replace", lambda part, to: (said.append("replaced"), replace_(part, to))[1])
    manifest.write_atomically(tmp_path / "file", b"four")
    assert said == [4, "replaced"]
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_nothing_there_says_how_to_fetch(tmp_path: Path) -> None:
    with pytest.raises(WeightsMissing, match=r"Accept its licence .* python -m handler fetch flux-schnell"):
        model_source(SCHNELL, tmp_path)


def test_without_its_manifest_a_model_is_not_there(volume: Path) -> None:
    (fetched_folder(SCHNELL, volume) / MANIFEST).unlink()
    with pytest.raises(WeightsMissing, match=r"incomplete: it has no manifest\.json"):
        model_source(SCHNELL, volume)


def test_a_missing_and_a_truncated_file_are_named(volume: Path) -> None:
    weights = fetched_folder(SCHNELL, volume) / "vae" / "diffusion_pytorch_model.safetensors"
    os.truncate(weights, 999)
    with pytest.raises(WeightsCorrupt, match=r"vae/diffusion_pytorch_model\.safetensors has 999 bytes, .* says 1000"):
        model_source(SCHNELL, volume)
    weights.unlink()
    with pytest.raises(WeightsCorrupt, match=r"vae/diffusion_pytorch_model\.safetensors is missing"):
        model_source(SCHNELL, volume)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"files": 3}', '{"facts": {}, "files": {"a": {"size": 1}}}', "\xff"])
def test_a_foreign_manifest_is_refused(volume: Path, text: str) -> None:
    (fetched_folder(SCHNELL, volume) / MANIFEST).write_bytes(text.encode("latin-1"))
    with pytest.raises(WeightsCorrupt, match="is not a manifest"):
        model_source(SCHNELL, volume)


def test_published_folders_appear_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "baked" / SCHNELL.id / "key"

    def fail_half_way() -> None:
        with publishing(target, {}) as part:
            (part / "blocks.pt2").write_bytes(b"half")
            assert not target.exists()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail_half_way()
    assert list(target.parent.iterdir()) == []
    with publishing(target, {"a": "b"}) as part:
        (part / "blocks.pt2").write_bytes(b"whole")
    assert [source.manifest.facts for source in baked_sources(SCHNELL, tmp_path) if source.manifest] == [{"a": "b"}]


def test_two_publishers_end_with_one_good_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both are about to put theirs in place at the same moment."""
    target, both, rename = tmp_path / "key", threading.Barrier(2), Path.rename

    def together(path: Path, where: Path) -> Path:
        both.wait(30)
        return rename(path, where)

    def publish(data: bytes) -> None:
        with publishing(target, {}) as part:
            (part / "file").write_bytes(data)

    monkeypatch.setattr(Path, "rename", together)
    threads = [threading.Thread(target=publish, args=(data,)) for data in (b"one", b"two")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [path.name for path in tmp_path.iterdir()] == ["key"]
    assert checked(target)
    assert summarize(target / "file") == read_manifest(target).files["file"]  # type: ignore[union-attr]


def test_a_torn_folder_in_the_way_is_replaced(tmp_path: Path) -> None:
    target = tmp_path / "key"
    target.mkdir()
    (target / "left over").write_text("x")
    with publishing(target, {}) as part:
        (part / "file").write_bytes(b"new")
    assert sorted(path.name for path in target.iterdir()) == ["file", MANIFEST]


def test_a_volume_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "baked").write_text("a file where a folder should be")
    with pytest.raises(VolumeFailed, match="Cannot write"), publishing(tmp_path / "baked" / "x" / "key", {}):
        pass


def test_baked_weights_are_served_only_where_they_fit(volume: Path) -> None:
    for precision in ("bf16", "fp32"):
        with publishing(volume / "baked" / SCHNELL.id / precision, weight_facts(SCHNELL, precision)) as part:
            (part / "model_index.json").write_text("{}")
    assert served_source(SCHNELL, volume, "fp32").folder.name == "fp32"
    assert served_source(SCHNELL, volume, "fp16").folder == fetched_folder(SCHNELL, volume)
    os.truncate(volume / "baked" / SCHNELL.id / "fp32" / "model_index.json", 1)
    assert served_source(SCHNELL, volume, "fp32").folder == fetched_folder(SCHNELL, volume)
    other = replace(SCHNELL, revision="another")
    with pytest.raises(WeightsMissing):
        served_source(other, volume, "fp32")


def test_manifests_are_plain_json(volume: Path) -> None:
    found = json.loads((fetched_folder(SCHNELL, volume) / MANIFEST).read_text())
    assert set(found) == {"facts", "files"}
    assert set(found["files"]["model_index.json"]) == {"size", "sha256", "crc32"}
