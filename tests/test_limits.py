"""No test can hang the others: what ends one that does, by name and with its stacks, and what it started."""

import gc
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

import handler.model.families
import quick
import threads

HANGS = """
import asyncio, subprocess, sys, threading
import pytest

@pytest.fixture
def child():
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        print(f"child {process.pid}")
        yield process
        process.kill()

def elsewhere(ever):
    ever.wait()

def test_waits(child):
    ever = threading.Event()
    threading.Thread(target=elsewhere, args=(ever,), daemon=True).start()
    ever.wait()

def test_loops():
    asyncio.run(asyncio.Event().wait())

def test_after():
    pass
"""
STUCK = """
def test_computes():
    sum(range(10**18))  # holds the GIL, and no signal is heard

def test_after():
    pass
"""


def run(folder: Path, code: str, *options: str) -> tuple[int, str]:
    """pytest on `code`, by this project's settings but for `options`; how it ended and what it said."""
    (folder / "test_hangs.py").write_text(code)
    command = [sys.executable, "-m", "pytest", "-c", str(ROOT / "pyproject.toml"), "--rootdir", ".", *options]
    out = subprocess.run(
        [*command, "-p", "no:cacheprovider", "test_hangs.py"], cwd=folder, capture_output=True, text=True, check=False
    )
    return out.returncode, out.stdout + out.stderr


def test_a_test_that_hangs_fails_by_name_with_all_stacks_and_its_processes_end(tmp_path: Path) -> None:
    code, told = run(tmp_path, HANGS, "-o", "timeout=1")
    assert code == 1, told
    assert "2 failed, 1 passed" in told
    assert "FAILED test_hangs.py::test_waits - Failed: Timeout" in told
    assert "FAILED test_hangs.py::test_loops - Failed: Timeout" in told
    assert "in elsewhere" in told  # the other thread's stack
    child = re.search(r"child (\d+)", told)
    assert child
    with pytest.raises(ProcessLookupError):
        os.kill(int(child[1]), 0)


def test_a_test_that_no_signal_reaches_ends_its_process_and_is_named(tmp_path: Path) -> None:
    code, told = run(tmp_path, STUCK, "-n", "1", "-o", "timeout=1", "-o", "faulthandler_timeout=2")
    assert code == 1, told
    assert "crashed while running 'test_hangs.py::test_computes'" in told
    assert "1 failed, 1 passed" in told
    assert "in test_computes" in told


def test_both_limits_hold_for_every_test(pytestconfig: pytest.Config) -> None:
    assert float(pytestconfig.getini("timeout")) <= 300
    assert float(pytestconfig.getini("faulthandler_timeout")) <= 600
    assert pytestconfig.getini("faulthandler_exit_on_timeout")


def test_a_quick_test_that_needs_more_fails() -> None:
    with quick.held():
        for start in (
            lambda: subprocess.run(["true"], check=True),
            os.fork,
            lambda: handler.model.families.build(None),
        ):
            with pytest.raises(RuntimeError, match=r"tests/quick\.py has to name it"):
                start()
    subprocess.run(["true"], check=True)


def test_every_quick_file_and_exception_is_there() -> None:
    texts = {name: next((ROOT / "tests").rglob(f"test_{name}.py")).read_text() for name in quick.FILES}
    assert all(any(f"def {test}(" in text for text in texts.values()) for test in quick.BESIDES)


def test_nothing_is_collected_while_threads_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else Python itself hangs, seldom, and no limit of a test ends that."""
    collects: list[bool] = []
    monkeypatch.setattr(sys, "_current_frames", lambda: collects.append(gc.isenabled()))
    threads.frames()
    assert (collects, gc.isenabled()) == ([False], True)
