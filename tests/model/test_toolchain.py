"""What compiling needs: found, missed by name, given to torch and the linker; and what a failure leads to."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import distribution
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import PATIENT, ROOT
from packaging.requirements import Requirement
from torch._inductor import utils
from torch._inductor.compile_worker import subproc_pool
from torch._inductor.compile_worker.subproc_pool import SubprocPool
from torch._inductor.runtime.cache_dir_utils import cache_dir, default_cache_dir
from torch.utils import cpp_extension

from fakes import raises
from handler import MODELS, Settings, Worker
from handler.cli import doctor, findings
from handler.core import processor
from handler.core.errors import DeviceLost, NumericalError, OutOfMemory, StartError, WeightsCorrupt
from handler.model import families
from handler.model.compiling import artifacts, toolchain
from handler.model.compiling import package as blocks
from handler.model.compiling.artifacts import Found
from handler.model.compiling.failures import AGAIN, LONGEST, LOST_S, Failures, gist, passing
from handler.model.hardware import Hardware
from handler.volume.manifest import Source, read_manifest, write_manifest
from handler.worker import chips
from handler.worker.compilation import plan

SPARK = MODELS["spark"]
LOST, RESTORE = RuntimeError("CUDA error: unspecified launch failure"), artifacts.restore
H200 = Hardware("cuda", "NVIDIA H200", "fp8", "a test", 141.0, (9, 0))
GPULESS = ROOT / ".gpuless"
# What torch's CUDA builds require of cuda-toolkit: Requires-Dist of their x86_64 wheels on PyPI.
PINNED = {"2.11.0": "13.0.2", "2.13.0": "13.0.3"}
TOOLS = toolchain.Toolchain("13.0", "/usr/bin/g++", "/usr/bin/gcc", "/usr/include", "/cuda", "/lib/libcuda.so.1")


def home(folder: Path, *left_out: str, version: int = 13000) -> Path:
    """A folder as the wheels' nvidia/cu13, with all headers but those left out."""
    for name in {*toolchain.HEADERS} - {*left_out}:
        path = folder / "include" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#define CUDA_VERSION {version}\n")
    return folder


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A CUDA build of torch on a machine without a toolkit; the folder of its packages, where no wheels are yet."""
    for name in ("CUDA_HOME", "CUDA_PATH", "LIBRARY_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(toolchain, "TOOLKIT", str(tmp_path / "no toolkit"))
    monkeypatch.setattr(toolchain, "_program", lambda command: "" if command == "nvcc" else f"/usr/bin/{command}")
    monkeypatch.setattr(toolchain, "_driver", lambda: "/lib/libcuda.so.1.570")
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", None)
    monkeypatch.syspath_prepend(tmp_path / "site-packages")
    return tmp_path / "site-packages"


def test_without_a_toolkit_torch_is_given_the_wheels_headers(cuda: Path) -> None:
    with pytest.raises(OSError, match="CUDA_HOME"):
        cpp_extension.include_paths("cuda")
    wheels = home(cuda / "nvidia" / "cu13")
    with toolchain.environment():
        found = cpp_extension.include_paths("cuda")
        assert str(wheels / "include") in found
        assert os.environ["CUDA_HOME"] == str(wheels)
    assert cpp_extension.CUDA_HOME is None
    assert "CUDA_HOME" not in os.environ
    assert "LIBRARY_PATH" not in os.environ


CU12 = {"cuda_runtime": "cuda.h", "cuda_nvcc": "crt/host_defines.h", "cuda_cccl": "nv/target"}  # of its wheels


@pytest.fixture
def apart(cuda: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """CUDA 12's wheels, with a folder each."""
    monkeypatch.setattr(torch.version, "cuda", "12.6")
    for folder, name in CU12.items():
        home(cuda / "nvidia" / folder, *({*toolchain.HEADERS} - {name}), version=12060)
    return cuda / "nvidia"


def test_headers_of_cuda_12_are_found_in_all_of_their_wheels(
    apart: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, compiler: None
) -> None:
    monkeypatch.setenv("CPATH", "/mine")
    source = tmp_path / "a.cpp"
    source.write_text("".join(f"#include <{name}>\n" for name in toolchain.HEADERS))
    with toolchain.environment():
        assert os.environ["CUDA_HOME"] == str(apart / "cuda_runtime")
        assert os.environ["CPATH"].endswith(f"{os.pathsep}/mine")
        includes = [f"-I{path}" for path in cpp_extension.include_paths("cuda")]
        subprocess.run(["g++", "-fsyntax-only", *includes, str(source)], check=True)
    assert os.environ["CPATH"] == "/mine"
    assert toolchain.look().headers == str(apart / "cuda_runtime")


@pytest.mark.parametrize("folder", CU12)
def test_a_wheel_of_cuda_12_that_is_not_there_is_missed(apart: Path, folder: str) -> None:
    (apart / folder / "include" / CU12[folder]).unlink()
    assert toolchain.look().headers == ""
    assert "(pip install 'cuda-toolkit[cccl,nvcc]==12.6.*')" in toolchain.look().missing("cuda")


def test_headers_that_lie_apart_are_no_others(apart: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of CUDA 12 beside a torch for CUDA 13; and a folder that has all itself needs no other."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert toolchain.look().headers == ""
    wheels = home(apart / "cu13")
    monkeypatch.delenv("CPATH", raising=False)
    with toolchain.environment():
        assert os.environ["CUDA_HOME"] == str(wheels)
        assert "CPATH" not in os.environ


@pytest.mark.parametrize("wrong", ["nowhere", "no cuda.h", "no crt", "of CUDA 12"])
def test_a_wrong_cuda_home_is_passed_over_and_comes_back(
    wrong: str, cuda: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As torch infers it from an nvcc in /usr/local/bin, which has no headers beside it."""
    made = {"no cuda.h": ("cuda.h",), "no crt": ("crt/host_defines.h",)}
    other = tmp_path / "other"
    if wrong != "nowhere":
        home(other, *made.get(wrong, ()), version=12080 if wrong == "of CUDA 12" else 13000)
    monkeypatch.setenv("CUDA_HOME", str(other))
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", str(other))
    wheels = home(cuda / "nvidia" / "cu13")
    with toolchain.environment():
        assert str(cpp_extension.CUDA_HOME) == os.environ["CUDA_HOME"] == str(wheels)
    assert str(cpp_extension.CUDA_HOME) == os.environ["CUDA_HOME"] == str(other)


def test_a_folder_that_cannot_be_looked_into_is_passed_over(cuda: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheels = home(cuda / "nvidia" / "cu13")
    monkeypatch.setenv("CUDA_HOME", "/" + "a" * 300)  # a name too long is told as one that is forbidden
    assert toolchain.look().headers == str(wheels)


def test_a_right_cuda_home_is_kept(cuda: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home(cuda / "nvidia" / "cu13")
    mine = home(tmp_path / "mine")
    monkeypatch.setenv("CUDA_HOME", str(mine))
    assert toolchain.look().headers == str(mine)


def test_a_real_toolkit_will_do(cuda: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolchain, "TOOLKIT", str(home(tmp_path / "toolkit")))
    assert toolchain.look().headers == str(tmp_path / "toolkit")


def test_nothing_is_changed_where_nothing_is_found(cuda: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolchain, "_driver", lambda: "")
    before = dict(os.environ)
    with toolchain.environment():
        assert {name for name in os.environ | before if os.environ.get(name) != before.get(name)} == {*toolchain.CACHES}
        assert cpp_extension.CUDA_HOME is None


def test_all_comes_back_after_an_error(cuda: Path) -> None:
    home(cuda / "nvidia" / "cu13")
    before = dict(os.environ)
    with pytest.raises(RuntimeError, match="no good"), toolchain.environment():
        raise RuntimeError("no good")
    assert dict(os.environ) == before
    assert cpp_extension.CUDA_HOME is None


LINK = """
import os, subprocess, sys
from contextlib import nullcontext
from types import SimpleNamespace as Fake
extension = Fake(CUDA_HOME=None)
sys.modules["torch"] = Fake(version=Fake(cuda="13.0"))
sys.modules["torch.utils"] = Fake(cpp_extension=extension)
sys.modules["torch._inductor"] = Fake(config=Fake(patch=nullcontext))
sys.modules["torch._inductor.utils"] = Fake(clear_caches=lambda: None)
for name in ("torch._inductor.compile_worker.subproc_pool", "torch._inductor.autotune_process"):
    sys.modules[name] = Fake(python_subprocess_env=dict)
from handler.model.compiling import toolchain
bare = subprocess.run([*sys.argv[1:]], capture_output=True).returncode
with toolchain.environment():
    given = subprocess.run([*sys.argv[1:]]).returncode
    folder = os.environ["LIBRARY_PATH"].split(":")[0]
print(bare, given, os.path.exists(folder), toolchain.look().driver, sep="\\n")
"""


def test_each_compilation_has_a_folder_of_its_own_that_nobody_else_can_write(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/tmp/torchinductor_root")
    folders = list[Path]()
    for _ in range(2):
        with toolchain.environment():
            for name in toolchain.CACHES:
                assert Path(os.environ[name]).parent.stat().st_mode & 0o777 == 0o700
            folders.append(Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]))
            assert default_cache_dir() != cache_dir() == str(folders[-1])
    assert folders[0] != folders[1]
    assert not any(folder.parent.exists() for folder in folders)
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "/tmp/torchinductor_root"


def test_what_is_written_to_it_to_the_last_costs_nobody_what_was_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    def busy(*_: object, **__: object) -> None:
        raise OSError(errno.ENOTEMPTY, "Directory not empty")

    with toolchain.environment():
        monkeypatch.setattr(os, "rmdir", busy)
        folder = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]).parent
    monkeypatch.undo()
    shutil.rmtree(folder)


def test_compilers_are_told_no_secrets_and_this_process_keeps_them(monkeypatch: pytest.MonkeyPatch) -> None:
    command = ["sh", "-c", "echo $HF_TOKEN $KINDLING_API_KEYS $AWS_SESSION_TOKEN $KINDLING_QUEUE"]
    for name in ("HF_TOKEN", "KINDLING_API_KEYS", "AWS_SESSION_TOKEN", "KINDLING_QUEUE"):
        monkeypatch.setenv(name, "31")
    with toolchain.environment():
        assert subprocess.check_output(command, text=True) == "31\n"
        assert os.environ["HF_TOKEN"] == "31"
    assert subprocess.check_output(command, text=True) == "31 31 31 31\n"


def test_torchs_own_processes_are_told_none_either(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which compile Triton's kernels, and start compilers for those."""
    monkeypatch.setenv("HF_TOKEN", "31")
    with toolchain.environment():
        pool = SubprocPool(1)
        try:
            assert pool.submit(os.getenv, "HF_TOKEN").result() is None
            assert pool.submit(os.getenv, "PATH").result() == os.environ["PATH"]
        finally:
            pool.shutdown()
    assert subproc_pool.python_subprocess_env is utils.python_subprocess_env


@pytest.mark.parametrize("place", ["lib64", "a folder"])
def test_the_linker_finds_a_driver_that_is_only_there_by_its_soname(place: str, tmp_path: Path, compiler: None) -> None:
    (tmp_path := tmp_path / place).mkdir()
    (tmp_path / "driver.c").write_text("int cuInit(unsigned flags) { return 0; }")
    (tmp_path / "user.c").write_text("int cuInit(unsigned flags); int main() { return cuInit(0); }")
    driver, linked = tmp_path / "libcuda.so.1", tmp_path / "user"
    made = ["g++", "-x", "c", "-shared", "-Wl,-soname,libcuda.so.1", str(tmp_path / "driver.c"), "-o", str(driver)]
    subprocess.run(made, check=True)
    asks = ["g++", "-x", "c", str(tmp_path / "user.c"), "-o", str(linked), "-lcuda"]
    environ = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path), "PYTHONPATH": str(ROOT)}
    out = subprocess.run([sys.executable, "-c", LINK, *asks], env=environ, capture_output=True, text=True, check=True)
    bare, given, stays, found = out.stdout.splitlines()
    assert (int(bare) != 0, int(given), stays, found) == (True, 0, "False", str(driver))
    assert subprocess.run([str(linked)], env=environ, check=False).returncode == 0  # it asks for libcuda.so.1


@pytest.mark.parametrize(
    ("without", "device", "says"),
    [
        ("", "cuda", ""),
        ("compiler", "cuda", "there is no C++ compiler (apt-get install g++, or let CXX name one)"),
        ("compiler", "cpu", "there is no C++ compiler (apt-get install g++, or let CXX name one)"),
        ("headers", "cuda", "CUDA's headers (pip install 'cuda-toolkit[cccl,crt]==13.0.*')"),
        ("headers", "cpu", ""),
        ("python", "cuda", "Python.h"),
        ("c", "cuda", "C compiler, which Triton wants"),
        ("driver", "cuda", "libcuda.so.1 (start the container with its GPU)"),
    ],
)
def test_what_is_missing_is_named_with_its_remedy(without: str, device: str, says: str) -> None:
    found = replace(TOOLS, **({without: ""} if without else {})).missing(device)
    assert says in found
    assert bool(found) == bool(says)


def test_no_compiler_is_found_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    assert "no C++ compiler" in toolchain.look().missing("cpu")
    monkeypatch.setenv("CXX", sys.executable)  # whatever it names
    assert toolchain.look().missing("cpu") == ""


def test_blocks_are_compiled_in_that_environment(cuda: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    wheels = home(cuda / "nvidia" / "cu13")
    seen: list[str | None] = []
    monkeypatch.setattr(blocks, "_kinds", lambda *_: {"kind": ["block"]})
    monkeypatch.setattr(blocks, "_calls", lambda *_: {"kind": []})
    monkeypatch.setattr(blocks, "_compiled", lambda *_: seen.append(cpp_extension.CUDA_HOME))
    monkeypatch.setattr("torch._inductor.package.package.package_aoti", lambda *_: None)
    blocks.compile_blocks(None, lambda: None, tmp_path / "a.pt2")
    assert seen == [str(wheels)]


def required(name: str, lines: list[str]) -> list[Requirement]:
    found = [Requirement(line) for line in lines if re.match(name + r"\b", line)]
    return [each for each in found if each.marker is None or each.marker.evaluate({"platform_system": "Linux"})]


REQUIREMENTS = (ROOT / "requirements.txt").read_text().splitlines()


def test_the_header_wheels_are_those_of_torchs_cuda() -> None:
    [wheels], [pinned] = required("cuda-toolkit", REQUIREMENTS), required("torch", REQUIREMENTS)
    assert wheels.extras == {"crt", "cccl"}
    assert str(wheels.specifier) == f"=={PINNED[str(pinned.specifier).removeprefix('==')]}"
    assert wheels.marker
    assert not wheels.marker.evaluate({"platform_system": "Darwin"})


@pytest.mark.parametrize("where", ["here", "gpuless"])
def test_torch_itself_says_so(where: str) -> None:
    """A CUDA build of torch is not in every environment; where one is, its own word counts."""
    if where == "here":
        lines = distribution("torch").requires or []
    else:
        found = [*GPULESS.glob("venv/lib/*/site-packages/torch-*.dist-info/METADATA")]
        text = found[0].read_text() if found else ""
        lines = re.findall(r"(?m)^Requires-Dist: (.*)$", text)
    if not (asked := required("cuda-toolkit", lines)):
        pytest.skip("torch is a CPU build here" if where == "here" else "'make lower' has not been run here")
    version = torch.__version__ if where == "here" else found[0].parent.name.split("-")[1].removesuffix(".dist")
    assert str(asked[0].specifier) == f"=={PINNED[version.partition('+')[0]]}"


def test_every_image_installs_them() -> None:
    dockerfile = (ROOT / "Dockerfile").read_text()
    assert 'RUN pip install -r "platform/locks/torch-$CUDA.lock" ' in dockerfile
    assert "\ncuda-toolkit[" in (ROOT / "requirements.txt").read_text()
    assert "\nnvidia-cuda-crt==" in (ROOT / "platform" / "locks" / "torch-cu130.lock").read_text()
    assert "\ncuda-toolkit[cccl,nvcc]==" in (ROOT / "platform" / "locks" / "torch-cu126.lock").read_text()
    assert re.search(r"apt-get install .*\bg\+\+ libc6-dev\b", dockerfile)
    modal, fal = ((ROOT / "platform" / name).read_text() for name in ("modal_app.py", "fal_app.py"))
    assert ".uv_pip_install(requirements=[TORCH]" in modal
    assert 'from_dockerfile(str(ROOT / "Dockerfile")' in fal
    others = [text for text in (dockerfile, modal, fal) if "cuda-toolkit" in text]
    assert not others  # the version stands in one place


def test_aotinductor_builds_for_cuda_where_the_machines_toolkit_is_wrong(tmp_path: Path) -> None:
    """The C++ half, by the CUDA build of torch: as torch alone would it fails, in our environment it is built."""
    python = GPULESS / "venv" / "bin" / "python"
    if not python.exists():
        pytest.skip("needs the environment that 'make lower' makes: a CUDA build of torch over stub libraries")
    environ = {
        "PATH": "/usr/bin:/bin",  # no nvcc
        "CUDA_HOME": str(home(tmp_path / "other", "crt/host_defines.h")),
        "LD_LIBRARY_PATH": str(GPULESS / "stubs"),
        "HOME": str(tmp_path),
        "OMP_NUM_THREADS": "1",
    }
    out = subprocess.run(
        [str(python), str(ROOT / "benchmarks" / "gpuless" / "toolchain.py")],
        env=environ, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert out.returncode == 0, out.stdout + out.stderr
    found = json.loads(out.stdout)
    assert "bytes" not in found["bare"]
    assert found["given"]["bytes"] > 10_000
    assert str(GPULESS.resolve()) in str(Path(found["headers"]).resolve())


def failures(volume: Path, **others: Any) -> Failures:
    return replace(Failures("auto", SPARK, H200, volume), **others)


@pytest.fixture
def equipped(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that has all it takes."""
    monkeypatch.setattr(toolchain, "look", lambda: TOOLS)


BROKEN = RuntimeError("C++ compile error\n\nCommand:\ng++ a.cpp\n\nOutput:\na.cpp:1:2: fatal error: cuda.h: none here")


def test_a_failure_is_expected_again_by_workers_that_are_alike(
    equipped: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert failures(tmp_path).expected == ""
    failures(tmp_path).note(BROKEN, f"compiling failed: {gist(BROKEN)}")
    found = failures(tmp_path).expected
    assert "compiling failed: RuntimeError: a.cpp:1:2: fatal error: cuda.h: none here (" in found
    assert found.endswith(AGAIN)
    assert failures(tmp_path, hardware=replace(H200, attention="")).expected == found  # doctor, which measures nothing
    assert failures(tmp_path, policy="on").expected == ""
    assert failures(tmp_path, hardware=replace(H200, precision="bf16")).expected == ""
    assert failures(tmp_path, spec=MODELS["flux-schnell"]).expected == ""
    monkeypatch.setattr(toolchain, "look", lambda: replace(TOOLS, headers="/another"))
    assert failures(tmp_path).expected == ""  # what may have mended it
    monkeypatch.setattr(toolchain, "look", lambda: TOOLS)
    monkeypatch.setattr("handler.model.compiling.failures.__version__", "9.9")
    assert failures(tmp_path).expected == ""


def test_what_succeeded_is_expected_to(equipped: None, tmp_path: Path) -> None:
    """Else a worker that finds the package gone would not make another one."""
    failures(tmp_path).note(BROKEN, "broken")
    failures(tmp_path, hardware=replace(H200, precision="bf16")).note(BROKEN, "broken too")
    failures(tmp_path, policy="on").forget()
    assert failures(tmp_path).expected == ""
    assert failures(tmp_path, hardware=replace(H200, precision="bf16")).expected.startswith("broken too (")
    failures(tmp_path / "no volume").forget()


def test_what_one_decoder_does_is_not_held_against_another(equipped: None, tmp_path: Path) -> None:
    """KINDLING_VAE may name one that cannot be compiled."""
    failures(tmp_path, decoder="Decoder-1").note(BROKEN, "broken")
    assert failures(tmp_path, decoder="Decoder-1").expected.startswith("broken (")
    assert failures(tmp_path, decoder="Decoder-2").expected == ""


def test_nothing_is_expected_where_the_volume_breaks(
    equipped: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(Path, "iterdir", breaks)
    assert failures(tmp_path).expected == ""


def test_nothing_is_expected_where_there_is_no_proc(
    equipped: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processor, "CPUINFO", tmp_path / "none")
    assert failures(tmp_path).expected == ""
    failures(tmp_path).note(BROKEN, "broken")
    assert failures(tmp_path).expected.startswith("broken (")


def test_a_volume_that_takes_no_word_or_gives_none(equipped: None, tmp_path: Path) -> None:
    (tmp_path / "baked").write_text("in the way of every write")
    failures(tmp_path).note(BROKEN, "broken")
    assert failures(tmp_path).expected == ""
    other = tmp_path / "other"
    failures(other).note(BROKEN, "broken")
    [record] = other.rglob("*.failed.json")
    for damaged in ('{"reason": ', "null", "[" * 50_000, " " * (LONGEST + 1)):
        record.write_text(damaged)
        assert failures(other).expected == ""
    record.unlink()
    os.mkfifo(record)  # whoever opened it would wait for ever
    assert failures(other).expected == ""


def test_a_missing_tool_is_expected_to_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolchain, "look", lambda: replace(TOOLS, headers=""))
    assert "this worker cannot compile: there is no folder with CUDA's headers" in failures(tmp_path).expected
    assert failures(tmp_path, policy="on").expected == ""
    assert "there is no folder with CUDA's headers (pip install" in failures(tmp_path).reason(BROKEN)


@pytest.mark.parametrize(
    ("error", "passes"),
    [
        (BROKEN, False),
        (RuntimeError("out of resource: shared memory"), False),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (OutOfMemory("A 64x64 picture does not fit."), True),
        (NumericalError("NaN"), True),
        (MemoryError(), True),
        (OSError(28, "No space left on device"), True),
        (OSError(30, "Read-only file system"), True),
        *(
            (OSError(number, "no words"), number != errno.EIO)
            for number in (errno.ENOSPC, errno.EDQUOT, errno.ENOMEM, errno.EROFS, errno.EACCES, errno.EIO)
        ),
        *(
            (RuntimeError(f"g++: {words} by nobody"), True)
            for words in ("No space left", "quota exceeded", "cannot allocate", "terminated abruptly")
        ),
        (FileNotFoundError(2, "No usable temporary directory found in ['/tmp', '/app']"), True),
        (RuntimeError("C++ compile error\ng++: fatal error: Killed signal terminated program cc1plus"), True),
        (RuntimeError("A process in the process pool was terminated abruptly while the future was running"), True),
        *(
            (RuntimeError(f"Failed to extract zip file x.so with mz_zip error string: {said}"), passes)
            for said, passes in {
                "write callback failed": True,
                "file write failed": True,
                "file close failed": True,
                "file open failed": True,
                "invalid header or archive is corrupted": False,
            }.items()
        ),
        (RuntimeError("PTXAS error: `ptxas` failed with error code -9"), True),
        (RuntimeError("PTXAS error: `ptxas` failed with error code 255"), False),
        (RuntimeError("CUDA error: uncorrectable ECC error encountered"), True),
    ],
)
def test_what_may_pass_is_not_held_against_anybody(
    error: Exception, passes: bool, equipped: None, tmp_path: Path
) -> None:
    wrapped = ValueError("lowering failed")
    wrapped.__cause__ = error
    assert passing(error) == passing(wrapped) == passes
    failures(tmp_path).note(wrapped, "broken")
    assert bool([*tmp_path.rglob("*.failed.json")]) != passes


WRONG, UNSOUND, PASSES = RuntimeError("bad kernel"), NumericalError("NaN"), MemoryError()
DAMAGED = WeightsCorrupt("blocks.pt2 is not what its manifest says")


@pytest.mark.parametrize(
    ("outcome", "error", "goes"),
    [
        ("HIT", WRONG, True), ("ERROR", WRONG, True), ("STALE", WRONG, False), ("MISS", WRONG, False),
        ("HIT", UNSOUND, True), ("ERROR", DAMAGED, True), ("HIT", PASSES, False), ("ERROR", PASSES, False),
        ("HIT", None, False),
    ],
)  # fmt: skip
def test_which_package_goes_for_which_error(
    outcome: Any, error: Exception | None, goes: bool, equipped: None, tmp_path: Path
) -> None:
    folder = tmp_path / "baked" / "spark" / "key"
    folder.mkdir(parents=True)
    (folder / "blocks.pt2").write_bytes(b"code")
    write_manifest(folder, {"kind": "blocks"})
    if error is DAMAGED:
        (folder / "blocks.pt2").write_bytes(b"cove")
    found = Found(outcome, "a test", Source(folder, read_manifest(folder)))
    failures(tmp_path).discredit(found, error)
    assert folder.exists() != goes
    failures(tmp_path).discredit(replace(found, source=None), error)


@pytest.mark.parametrize("error", [WRONG, UNSOUND, PASSES, None])
@pytest.mark.parametrize("outcome", ["HIT", "MISS"])
def test_what_is_left_of_compiled_code_that_failed(
    outcome: Any, error: Exception | None, equipped: None, tmp_path: Path
) -> None:
    """Word only of code that was made here and draws nothing sound: of other errors there is word already."""
    failures(tmp_path).condemn(Found(outcome, "a test"), error)
    words = [json.loads(path.read_text())["reason"] for path in tmp_path.rglob("*.failed.json")]
    assert words == (["compiled code failed: NumericalError: NaN"] if (outcome, error) == ("MISS", UNSOUND) else [])
    failures(tmp_path).forget()
    assert not [*tmp_path.rglob("*.json")]
    failures(tmp_path).forget()


@pytest.mark.parametrize(
    ("kind", "age_s", "holds"),
    [("failed", 9 * LOST_S, True), ("lost", LOST_S, False), ("lost", LOST_S - 1, True), ("lost", -60, True)],
)
def test_how_long_word_is_held_against_anybody(
    kind: str, age_s: float, holds: bool, equipped: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (failures(tmp_path).note_lost if kind == "lost" else partial(failures(tmp_path).note, WRONG))("it broke")
    [path] = tmp_path.rglob(f"*.{kind}.json")
    os.utime(path, (noon := 1_800_000_000.0,) * 2)
    monkeypatch.setattr("handler.model.compiling.failures.time", SimpleNamespace(time=lambda: noon + age_s))
    assert ("it broke" in failures(tmp_path).expected) == holds
    assert ("it broke" in failures(tmp_path).lost) == (holds and kind == "lost")


@pytest.mark.parametrize(("to", "told"), [("gone", False), ("itself.failed.json", True)])
def test_word_that_has_just_gone_is_none_and_one_that_cannot_be_read_is_told(
    to: str, told: bool, equipped: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (folder := tmp_path / "baked" / "spark").mkdir(parents=True)
    (folder / "itself.failed.json").symlink_to(to)
    assert failures(tmp_path).expected == ""
    assert ("how compiling failed before is not known: Cannot read" in caplog.text) == told


@pytest.mark.parametrize(("more", "holds"), [(0, True), (1, False)])
def test_how_long_word_may_be(more: int, holds: bool, equipped: None, tmp_path: Path) -> None:
    failures(tmp_path).note(WRONG, "it broke")
    [path] = tmp_path.rglob("*.failed.json")
    path.write_bytes(path.read_bytes().ljust(64 * 1024 + more))
    assert ("it broke" in failures(tmp_path).expected) == holds


def test_who_loses_the_gpu_hears_of_it_and_word_is_left(equipped: None, tmp_path: Path) -> None:
    with pytest.raises(DeviceLost), failures(tmp_path).watched():
        raise DeviceLost("gone") from RuntimeError("illegal address")
    assert "compiled code lost the GPU: RuntimeError: illegal address (" in failures(tmp_path).lost


def test_an_error_may_have_come_from_itself() -> None:
    error = RuntimeError("bad kernel")
    error.__cause__ = error
    assert not passing(error)


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("", ""),
        ("one line", "one line"),
        ("\n\n  the first \nanother", "the first"),
        ("g++ -O3\n  a.cpp:1: error: no such header\n b.cpp:1: error: another", "a.cpp:1: error: no such header"),
        ("x" * 186, "x" * 186),
        ("x" * 187, "x" * 186),
    ],
)
def test_of_what_a_compiler_says_one_line_is_told(said: str, told: str) -> None:
    assert gist(RuntimeError(said)) == f"RuntimeError: {told}"


def test_the_plan_does_not_try_in_vain() -> None:
    chosen = plan("auto", "cuda", "MISS", "nothing yet", 200, 10, "it failed before")
    assert (chosen.mode, chosen.compiles, chosen.failure) == ("EAGER", False, "it failed before")
    assert chosen.reason == "MISS: nothing yet; it failed before"
    assert plan("auto", "cuda", "HIT", "found", 200, 10, "it failed before").mode == "COMPILED"
    assert plan("off", "cuda", "MISS", "", 200, 10, "it failed before").failure == ""


def test_a_worker_that_failed_says_so_everywhere_and_the_next_does_not_try(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tries: list[str] = []

    def broken(*_: object) -> None:
        tries.append("a try")
        raise BROKEN

    monkeypatch.setattr("handler.worker.worker.compile_blocks", broken)
    # As a receipt whose winner is compiled has it: KINDLING_COMPILE is auto, and on a CPU too it is compiled.
    followed = {"precision": "fp32", "compile": "on"}
    monkeypatch.setattr(
        "handler.worker.decision.follow", lambda settings, receipt: settings.model_copy(update=followed)
    )
    auto = PATIENT.model_copy(update={"volume": tmp_path})
    ledgers = [Worker.boot(auto).ledger, Worker.boot(auto).ledger]
    assert tries == ["a try"]
    assert [ledger.plan for ledger in ledgers] == ["EAGER", "EAGER"]
    assert "fatal error: cuda.h" in ledgers[0].compile_failure
    assert ledgers[1].compile_failure.endswith(AGAIN)
    assert ledgers[1].plan_reason.startswith("MISS: nothing is compiled for spark yet; compiling failed: ")
    [told] = [each for each in caplog.records if "spark is served eagerly: compiling failed" in each.message]
    assert told.levelname == "ERROR"
    assert Worker.boot(auto.model_copy(update={"compile": "on"})).ledger.plan == "EAGER"
    assert len(tries) == 2


def test_a_picture_that_did_not_fit_while_compiling_is_no_failure_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OutOfMemory("A 256x128 picture does not fit in this worker's memory.")

    monkeypatch.setattr("handler.worker.worker.compile_blocks", full)
    worker = Worker.boot(PATIENT.model_copy(update={"volume": tmp_path, "compile": "on"}))
    assert worker.ledger.plan == "EAGER"
    assert "does not fit" in worker.ledger.compile_failure
    assert not [*tmp_path.rglob("*.failed.json")]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory."), NumericalError("NaN")])
def test_the_first_pictures_of_a_compilation_may_fail(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are drawn at once, which takes more memory; and whatever they are, eager may serve."""
    run = families.run

    def first_fail(family: object, pipeline: object, arguments: object, recipes: Sequence[object], *rest: Any) -> Any:
        if len(recipes) > 1 and isinstance(error, RuntimeError):
            raise error
        found = run(family, pipeline, arguments, recipes, *rest)  # type: ignore[arg-type]
        return [error] * len(recipes) if len(recipes) > 1 else found

    monkeypatch.setattr(families, "run", first_fail)
    worker = Worker.boot(PATIENT.model_copy(update={"volume": tmp_path, "compile": "on"}))
    assert (worker.ledger.outcome, worker.ledger.plan) == ("ready", "EAGER")
    assert worker.ledger.compile_failure.startswith("compiling failed: ")
    assert not [*tmp_path.rglob("*.failed.json"), *tmp_path.rglob("*.lost.json")]


@pytest.fixture
def fragile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Compiling takes no time, and what is compiled loses the GPU; as a receipt has it, also on a CPU."""

    def lose(*_: object, **__: object) -> None:
        raise LOST

    def bind(transformer: torch.nn.Module, *_: object) -> None:
        for block in transformer.transformer_blocks:  # type: ignore[union-attr]
            block.forward = lose

    def found(transformer: torch.nn.Module, *_: object, **__: object) -> artifacts.Found:
        if (tmp_path / "package").exists():
            bind(transformer)
            return artifacts.Found("HIT", "a package")
        return artifacts.Found("MISS", "nothing yet")

    followed = {"precision": "fp32", "compile": "on"}
    monkeypatch.setattr(
        "handler.worker.decision.follow", lambda settings, receipt: settings.model_copy(update=followed)
    )
    monkeypatch.setattr("handler.worker.worker.compile_blocks", lambda *_: 0.0)
    monkeypatch.setattr("handler.worker.worker.bind_blocks", bind)
    monkeypatch.setattr(artifacts, "restore", found)
    return PATIENT.model_copy(update={"volume": tmp_path})


@pytest.mark.parametrize("package", [False, True], ids=["own", "found"])
def test_compiled_code_that_lost_the_gpu_is_not_run_again(fragile: Settings, package: bool) -> None:
    if package:
        (fragile.volume / "package").touch()
    with pytest.raises(StartError, match="The GPU failed"):
        Worker.boot(fragile)
    [record] = fragile.volume.rglob("*.lost.json")
    again = Worker.boot(fragile).ledger
    assert (again.outcome, again.plan) == ("ready", "EAGER")
    assert "compiled code lost the GPU: RuntimeError: CUDA error: unspecified launch failure" in again.compile_failure
    with pytest.raises(StartError, match="The GPU failed"):
        Worker.boot(fragile.model_copy(update={"compile": "on"}))  # tries again, as AGAIN says
    old = time.time() - LOST_S - 1
    os.utime(record, (old, old))  # it may have been that one GPU
    with pytest.raises(StartError, match="The GPU failed"):
        Worker.boot(fragile)


def test_what_is_compiled_and_draws_nothing_sound_is_not_compiled_again(
    fragile: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else each start would spend its time on that; unless the model itself does no better."""

    def unsound(*_: object, **__: object) -> None:
        raise NumericalError("The model produced NaN.")

    def bind(transformer: torch.nn.Module, *_: object) -> None:
        for block in transformer.transformer_blocks:  # type: ignore[union-attr]
            block.forward = unsound

    compiled_here: list[object] = []
    monkeypatch.setattr("handler.worker.worker.compile_blocks", lambda *given: compiled_here.append(given))
    monkeypatch.setattr("handler.worker.worker.bind_blocks", bind)
    for _ in range(2):
        ledger = Worker.boot(fragile).ledger
        assert (ledger.outcome, ledger.plan, len(compiled_here)) == ("ready", "EAGER", 1)
        assert ledger.compile_failure.startswith("compiled code failed: NumericalError: The model produced NaN.")


def test_compiling_that_loses_the_gpu_is_not_tried_again(fragile: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where Inductor times kernels: an error that the GPU stays with is not one of the compiler."""

    def lose(*_: object) -> None:
        raise LOST

    monkeypatch.setattr("handler.worker.worker.compile_blocks", lose)
    with pytest.raises(StartError, match="The GPU failed"):
        Worker.boot(fragile)
    again = Worker.boot(fragile).ledger
    assert (again.plan, again.compile_failure.partition(" (")[0]) == ("EAGER", f"compiling failed: {gist(LOST)}")


def test_a_package_that_loses_the_gpu_is_not_loaded_again(fragile: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(artifacts, "restore", RESTORE)
    monkeypatch.setattr(artifacts, "look", lambda *_: artifacts.Found("HIT", "a package", Source(fragile.volume, None)))
    monkeypatch.setattr("handler.model.compiling.artifacts.shutil.copyfile", lambda *_: raises(LOST)())
    with pytest.raises(StartError, match="The GPU failed"):
        Worker.boot(fragile)
    assert "compiled code lost the GPU" in Worker.boot(fragile).ledger.plan_reason


def test_what_draws_again_is_held_against_nobody(equipped: None, tmp_path: Path) -> None:
    failures(tmp_path).note_lost("lost")
    assert failures(tmp_path).lost.startswith("lost (")
    assert failures(tmp_path).expected == failures(tmp_path).lost
    assert failures(tmp_path, policy="on").lost == ""
    failures(tmp_path).forget()
    assert failures(tmp_path).lost == ""
    failures(tmp_path).note(BROKEN, "broken")
    assert failures(tmp_path).lost == ""  # a package was made since, by whatever


@pytest.mark.parametrize("where", ["handler.worker.worker.Scratch", "handler.worker.worker.bind_blocks"])
def test_where_nothing_can_be_written_a_worker_is_eager(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_only(*_: object, **__: object) -> None:
        raise FileNotFoundError(2, "No usable temporary directory found")

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr("handler.worker.worker.compile_blocks", lambda *_: 0.0)
    monkeypatch.setattr(where, read_only)
    worker = Worker.boot(PATIENT.model_copy(update={"volume": tmp_path / "volume", "compile": "on"}))
    assert (worker.ledger.plan, worker.unpublished) == ("EAGER", False)
    assert "No usable temporary directory" in worker.ledger.compile_failure
    assert not [*tmp_path.glob("kindling-*"), *tmp_path.rglob("*.failed.json")]


def test_the_receipt_tells() -> None:
    found = chips.answer(SPARK, None, {"plan": "EAGER"}, "a CPU", "no g++")
    assert (found["reason"], found["compile_failure"]) == ("a CPU", "no g++")
    assert "compile_failure" not in chips.answer(SPARK, None, {"plan": "EAGER"}, "a CPU")


def test_doctor_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolchain, "look", lambda: TOOLS)
    told = findings._compiling(doctor.compiling(H200), "cuda")
    assert told == "possible, with /usr/bin/g++, CUDA's headers in /cuda, /lib/libcuda.so.1"
    monkeypatch.setattr(toolchain, "look", lambda: replace(TOOLS, compiler="", headers=""))
    told = findings._compiling(doctor.compiling(H200), "cuda")
    assert told.startswith("this worker cannot compile: there is no C++ compiler (")
    assert "; there is no folder with CUDA's headers (pip install" in told
