"""What is opened, written and set for a while is closed, removed and taken back, however it ends."""

import mmap
import os
import subprocess
import sys
import zlib
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import ROOT
from disks import full_disk

from handler.core.errors import WeightsCorrupt
from handler.model import stepcache
from handler.volume.manifest import write_atomically, write_picture
from handler.volume.reader import ReadFile


def in_the_way(path: Path) -> None:
    """A folder that no file can take the place of."""
    (path / "inside").mkdir(parents=True)


@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("write", [write_atomically, write_picture])
def test_what_could_not_be_written_leaves_nothing_behind(
    write: Callable[[Path, bytes], None], full: bool, tmp_path: Path
) -> None:
    path = tmp_path / "facts.json"
    path.write_text("before") if full else in_the_way(path)
    with pytest.raises(OSError, match=r"too large|directory"), full_disk() if full else nullcontext():
        write(path, b"after")
    assert [each.name for each in tmp_path.iterdir()] == ["facts.json"]
    assert path.is_dir() or path.read_text() == "before"


def test_what_was_written_leaves_nothing_else_behind(tmp_path: Path) -> None:
    for text in (b"one", b"two"):
        write_atomically(tmp_path / "facts.json", text)
    assert {each.name: each.read_bytes() for each in tmp_path.iterdir()} == {"facts.json": b"two"}


def test_a_picture_goes_where_a_link_leads_and_into_what_is_no_file(tmp_path: Path) -> None:
    (link := tmp_path / "link.png").symlink_to(tmp_path / "picture.png")
    write_picture(link, b"one")
    assert (link.is_symlink(), (tmp_path / "picture.png").read_bytes()) == (True, b"one")
    write_picture(Path("/dev/null"), b"two")
    assert Path("/dev/null").is_char_device()


def test_a_picture_goes_through_a_link_into_a_pipe() -> None:
    write = "write_picture(pathlib.Path('/dev/stdout'), b'x')"
    program = f"import pathlib; from handler.volume.manifest import write_picture; {write}"
    out = subprocess.run([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, check=True)
    assert out.stdout == b"x"


def test_a_picture_stays_as_private_as_it_was_and_whose_it_was(tmp_path: Path) -> None:
    (path := tmp_path / "a.png").write_bytes(b"before")
    path.chmod(0o600)
    if not os.getuid():
        os.chown(path, 1000, 1000)
    before = path.stat()
    for data in (b"one", b"two"):
        write_picture(path, data)
        now = path.stat()
        assert (now.st_mode, now.st_uid, path.read_bytes()) == (before.st_mode, before.st_uid, data)
        os.chown(path, os.getuid(), os.getgid())
        before = path.stat()


def test_a_file_that_cannot_be_replaced_is_written_to(tmp_path: Path) -> None:
    (one := tmp_path / "one.png").write_bytes(b"before")
    (other := tmp_path / "other.png").hardlink_to(one)
    write_picture(one, b"picture")
    assert other.read_bytes() == b"picture"
    for _ in range(2):
        write_picture(long := tmp_path / f"{'x' * 251}.png", b"picture")
        assert long.read_bytes() == b"picture"
    (loop := tmp_path / "loop.png").symlink_to("loop.png")
    with pytest.raises(OSError, match="symbolic links"):
        write_picture(loop, b"picture")


def test_a_picture_goes_into_a_file_that_is_mounted_alone(tmp_path: Path) -> None:
    """As `docker run -v` does it: nothing can take its place."""
    inside, outside = tmp_path / "inside.png", tmp_path / "outside.png"
    for path in (inside, outside):
        path.write_bytes(b"before")
    mount = ["unshare", "-m", "sh", "-c", f'mount --bind {outside} {inside} && exec "$@"', "-"]
    if subprocess.run([*mount, "true"], capture_output=True, check=False).returncode:
        pytest.skip("needs leave to mount")
    write = f"write_picture(pathlib.Path({str(inside)!r}), b'picture')"
    program = f"import pathlib; from handler.volume.manifest import write_picture; {write}"
    subprocess.run([*mount, sys.executable, "-c", program], cwd=ROOT, check=True)
    assert (outside.read_bytes(), sorted(each.name for each in tmp_path.iterdir())) == (
        b"picture",
        ["inside.png", "outside.png"],
    )


def still_open(path: Path) -> int:
    """How many of this process's descriptors are of that file."""
    links = (each for each in Path("/proc/self/fd").iterdir() if each.is_symlink())
    return sum(link.readlink() == path for link in links)


DATA = bytes(range(256)) * 64
IDENTITY = (0, 0, 0, 0)


@pytest.mark.parametrize(
    ("on_disk", "crc32", "says"),
    [
        (DATA, (zlib.crc32(DATA),), None),
        (DATA, (0,), "is damaged"),
        (DATA, (), "was replaced"),
        (DATA[:-1], (zlib.crc32(DATA),), "is no longer a file of"),
    ],
)
def test_reading_leaves_no_file_open(on_disk: bytes, crc32: tuple[int, ...], says: str | None, tmp_path: Path) -> None:
    """However often, and whatever is wrong with it."""
    path = tmp_path / "weights.safetensors"
    path.write_bytes(on_disk)
    file = ReadFile(path, IDENTITY, crc32, "Fetch it again.", mmap.mmap(-1, len(DATA)))
    for _ in range(3):
        with pytest.raises(WeightsCorrupt, match=says) if says else nullcontext():
            file.read(0, len(DATA))
    assert bytes(file.memory) == (DATA if says in (None, "is damaged") else bytes(len(DATA)))
    assert still_open(path) == 0


@pytest.mark.parametrize("ends", [None, ValueError("it failed"), KeyboardInterrupt()])
def test_a_step_cache_leaves_no_hook_behind(ends: BaseException | None) -> None:
    """On Chroma's guidance layer, nor on its blocks; once for each picture, however that ends."""
    layer = torch.nn.Identity()
    doubles, singles = torch.nn.ModuleList([torch.nn.Identity()]), torch.nn.ModuleList([torch.nn.Identity()])
    chroma: Any = SimpleNamespace(
        distilled_guidance_layer=layer, transformer_blocks=doubles, single_transformer_blocks=singles
    )
    for _ in range(3):
        with pytest.raises(type(ends)) if ends else nullcontext(), stepcache._placed(chroma):
            assert len(layer._forward_hooks) == 1
            assert "forward" in vars(doubles[0])
            if ends:
                raise ends
    assert not layer._forward_hooks
    assert not any("forward" in vars(block) for block in (*doubles, *singles))
