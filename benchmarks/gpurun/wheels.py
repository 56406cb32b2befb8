"""Wheels for a lent GPU machine that reaches no package index: what its Python lacks, into .whl, which git ignores.

That machine has torch 2.11 for CUDA 13.0, transformers, accelerate and their needs for Python 3.12. Versions are those
that requirements.txt and pyproject.toml name, where they do. The wheels travel with the working tree, which may weigh
64 MiB in all, and with the commit it stands at: the copy there has no history to ask.

    make gpu-wheels
"""

import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / ".whl"
MOST = 64 << 20  # bytes that travel
TARGET = ["--only-binary=:all:", "--python-version", "3.12", "--implementation", "cp"]
GLIBC = ("2_34", "2_28", "2_27", "2_24", "2_17")  # pip takes each for itself alone
PLATFORMS = [f"--platform=manylinux_{version}_x86_64" for version in GLIBC]
WHOLE = ("pydantic", "importlib-metadata")  # with what they need: they pin it, or it is as rare
SERVER = ("starlette", "uvicorn", "python-multipart")
ALONE = ("diffusers", "isal", "cache-dit", "torchao", "nvidia-cudnn-frontend", *SERVER)
NVIDIA = (  # CUDA 13.0's headers, all in one folder
    "nvidia-cuda-runtime==13.0.*",
    "nvidia-cuda-crt==13.0.*",
    "nvidia-cuda-cccl==13.0.*",
)


def main() -> int:
    """Fetch what is missing, say what it weighs; 1 if that is too much."""
    shutil.rmtree(FOLDER, ignore_errors=True)  # of two versions of one package pip would install none
    FOLDER.mkdir()
    pins = named()
    fetch([], [f"{name}{pins.get(name, '')}" for name in WHOLE])
    fetch(["--no-deps"], [*(f"{name}{pins.get(name, '')}" for name in ALONE), *NVIDIA])
    (FOLDER / "commit").write_text(commit() + "\n")
    wheels, tree = weight(FOLDER.glob("*")), weight(ROOT / name for name in travelling())
    print(f"{FOLDER}: {wheels / 2**20:.1f} MiB; with the tree {(wheels + tree) / 2**20:.1f} of {MOST >> 20} MiB")
    return int(wheels + tree > MOST)


def named() -> dict[str, str]:
    """The versions that requirements.txt and pyproject.toml pin, such as "==1.9.1", by normal names."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    lines += [line for extra in project["optional-dependencies"].values() for line in extra]
    found = [re.fullmatch(r"([A-Za-z0-9._-]+)(==[^\s;#]+).*", line) for line in lines]
    return {match[1].lower().replace("_", "-"): match[2] for match in found if match}


def fetch(how: list[str], wanted: list[str]) -> None:
    """Download wheels."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check", *how, *TARGET, *PLATFORMS]
    subprocess.run([*command, "--dest", FOLDER, *wanted], check=True)


def commit() -> str:
    """What the tree stands at, and whether it differs from that."""
    return git("describe", "--always", "--dirty", "--abbrev=12")


def travelling() -> list[str]:
    """The files of the tree that travel: those git knows, and those it does not ignore."""
    return git("ls-files", "--cached", "--others", "--exclude-standard").splitlines()


def git(*words: str) -> str:
    return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()  # noqa: S607


def weight(paths: Iterable[Path]) -> int:
    """Bytes of all that are there."""
    return sum(path.stat().st_size for path in paths if path.is_file())


if __name__ == "__main__":
    sys.exit(main())
