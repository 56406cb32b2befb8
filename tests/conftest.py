"""Shared fixtures: a worker with spark in this process, and a real server process."""

import atexit
import os
import shutil
import tempfile

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: two busy threads on two cores can be 20 times slower
for name in [name for name in os.environ if name.startswith("KINDLING_")]:
    del os.environ[name]
# The default volume, empty as on a new machine.
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="kindling-tests-")
atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)

from handler import rounding

with rounding.hidden():  # as a worker imports them
    import handler.families.flux  # noqa: F401

from collections.abc import Iterator
from pathlib import Path

import pytest

from fakes import FakeFamily
from handler import Settings, Worker
from serving import Served, serving

ROOT = Path(__file__).parent.parent
PATIENT = Settings(cold_start_budget_s=3600)  # the budget counts from the birth of the test process


@pytest.fixture(scope="session")
def spark() -> Worker:
    """The embedded model, loaded in this process."""
    return Worker.boot(PATIENT)


@pytest.fixture
def family() -> FakeFamily:
    """A model that paints without one."""
    return FakeFamily()


@pytest.fixture(scope="session")
def compiler() -> None:
    """What Inductor calls for code that runs on a CPU; running such code needs none."""
    if not shutil.which("g++"):
        pytest.skip("compiling for a CPU needs g++, which is not installed here")


@pytest.fixture(scope="session")
def server() -> Iterator[Served]:
    """A real server process with spark, shared by all tests that leave it healthy."""
    with serving() as served:
        yield served
