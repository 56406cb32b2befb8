"""What a start touches, written down once and brought into the page cache by later ones."""

import ctypes
import mmap
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch  # as in a process that has started

from handler.worker import touched

ROOT = Path(__file__).parents[2]
RECORD = "import sys; from handler.worker import touched; touched.LIST = sys.argv[1]; touched.record()"
BOOT = """
import os, sys, sysconfig, threading
sys.prefix = sys.argv[1]
from handler import Settings, Worker
from handler.worker import touched
os.makedirs(sysconfig.get_path("purelib"), exist_ok=True)
with open(os.path.join(sys.prefix, touched.LIST), "w") as file:
    print(touched._key(), *sys.argv[2:], sep="\\n", file=file)
try:
    Worker.boot(Settings(model="nobodys"))
except Exception as error:
    print(error)
for thread in threading.enumerate():
    if thread.name == "touched":
        thread.join()
"""


def cached(path: Path) -> bool:
    """Whether the page cache has the file's first page, or it is on its way there."""
    libc, state = ctypes.CDLL(None, use_errno=True), (ctypes.c_ubyte * 1)()
    with path.open("r+b") as file, mmap.mmap(file.fileno(), mmap.PAGESIZE) as pages:
        start = ctypes.addressof(ctypes.c_char.from_buffer(pages))
        assert libc.mincore(ctypes.c_void_p(start), ctypes.c_size_t(1), state) == 0
        del start
    return bool(state[0] & 1)


def drop(paths: Iterable[Path]) -> None:
    for path in paths:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """A hundred files of an environment, none of which is in the page cache."""
    found = [tmp_path / f"file{number:03}" for number in range(100)]
    for path in found:
        path.write_bytes(os.urandom(2 * mmap.PAGESIZE))
    drop(found)
    if cached(found[0]):
        pytest.skip("this file system keeps its files in memory")
    return found


def write(folder: Path, *rows: str, key: str | None = None) -> None:
    (folder / touched.LIST).write_text("\n".join([touched._key() if key is None else key, *rows]))


def row(path: Path) -> str:
    return f"0 {2 * mmap.PAGESIZE} {path.name}"


def test_what_imports_touch_is_written_down_to_the_page(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", RECORD, tmp_path / "list"], cwd=ROOT, check=True)
    first, *lines = (tmp_path / "list").read_text().splitlines()
    found = [touched.ROW.fullmatch(line) for line in lines]
    assert first == touched._key()
    assert all(found)
    ranges = [(int(one[1]), int(one[2]), one[3]) for one in found if one]
    [torchs] = {name for _, _, name in ranges if name.endswith("/libtorch_cpu.so")}
    read = sum(stop - start for start, stop, name in ranges if name == torchs)
    assert 0 < read < os.path.getsize(Path(sys.prefix, torchs)) * 0.9
    modules = {name for _, _, name in ranges if name.endswith(".pyc")}
    assert any("/diffusers/" in name for name in modules)
    assert len(modules) > 1000
    assert not any("/sympy/" in name for name in modules)  # which a worker's own process leaves out
    assert all(Path(sys.prefix, name).is_file() for _, _, name in ranges)


def test_a_start_brings_it_before_it_knows_what_it_will_load(files: list[Path]) -> None:
    command = [sys.executable, "-c", BOOT, str(files[0].parent), *map(row, files)]
    told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "nobodys" in told
    assert all(map(cached, files))


def test_what_is_warm_is_left_alone(files: list[Path]) -> None:
    """All rows are asked for or none: the last is not among those that are looked at."""
    write(files[0].parent, *map(row, files))
    for path in files[:-1]:
        path.read_bytes()
    touched._bring(str(files[0].parent))
    assert not cached(files[-1])
    drop(files)
    touched._bring(str(files[0].parent))
    assert all(map(cached, files))


def test_where_torch_is_imported_already_nothing_is_brought(files: list[Path]) -> None:
    write(files[0].parent, *map(row, files))
    assert torch
    assert touched.bring(str(files[0].parent)) is None


def test_odd_rows_are_passed_over(files: list[Path], tmp_path_factory: pytest.TempPathFactory) -> None:
    folder, outside = files[0].parent, tmp_path_factory.mktemp("outside") / "file"
    outside.write_bytes(os.urandom(mmap.PAGESIZE))
    (folder / "link").symlink_to(outside)
    (folder / "folder").mkdir()
    os.mkfifo(folder / "pipe")
    drop([outside])
    odd = ["link", str(outside), f"../{outside.parent.name}/file", "folder", "pipe", "gone", "x" * 300, ""]
    numbers = [
        f"9 1 {files[1].name}",
        f"-1 4096 {files[1].name}",
        f"{'9' * 12} {'9' * 12} {files[1].name}",
        "torch",
        "",
    ]
    write(folder, *(f"0 4096 {name}" for name in odd), *numbers, *map(row, files))
    touched._bring(str(folder))
    assert all(map(cached, files))
    assert not cached(outside)


@pytest.mark.parametrize("other", ["another's", ""])
def test_another_environments_list_is_none(files: list[Path], other: str) -> None:
    write(files[0].parent, *map(row, files), key=other)
    touched._bring(str(files[0].parent))
    assert not any(map(cached, files))


@pytest.mark.parametrize(
    "data", [None, b"", b"\xff\xfe\x00", b"\n" * 9_000_000], ids=["none", "empty", "bytes", "long"]
)
def test_what_is_no_list_is_none(tmp_path: Path, data: bytes | None) -> None:
    if data is not None:
        (tmp_path / touched.LIST).write_bytes(data)
    assert touched.listed(str(tmp_path)) == []
    touched._bring(str(tmp_path))
