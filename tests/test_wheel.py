"""The wheel: what is in it, and that it draws where nothing else of this repository is."""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
import setuptools

from handler.core.version import __version__

ROOT = Path(__file__).parents[1]
BUILD = (
    "import sys; sys.path.insert(0, sys.argv[1]);"
    "from setuptools.build_meta import build_wheel; print('made', build_wheel(sys.argv[2]))"
)
NEEDED = ("pyproject.toml", "requirements.txt", "LICENSE", "handler", "platform", "spark")


def tracked(*paths: str) -> list[str]:
    listed = subprocess.run(["git", "ls-files", *paths], cwd=ROOT, capture_output=True, text=True, check=True)
    return listed.stdout.splitlines()


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built by setuptools alone, as pip builds it in an environment of its own: not even pydantic is there."""
    source, tools, made = (tmp_path_factory.mktemp(name) for name in ("source", "tools", "made"))
    for name in tracked(*NEEDED):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name, follow_symlinks=False)
    packages = Path(setuptools.__file__).parents[1]
    for path in (packages / "_distutils_hack", *packages.glob("setuptools*")):
        (tools / path.name).symlink_to(path)
    command = [sys.executable, "-I", "-S", "-c", BUILD, str(tools), str(made)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return made / f"kindling-{__version__}-py3-none-any.whl"


@pytest.fixture(scope="session")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with that wheel, and beside it what it needs: this one's packages, but no editable install."""
    home = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", home], check=True)
    python = home / "bin/python"
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--no-deps", "--no-index"]
    done = subprocess.run([*install, "--disable-pip-version-check", wheel], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    [packages] = home.glob("lib/python*/site-packages")
    (packages / "needed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return home


def test_the_wheel_has_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        manifest = archive.read("handler/api/deploying/sky.yml")
        [metadata] = [archive.read(name).decode() for name in names if name.endswith("/METADATA")]
    inside = {name for name in names if not name.startswith(f"kindling-{__version__}.dist-info/")}
    assert inside == set(tracked("handler"))
    assert {"handler/py.typed", "handler/weights/spark/model_index.json"} <= inside
    assert manifest == (ROOT / "platform/sky.yml").read_bytes()
    pinned = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if not line.startswith("#")]
    assert metadata.count("\nRequires-Dist: ") >= len(pinned)
    assert f"\nVersion: {__version__}\n" in metadata


def run(installed: Path, folder: Path, *command: str) -> str:
    """One command of that environment's; what it prints."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("KINDLING_", "PYTHON"))}
    line = [str(installed / "bin" / command[0]), *command[1:]]
    done = subprocess.run(line, cwd=folder, env=kept, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_installed_it_draws_from_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    where = "import handler, importlib.util as u; print(handler.__file__, u.find_spec('spark'))"
    [packages] = installed.glob("lib/*/site-packages")
    assert run(installed, tmp_path, "python", "-c", where).split() == [str(packages / "handler/__init__.py"), "None"]
    run(installed, tmp_path, "kindling", "generate", "a red circle on a blue background", "--size", "64x64")
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


def test_benchmarks_find_sparks_recipe_beside_them(installed: Path, tmp_path: Path) -> None:
    assert "--quick" in run(installed, tmp_path, "python", str(ROOT / "benchmarks/quality.py"), "--help")
