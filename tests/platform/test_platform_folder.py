"""Our folder `platform/` must never shadow Python's own module of that name."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_stdlib_platform_wins() -> None:
    code = "import platform, uuid; print(platform.python_version()); print(platform.__file__)"
    for environ in ({}, {"PYTHONPATH": "."}):
        out = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, env=environ, capture_output=True, text=True, check=True
        ).stdout.split()
        assert out[0] == ".".join(map(str, sys.version_info[:3]))
        assert not out[1].startswith(str(ROOT / "platform"))


def test_folder_is_no_package_and_shadows_no_sdk() -> None:
    names = {path.stem for path in (ROOT / "platform").iterdir()}
    assert not names & {"__init__", "runpod", "modal", "fal", "types", "platform"}
