"""What `make quick` runs: the tests that need no model, no process and no compiler; and what holds them to it."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import handler.families

FILES = ()
HEAVY = ("spark", "server", "compiler", "boot")  # fixtures
BESIDES = ()  # tests of these files that need more, by name
STARTS = ("subprocess.Popen", "os.fork", "os.posix_spawn", "os.system")  # audit events of a new process
_running = False


def quick(item: Any) -> bool:
    """Whether a test is one of them."""
    return item.path.name in FILES and item.originalname not in BESIDES and not {*HEAVY} & {*item.fixturenames}


@contextmanager
def held() -> Iterator[None]:
    """While this lasts, who starts a process or loads a model fails."""
    global _running
    _running, build = True, handler.families.build
    handler.families.build = _refuse
    try:
        yield
    finally:
        _running, handler.families.build = False, build


def _refuse(*_: Any) -> Any:
    raise RuntimeError("a test of `make quick` loads a model: tests/quick.py has to name it")


def _hear(event: str, _: Any) -> None:
    if _running and event in STARTS:
        raise RuntimeError("a test of `make quick` starts a process: tests/quick.py has to name it")


sys.addaudithook(_hear)
