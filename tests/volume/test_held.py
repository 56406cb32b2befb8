"""Weights that are read before there is a worker: whole, without a thread, given once, if they are still the same."""

import os
import shutil
import threading
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from handler.core.errors import WeightsCorrupt
from handler.volume.held import Held, opened
from handler.volume.manifest import Source, source_in, write_manifest
from handler.volume.overlay import NOTHING, Overlay
from handler.volume.reader import CONFIGS
from handler.volume.sources import EMBEDDED

PART = Path("transformer") / "diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(EMBEDDED / "spark", tmp_path / "spark"))


def manifested(folder: Path) -> Source:
    source = source_in(folder, "fetched", "spark")
    assert source
    return source


def held(source: Source, vae: Source | None = None) -> Held:
    with Held.reading(source, vae) as found:
        pass
    return found


def readers() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("reader-")]


def test_all_is_in_memory_and_no_thread_is_left(folder: Path) -> None:
    source = manifested(folder)
    found = held(source)
    assert readers() == []
    shutil.rmtree(folder)
    with ExitStack() as files:
        reader, vae = opened(files, source, None, NOTHING, found)
        assert vae is None
        assert {"transformer", "vae", CONFIGS} <= {part for part in (CONFIGS, *reader.index) if reader.files(part)}
        for file in reader.left:
            for start, _ in file.chunks:
                reader.wait(file, start)
    assert found.used


def test_another_autoencoder_is_held_too(folder: Path) -> None:
    source = manifested(folder)
    found = held(source, source)
    with ExitStack() as files:
        reader, vae = opened(files, source, source, NOTHING, found)
        assert vae
        assert not reader.files("vae")
        assert vae.files("vae")


def test_it_is_given_once(folder: Path) -> None:
    source = manifested(folder)
    found = held(source)
    assert found.take(source, None, NOTHING)
    assert found.take(source, None, NOTHING) is None
    assert not found.used


def test_what_is_freed_is_not_given(folder: Path) -> None:
    source = manifested(folder)
    found = held(source)
    found.free()
    assert found.take(source, None, NOTHING) is None


def test_only_for_the_same_files(folder: Path) -> None:
    source = manifested(folder)
    found = held(source)
    write_manifest(folder, {"model": "another"})
    others = [
        (manifested(folder), None, NOTHING),
        (replace(source, folder=folder.parent), None, NOTHING),
        (source, source, NOTHING),
        (source, None, Overlay(index={"_class_name": "Other"})),
    ]
    assert [found.take(*other) for other in others] == [None] * 4
    with ExitStack() as files:
        reader, _ = opened(files, *others[0], found)
        assert reader.source is others[0][0]
        assert not found.used
    assert found.take(source, None, NOTHING)


def rewritten(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))


@pytest.mark.parametrize("change", [rewritten, Path.unlink])
def test_without_checksums_only_while_each_file_is_the_one_that_was_read(
    folder: Path, change: Callable[[Path], None]
) -> None:
    source = Source(folder, None)
    found = held(source)
    change(folder / PART)
    assert found.take(source, None, NOTHING) is None


def test_without_checksums_files_that_stayed_are_given(folder: Path) -> None:
    assert held(source := Source(folder, None)).take(source, None, NOTHING)


def test_damage_is_told_and_nothing_goes_on(folder: Path) -> None:
    source = manifested(folder)
    rewritten(folder / PART)
    with pytest.raises(WeightsCorrupt, match="is damaged between bytes"), Held.reading(source, None):
        before = [thread for thread in threading.enumerate() if thread.name.startswith("reader-")]
    for thread in before:
        thread.join(60)
    assert readers() == []
