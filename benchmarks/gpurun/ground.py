"""What a run on a GPU stands on: the machine, a compiler that works, and the tests that only a GPU can run."""

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from gpurun.scale import DEVICE, Case, NotCompiledError, Row, Run, timed
from handler import Clock, ImageRequest, Settings, Worker

ROOT = Path(__file__).parents[2]
PACKAGES = ("triton", "accelerate", "torchao", "nvidia-cudnn-frontend", "nvidia-cuda-crt", "nvidia-cuda-cccl")
ASKED = "name,driver_version,memory.total,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu"
TOLD = 3000  # characters of the tests' output


def card() -> str:
    """The GPU's name."""
    return torch.cuda.get_device_name() if DEVICE == "cuda" else "CPU"


def driver() -> str:
    """What nvidia-smi says of the GPU; empty where there is none."""
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        command = ["nvidia-smi", f"--query-gpu={ASKED}", "--format=csv"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return ""


def commit() -> str:
    """What the tree stands at; where it is a copy without history, what `make gpu-wheels` noted."""
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    noted = ROOT / ".whl" / "commit"
    return noted.read_text().strip() if noted.exists() else "unknown"


def machine(run: Run) -> Iterator[Case]:
    """Versions and tools, and whether the embedded model can be compiled here at all."""
    yield "what is here", tools
    yield "compiling spark", spark


def tools() -> Row:
    """Versions, and what a compiler would find."""
    named = {name: os.environ.get(name) for name in ("CUDA_HOME", "LIBRARY_PATH", "PYTHONPATH")}
    found = {name: shutil.which(name) for name in ("nvcc", "g++", "ptxas")}
    cudnn = torch.backends.cudnn.version() if DEVICE == "cuda" else None
    return {
        "cuda": torch.version.cuda,
        "cudnn": cudnn,
        **{name: str(value) for name, value in (named | found).items()},
        **{name: _version(name) for name in PACKAGES},
        "libcuda": "; ".join(libcuda()),
    }


def libcuda() -> list[str]:
    """Where the linker finds the driver's library, as ldconfig says; nothing where there is no ldconfig."""
    with contextlib.suppress(OSError):
        found = subprocess.run(["ldconfig", "-p"], capture_output=True, text=True, check=False)  # noqa: S607
        return [line.strip() for line in found.stdout.splitlines() if "libcuda.so" in line]
    return []


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def spark() -> Row:
    """Boot the embedded model as a worker that compiles; NotCompiledError if it serves eagerly."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:  # its last ledger may still be on the way
        settings = Settings(compile="on", volume=Path(folder), cold_start_budget_s=3600)
        worker = Worker.boot(settings, Clock(3600, publish=lambda ledger: None))
        if worker.ledger.plan != "COMPILED":
            raise NotCompiledError(worker.ledger.plan_reason)
        worker.publish(settings.volume)
    recipe = worker.spec.recipe(ImageRequest(prompt="a red circle", seed=1))
    phases = {f"{phase.name}_s": phase.seconds for phase in worker.ledger.phases}
    return {**timed(lambda: worker.generate(recipe)), **phases, "attention": worker.ledger.attention}


def tests(run: Run) -> Iterator[Case]:
    """The tests for a GPU."""
    for path in run.scale.tests:
        yield path, lambda path=path: tested(path, run.left)


def tested(path: str, seconds: float) -> Row:
    """Run one file of tests; RuntimeError with the end of what it said if it fails."""
    command = [sys.executable, "-m", "pytest", "-rs", "-p", "no:cacheprovider", path]
    done = subprocess.run(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=seconds, check=False
    )
    if done.returncode:
        raise RuntimeError(f"pytest ended with {done.returncode}\n{done.stdout[-TOLD:]}")
    return {"told": done.stdout[-TOLD:], "summary": done.stdout.strip().splitlines()[-1]}
