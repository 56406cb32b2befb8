"""How what draws is imported: torch, diffusers and transformers, and not what they would load beside it for nobody.

What of theirs is changed meanwhile `upstream.py` says. Whoever wants what was left out gets it, the real one, by
importing or using it. But diffusers and transformers remember that they found no torchao and no gguf: a program whose
own models they shall round or read with it, or that imports it meanwhile on another thread, imports it first.
"""

import contextlib
import gc
import os
import sys
from collections.abc import Iterator
from typing import Any

from handler.model import compiler, upstream
from handler.model.late import late, withdraw

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


@contextlib.contextmanager
def lean() -> Iterator[None]:
    """Around the first import of diffusers and transformers: they find nothing of `HIDDEN`, and use none of `LATE`."""
    with yielding():  # also for `_left_out`, which finds parts of torch by importing it
        made = _left_out()
        for name, ours in made.items():
            sys.modules.setdefault(name, ours)
        try:
            with upstream.changed():
                yield
        finally:
            for name, ours in made.items():
                withdraw(name, ours)


def _left_out() -> dict[str, Any]:
    """What stands for each module; None is Python's own sign: cannot be imported."""
    asked = {"diffusers", "transformers"} & sys.modules.keys()
    made: dict[str, Any] = {name: None for name in HIDDEN if not asked and name not in sys.modules}
    made |= {name: ours for name in LATE if (ours := late(name, LATE[name]))}
    if upstream.taken("dynamo") and (ours := compiler.waiting()):
        made[compiler.DYNAMO] = ours
    return made


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
