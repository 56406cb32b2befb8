"""How what draws is imported: torch, diffusers and transformers, and not what they would load beside it for nobody.

Nothing of theirs is changed, and whoever wants what was left out gets it, the real one, by importing or using it. But
diffusers and transformers remember that they found no torchao and no gguf: a program whose own models they shall round
or read with it, or that imports it meanwhile on another thread, imports it first.
"""

import contextlib
import gc
import importlib
import importlib.util
import os
import sys
import threading
from collections.abc import Iterator
from types import ModuleType
from typing import Any

HIDDEN = ("torchao", "gguf")  # they ask once whether it is there, and load it if so; for weights it is loaded later
# They import these modules wherever they are installed, and of them these functions by name.
LATE: dict[str, tuple[str, ...]] = {
    "boto3": (),  # accelerate, to configure SageMaker
    "scipy.integrate": (),  # diffusers, for a scheduler that no model of ours has
    "scipy.optimize": ("linear_sum_assignment",),  # transformers, for losses of training
    "scipy.stats": (),  # diffusers, for schedules that no request can ask for
}
WAITS = "OMP_WAIT_POLICY"
PYTHONS = 1_000  # objects that Python itself may have frozen: 3.12 has 375
_ONE = threading.Lock()


class Late(ModuleType):
    """Stands for an installed module while others import it, and gives way to it at the first use."""

    def __getattr__(self, name: str) -> Any:
        if name in LATE[self.__name__] and sys.modules.get(self.__name__) is self:
            return lambda *args, **kwargs: getattr(self._real(), name)(*args, **kwargs)
        return getattr(self._real(), name)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if isinstance(value, ModuleType):  # a part of it has been imported
            setattr(self._real(), name, value)

    def _real(self) -> ModuleType:
        _withdraw(self.__name__, self)
        return importlib.import_module(self.__name__)


@contextlib.contextmanager
def lean() -> Iterator[None]:
    """Around the first import of diffusers and transformers: they find nothing of `HIDDEN`, and use none of `LATE`."""
    asked = {"diffusers", "transformers"} & sys.modules.keys()
    hidden = [name for name in HIDDEN if not asked and name not in sys.modules]
    made: dict[str, Any] = dict.fromkeys(hidden)  # None is Python's own sign: cannot be imported
    made |= {name: late for name in LATE if (late := _late(name))}
    for name, ours in made.items():
        sys.modules.setdefault(name, ours)
    try:
        with yielding():
            yield
    finally:
        for name, ours in made.items():
            _withdraw(name, ours)


@contextlib.contextmanager
def yielding() -> Iterator[None]:
    """Around the first import of torch: its threads that wait for one another leave their cores to whoever needs them.

    OpenMP's would spin for milliseconds, on a core that the one they wait for may want: beside anything else that runs
    a picture would take many times as long. They read this as they are loaded. Whoever has said otherwise is obeyed.
    """
    if WAITS in os.environ:
        yield
        return
    os.environ[WAITS] = "passive"
    try:
        yield
    finally:
        del os.environ[WAITS]


def _withdraw(name: str, ours: Late | None) -> None:
    with _ONE:  # else another thread's import of the real one could be taken away
        if sys.modules.get(name) is ours:
            sys.modules.pop(name, None)


def _late(name: str) -> Late | None:
    """In the place of a module that is installed and not imported yet."""
    with contextlib.suppress(ImportError):
        if name not in sys.modules and (spec := importlib.util.find_spec(name)):
            late = Late(name)  # the rest is for who only looks whether it is there, or through all modules
            late.__spec__, late.__file__, late.__path__ = spec, spec.origin, spec.submodule_search_locations or []
            return late
    return None


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """No garbage collection meanwhile: half a million objects come to stay. None looks at these until `thawed` ends."""
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        if not _frozen():
            gc.freeze()
        gc.enable()


@contextlib.contextmanager
def thawed() -> Iterator[None]:
    """Around a start with `uncollected` in it: at its end nothing is frozen that was not before.

    A process that is the worker's own freezes again what it has then, with `gc.freeze`, and spares itself 0.3 s later.
    """
    frozen = _frozen()
    try:
        yield
    finally:
        if not frozen:
            gc.unfreeze()


def _frozen() -> bool:
    return gc.get_freeze_count() > PYTHONS
