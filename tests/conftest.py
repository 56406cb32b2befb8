"""Shared fixtures: a worker with spark in this process, and a real server process."""

import atexit
import gc
import importlib
import os
import shutil
import signal
import tempfile
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: two busy threads on two cores can be 20 times slower
for name in [name for name in os.environ if name.startswith("KINDLING_")]:
    del os.environ[name]
if "PYTHONPATH" in os.environ:  # another would be a reason for new interpreters, see forked.py
    os.environ["PYTHONPATH"] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
# What compiles for the tests: see tests/README.md.
HOME = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
os.environ.setdefault("REMEMBERED", os.path.join(HOME, "kindling-tests"))
os.environ["PATH"] = os.pathsep.join([os.path.join(os.path.dirname(__file__), "remembered"), os.environ["PATH"]])
os.environ["AOT_INDUCTOR_COMPILE_WRAPPER_OPT_LEVEL"] = "O0"  # of the code that calls the kernels, made in a third
# The default volume, empty as on a new machine.
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="kindling-tests-")
atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import pytest

import forked
import quick
from handler import Settings, Worker
from handler.core import birth
from handler.model import imports
from handler.volume import pages
from serving import Served, serving

pytest_plugins = ("browsing",)  # its fixtures
# Every client that says nothing else gives up after 5 s, which an answer on a busy machine may take.
HASTE = httpx._config.DEFAULT_TIMEOUT_CONFIG
HASTE.connect = HASTE.read = HASTE.write = HASTE.pool = 60.0
httpx._transports.default.create_ssl_context = cache(httpx.create_ssl_context)  # all of them trust the same
ROOT = Path(__file__).parent.parent
PATIENT = Settings(cold_start_budget_s=3600)  # as long as it takes on a busy machine
LONG = (  # files that take longest, in this order: begun last, one of them would run alone
    *("openapi", "families", "cli", "runpod_worker", "quant", "gpu_run", "guides", "modal_deploy", "cold_start"),
    *("optimize", "edits", "compiled", "stepcache", "workflows_tab", "playground_page", "fusing", "bake", "worker_tab"),
    *("making", "autoencoders", "faults", "images", "transports", "rounding", "offload", "waits", "adapters", "single"),
    *("compiled_ranks", "latency", "batching", "toolchain", "imports", "ranks", "connections", "box", "deadlines"),
    *("recipe", "unread", "rollout", "refusals", "footprint", "upstream", "front", "probes", "bombs", "fleet"),
)


def pytest_addoption(parser: pytest.Parser) -> None:
    """`make quick` is the one, `make judge` the other."""
    parser.addoption("--quick", action="store_true", help="only tests that need no model, no process and no compiler")
    parser.addoption("--judge", action="store_true", help="only those that are left out otherwise, for they take long")


def pytest_sessionstart(session: pytest.Session) -> None:
    """Import what draws, as a worker does: once, before warnings are errors. Who only hands out tests has no need."""
    if hasattr(session.config, "workerinput") or not session.config.getoption("numprocesses", 0):
        with imports.uncollected(), imports.lean():
            importlib.import_module("handler.model.families.flux")
            importlib.import_module("torch._dynamo")  # some test compiles
        imports._frozen = cache(imports._frozen)  # it stays so; to count it anew is 0.1 s of each start, of 0.2 s


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[object]:
    """Ten thousand tests come to stay: the garbage collector looks through them neither meanwhile nor ever after."""
    gc.disable()
    found = yield
    gc.freeze()
    gc.enable()
    return found


@pytest.hookimpl(trylast=True)  # after what shuffles
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The longest files first; `--quick` leaves most out, and without `--judge` what takes longest is."""
    rank = {f"test_{name}.py": place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: rank.get(item.path.name, len(LONG)))
    _keep(config, items, lambda item: bool(item.get_closest_marker("judge")) is config.option.judge)
    if config.option.quick:
        _keep(config, items, quick.quick)


def _keep(config: pytest.Config, items: list[pytest.Item], wanted: Callable[[pytest.Item], bool]) -> None:
    """Deselect all but the `wanted`."""
    config.hook.pytest_deselected(items=[item for item in items if not wanted(item)])
    items[:] = filter(wanted, items)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """A quick test stays one. And its process is born as it begins: budgets of starts count from there."""
    began = time.monotonic()
    birth.process_age = lambda: time.monotonic() - began
    with quick.held() if item.config.option.quick else nullcontext():
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[None]:
    """What a file's tests leave in the environment ends with the file, its fixtures' too; what they imported stays.

    So the collector, which each worker that is closed calls, looks through it no more.
    """
    try:
        yield
    finally:
        if nextitem is None or nextitem.path != item.path:
            forked.restore()
            gc.collect()
            gc.freeze()


@contextmanager
def unwarmed() -> Iterator[None]:
    """Workers booted meanwhile draw no warm-up picture, one of full size: for tests of what they draw later."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Worker, "_warm", lambda *_: None)
        yield


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C and a closed terminal are heard, here and in what is started here, in the background and by nohup too."""
    heard = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in heard.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def read_by_nobody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody else reads what this process reads, whatever a test before it has begun here."""
    monkeypatch.setattr(pages, "_shared", False)


@pytest.fixture(scope="session")
def spark() -> Worker:
    """The embedded model, loaded in this process."""
    return Worker.boot(PATIENT)


@pytest.fixture
def family() -> Any:
    """A model that paints without one."""
    from fakes import FakeFamily

    return FakeFamily()


@pytest.fixture(scope="session")
def compiler() -> None:
    """What Inductor calls for code that runs on a CPU; running such code needs none."""
    if not shutil.which("g++"):
        pytest.skip("compiling for a CPU needs g++, which is not installed here")


@pytest.fixture(scope="session")
def server() -> Iterator[Served]:
    """A real server process with spark, shared by all tests that leave it healthy; each picture is drawn alone."""
    with serving({"KINDLING_BATCH": "1"}, anew=True) as served:
        yield served
