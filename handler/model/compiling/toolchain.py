"""The toolchain: what compiling needs besides torch, found where it is, and where it is missing named with a remedy.

AOTInductor writes C++ that a compiler builds against CUDA's headers and links with the driver's library. The headers
come as wheels beside CUDA's libraries, where torch does not look: CUDA 13's share one folder, CUDA 12's have one each;
and the driver brings its library under a name that a linker does not look for. While blocks are compiled `environment`
lets both be seen.
"""

import contextlib
import ctypes
import importlib
import os
import re
import shutil
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from handler.catalog.cuda import header_wheels
from handler.core.scratch import Scratch
from handler.core.secrets import secret_names

HEADERS = ("cuda.h", "crt/host_defines.h", "nv/target")  # what AOTInductor's C++ includes, of three wheels
DRIVER = "libcuda.so.1"
TOOLKIT = "/usr/local/cuda"
APART = "cuda_runtime"  # the folder of CUDA 12's wheels that has cuda.h; those beside it have the rest
VERSION = re.compile(rb"#define CUDA_VERSION (\d+)")  # in cuda.h: 1000 times the major version, 10 times the minor one
STARTERS = ("torch._inductor.compile_worker.subproc_pool", "torch._inductor.autotune_process")  # of processes
CACHES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")  # where they keep what they run again
REMEDIES = {  # by field of `Toolchain`: what is missing, and what brings it
    "compiler": ("C++ compiler", "apt-get install g++, or let CXX name one"),
    "c": ("C compiler, which Triton wants", "apt-get install gcc, or let CC name one"),
    "python": ("Python.h, which Triton wants", "apt-get install python3-dev"),
    "headers": ("folder with CUDA's headers", "pip install '{wheels}'"),
    "driver": (DRIVER, "start the container with its GPU"),
}


@dataclass(frozen=True, slots=True)
class Toolchain:
    """What there is to compile with; empty for what there is not.

    `cuda` is the version of it that torch was built with, `headers` a folder with CUDA's in include/.
    """

    cuda: str
    compiler: str
    c: str
    python: str
    headers: str
    driver: str

    def missing(self, device: str) -> str:
        """Why no code can be compiled for `device` (cpu or cuda), with the remedy; empty if it can."""
        needed = REMEDIES if device != "cpu" else ("compiler",)
        gone = [REMEDIES[name] for name in needed if not getattr(self, name)]
        wheels = header_wheels(self.cuda)
        told = "; ".join(f"there is no {what} ({remedy.format(wheels=wheels)})" for what, remedy in gone)
        return f"this worker cannot compile: {told}" if told else ""

    @property
    def facts(self) -> dict[str, str]:
        """All of it, by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


def look() -> Toolchain:
    """The toolchain of this process. Files are named by where they really are, which mostly tells their versions."""
    import torch

    cuda = torch.version.cuda or ""
    python = Path(sysconfig.get_paths()["include"])
    return Toolchain(
        cuda,
        compiler=_program(os.environ.get("CXX", "g++")),
        c=_program(os.environ["CC"]) if "CC" in os.environ else _program("gcc") or _program("clang"),
        python=str(python) if (python / "Python.h").is_file() else "",
        headers=_headers(cuda) if cuda else "",
        driver=_driver() if cuda else "",
    )


def _program(command: str) -> str:
    return os.path.realpath(found) if (found := shutil.which(command)) else ""


def _headers(cuda: str) -> str:
    """The first folder that could be CUDA_HOME and is whole: the one that is set, the wheels', a toolkit's."""
    major = cuda.partition(".")[0]
    said = [os.environ.get(name, "") for name in ("CUDA_HOME", "CUDA_PATH")]
    wheels = [f"{place}/nvidia/{folder}" for place in sys.path for folder in (f"cu{major}", APART)]
    toolkits = [str(Path(_program("nvcc")).parents[1]) if _program("nvcc") else "", TOOLKIT]
    homes = filter(None, (*said, *wheels, *toolkits))
    return next((home for home in homes if _whole(Path(home), int(major))), "")


def _apart(home: Path) -> list[Path]:
    """Folders of headers that are not in `home`, but belong to it."""
    return sorted(home.parent.glob("*/include")) if home.name == APART else []


def _whole(home: Path, major: int) -> bool:
    """Whether a folder, with those beside it, has all of `HEADERS`, of this major version of CUDA."""
    with contextlib.suppress(OSError):  # one that may not be read
        includes = [home / "include", *_apart(home)]
        if all(any((include / name).is_file() for include in includes) for name in HEADERS):
            version = VERSION.search((includes[0] / "cuda.h").read_bytes())
            return version is not None and int(version[1]) // 1000 == major
    return False


def _driver() -> str:
    """The driver's library as the loader finds it, wherever that is."""
    with contextlib.suppress(OSError):
        ctypes.CDLL(DRIVER)
        mapped = (line.split(maxsplit=5)[-1] for line in Path("/proc/self/maps").read_text().splitlines())
        return next((path for path in mapped if path.rpartition("/")[2].startswith("libcuda.so")), "")
    return ""


@contextlib.contextmanager
def environment() -> Iterator[None]:
    """While this lasts, torch and the linker find CUDA's headers and the driver's library, where these are at all.

    What was compiled before lies where torch would look for it in a folder of a name that anybody can tell: it would
    run, and be published, what others put there. So each time has a new one, of nobody else's, and builds without
    headers compiled before, which save no time and never lie anywhere else. No compiler is told a secret.
    """
    from torch._inductor import config
    from torch._inductor.utils import clear_caches
    from torch.utils import cpp_extension

    tools, before = look(), cpp_extension.CUDA_HOME  # what torch made of the environment when it was imported
    with Scratch() as scratch, contextlib.ExitStack() as stack:
        folder = scratch.path
        stack.callback(clear_caches)  # which know files in the folder
        clear_caches()
        stack.enter_context(setting({name: str(folder / name.lower()) for name in CACHES}))
        stack.enter_context(config.patch({"aot_inductor.precompile_headers": False}))
        stack.enter_context(_untold())
        if tools.headers:
            stack.callback(setattr, cpp_extension, "CUDA_HOME", before)
            cpp_extension.CUDA_HOME = tools.headers
            stack.enter_context(setting({"CUDA_HOME": tools.headers}))
            if apart := _apart(Path(tools.headers)):
                stack.enter_context(setting({"CPATH": _joined(*map(str, apart), os.environ.get("CPATH", ""))}))
        if tools.driver:
            (folder / "libcuda.so").symlink_to(tools.driver)
            stack.enter_context(setting({"LIBRARY_PATH": _joined(str(folder), os.environ.get("LIBRARY_PATH", ""))}))
        yield


def _joined(*paths: str) -> str:
    return os.pathsep.join(filter(None, paths))


@contextlib.contextmanager
def setting(variables: Mapping[str, str]) -> Iterator[None]:
    """While this lasts, the process's environment has these."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


@contextlib.contextmanager
def _untold() -> Iterator[None]:
    """Programs that are started meanwhile get no secrets; this process, whose other threads may need them, has them.

    Torch starts its own with copies of `os.environ`.
    """
    names: list[str] = secret_names(os.environ)
    starters: list[Any] = [importlib.import_module(name) for name in STARTERS]
    inherited = starters[0].python_subprocess_env

    def told() -> dict[str, str]:
        return {name: value for name, value in inherited().items() if name not in names}

    for name in names:
        os.unsetenv(name)  # what programs inherit, and not `os.environ`
    for starter in starters:
        starter.python_subprocess_env = told
    try:
        yield
    finally:
        for starter in starters:
            starter.python_subprocess_env = inherited
        for name in {*names} & os.environ.keys():
            os.putenv(name, os.environ[name])
