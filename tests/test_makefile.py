"""Which build of torch `make` installs: said before it is downloaded, and decided by the driver or by who asks."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TORCH = next(line for line in (ROOT / "requirements.txt").read_text().splitlines() if line.startswith("torch=="))
VERSION = TORCH.removeprefix("torch==")
CPU, CUDA, INDEX = f"{TORCH}+cpu", f"torch==={VERSION}", "--extra-index-url https://download.pytorch.org/whl/cpu"
# In pip's place: notes what it is asked for, and knows of none of what `pip.lacks` has a part of.
PIP = """#!/bin/sh
echo "$*" >> pip.asked
while read -r part; do case "$*" in *"$part"*) exit 1;; esac; done < pip.lacks
"""


MAKES = ("TORCH", "MAKEFLAGS", "MFLAGS", "MAKELEVEL")  # what `make test` gives those below it


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder with what setting up reads, where pip installs nothing; its environment is empty."""
    for name in ("Makefile", "requirements.txt", "pyproject.toml", "platform"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / ".venv").mkdir()
    (tmp_path / "pip.lacks").touch()
    (tmp_path / "pip").write_text(PIP)
    (tmp_path / "pip").chmod(0o755)
    return tmp_path


def installed(checkout: Path, name: str) -> None:
    """As pip leaves it."""
    (checkout / f".venv/lib/python3.11/site-packages/{name}.dist-info").mkdir(parents=True)


def make(checkout: Path, *words: str, driver: str = "") -> subprocess.CompletedProcess[str]:
    command = ["make", ".venv/run", "PYTHON=true", "PIP=./pip", f"DRIVER={driver}", *words]
    environ = {name: value for name, value in os.environ.items() if name not in MAKES}
    return subprocess.run(command, cwd=checkout, env=environ, capture_output=True, text=True)


def asked(checkout: Path) -> Iterator[str]:
    """What pip was asked for, torch's own packages aside, in turn; forgotten then."""
    for line in (checkout / "pip.asked").read_text().splitlines():
        if "-e ." not in line:
            yield line.replace("-c .venv/versions ", "").removeprefix("-q ")
    (checkout / "pip.asked").unlink()


@pytest.mark.parametrize(
    ("words", "driver", "wanted", "told"),
    [
        ((), "", CPU, ('torch for CPUs, 0.2 GB. With an NVIDIA GPU, "make TORCH=cuda" takes', "2.7 GB")),
        ((), "/proc/driver/nvidia/version", CUDA, ("torch for CUDA, 2.7 GB to download", '"make TORCH=cpu" takes')),
        (("TORCH=cuda",), "", CUDA, ("2.7 GB",)),
        (("TORCH=cpu",), "/dev/nvidiactl", CPU, ("0.2 GB",)),
        (("TORCH=",), "", CPU, ("torch for CPUs, 0.2 GB",)),
        (("TORCH= cuda ",), "", CUDA, ("2.7 GB",)),
    ],
    ids=["no driver", "a driver", "CUDA was asked for", "CPUs were asked for", "nothing was asked for", "spaces"],
)
def test_which_build_and_what_is_said_before(
    checkout: Path, words: tuple[str, ...], driver: str, wanted: str, told: tuple[str, ...]
) -> None:
    done = make(checkout, *words, driver=driver)
    assert done.returncode == 0, done.stderr
    assert [*asked(checkout)] == [wanted]
    first, *_ = done.stdout.splitlines()
    assert all(part in first for part in told), first


def test_torchs_index_is_asked_only_for_what_is_nowhere_else(checkout: Path) -> None:
    (checkout / "pip.lacks").write_text("versions torch\n")
    assert make(checkout).returncode == 0
    assert [*asked(checkout)] == [CPU, f"{INDEX} {CPU}"]


def test_where_there_is_none_for_cpus_the_other_is_named_and_not_taken(checkout: Path) -> None:
    (checkout / "pip.lacks").write_text("+cpu\n")
    done = make(checkout)
    assert done.returncode
    assert '"make TORCH=cuda" takes the one of PyPI, 2.7 GB' in done.stdout
    assert [*asked(checkout)] == [CPU, f"{INDEX} {CPU}"]
    assert not (checkout / ".venv/run").exists()


@pytest.mark.parametrize(
    ("has", "driver", "kept", "other"),
    [
        (f"torch-{VERSION}+cpu", "/dev/nvidiactl", CPU, "cuda"),
        (f"torch-{VERSION}", "", CUDA, "cpu"),
        (f"torch-{VERSION}+cu126", "", "torch", "cpu"),  # pip has the one that is there, by its constraint
        ("torch-2.0.0+cu118", "", CUDA, "cpu"),
    ],
    ids=["for CPUs", "for CUDA", "for another CUDA", "for another CUDA, of another version"],
)
def test_an_environment_keeps_its_build_until_another_is_asked_for(
    checkout: Path, has: str, driver: str, kept: str, other: str
) -> None:
    installed(checkout, has)
    make(checkout, driver=driver)
    assert [*asked(checkout)] == [kept]
    assert "is up to date" in make(checkout, driver=driver).stdout
    make(checkout, f"TORCH={other}", driver=driver)
    assert [*asked(checkout)] == [CUDA if other == "cuda" else CPU]


@pytest.mark.parametrize("word", ["2.3.0", "cpu cuda", "/opt/torch"])
def test_a_word_that_names_no_build_is_refused(checkout: Path, word: str) -> None:
    done = make(checkout, f"TORCH={word}")
    assert done.returncode
    assert f"TORCH={word} should be cpu or cuda" in done.stderr
