"""torch's compiler waits until something compiles: it and sympy take as long to import as torch itself.

Libraries want it while they are imported to mark functions and classes of their own for it. The marks are noted, and
it gets them all when it comes, before anybody sees it: it compiles then as if it had always been there. A function
that it shall never compile is called as it is until then, for nobody compiles.
"""

import functools
import importlib
import sys
import threading
from collections.abc import Callable
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import FunctionType, ModuleType
from typing import Any

from handler.model.late import Late, changing, late, withdraw

DYNAMO, INDUCTOR = "torch._dynamo", "torch._inductor"
ALONE = {  # parts that are wanted before, and that want no others
    DYNAMO: ("_trace_wrapped_higher_order_op",),  # by transformers
    INDUCTOR: ("config", "custom_graph_pass"),  # by the fingerprints of what was compiled
}
_ONE = threading.RLock()
_notes: list[Callable[[Any], None]] = []
_there: list[ModuleType] = []


def waiting() -> Late | None:
    """What stands for torch._dynamo while libraries are imported; none if it is there already."""
    if made := _late(DYNAMO):
        made.allow_in_graph, made.disable = functools.partial(_marked, "allow_in_graph"), _disable
        made.assume_constant_result = functools.partial(_marked, "assume_constant_result")
    return made


def settings() -> Any:
    """torch._inductor.config, without the rest."""
    if ours := _late(INDUCTOR):
        sys.modules.setdefault(INDUCTOR, ours)
    try:
        return importlib.import_module(f"{INDUCTOR}.config")
    finally:
        if ours:
            withdraw(INDUCTOR, ours)


def is_compiled_module(module: Any) -> bool:
    """As diffusers has it, without importing the compiler to ask whether it made this."""
    kind = getattr(sys.modules.get(f"{DYNAMO}.eval_frame"), "OptimizedModule", ())
    return isinstance(module, kind)


def lru_cache_unless_export(maxsize: int = 128, typed: bool = False) -> Callable[[Callable[..., Any]], Any]:
    """As diffusers has it, without importing the compiler to ask whether it is at work."""

    def cached(function: Callable[..., Any]) -> Callable[..., Any]:
        keeping = functools.lru_cache(maxsize=maxsize, typed=typed)(function)

        @functools.wraps(function)
        def either(*args: Any, **kwargs: Any) -> Any:
            compiler = sys.modules["torch"].compiler
            traced = compiler.is_exporting() or compiler.is_compiling()
            return (function if traced else keeping)(*args, **kwargs)

        return either

    return cached


def _late(name: str) -> Late | None:
    if not any(isinstance(finder, _Arrival) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Arrival())
    return late(name, alone=ALONE[name])


def _marked(name: str, what: Any) -> Any:
    _note(lambda dynamo: getattr(dynamo, name)(what))
    return what


def _disable(function: Any = None, recursive: bool = True, *, reason: str | None = None) -> Any:
    """As torch._dynamo has it, for functions."""
    if function is None:
        return functools.partial(_disable, recursive=recursive, reason=reason)
    if type(function) is not FunctionType:
        dynamo: Any = importlib.import_module(DYNAMO)
        return (dynamo.real() if isinstance(dynamo, Late) else dynamo).disable(function, recursive, reason=reason)
    run = function

    @functools.wraps(function)
    def either(*args: Any, **kwargs: Any) -> Any:
        return run(*args, **kwargs)

    def note(dynamo: Any) -> None:
        nonlocal run
        run = dynamo.disable(function, recursive, reason=reason)
        vars(either).update(vars(run), _torchdynamo_wrapper_id=id(either))

    _note(note)
    return either


def _note(note: Callable[[Any], None]) -> None:
    with _ONE:
        if _there:
            note(_there[0])
        else:
            _notes.append(note)


def _tell(dynamo: ModuleType) -> None:
    with _ONE:
        _there[:] = [dynamo]
        while _notes:
            _notes.pop(0)(dynamo)


class _Arrival(MetaPathFinder):
    """Gives what comes its parts that were there before it, and torch._dynamo what was noted, whoever imports it."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name in ALONE:
            found = PathFinder.find_spec(name, path, target)
            return changing(found, _tell if name == DYNAMO else None, _joined)
        package, _, part = name.rpartition(".")
        stand_in = sys.modules.get(package) if package in ALONE and part not in ALONE[package] else None
        return ModuleSpec(name, _Part(stand_in)) if isinstance(stand_in, Late) else None


class _Part(Loader):
    """A part of what a stand-in stands for, which gives way to all of it first."""

    def __init__(self, stand_in: Late) -> None:
        self._stand_in = stand_in

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        self._stand_in.real()
        module = importlib.import_module(spec.name)
        self._spec = module.__spec__  # which Python replaces by this one
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self._spec


def _joined(package: ModuleType) -> None:
    for part in ALONE[package.__name__]:
        if module := sys.modules.get(f"{package.__name__}.{part}"):
            setattr(package, part, module)
