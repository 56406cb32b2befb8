"""Modules that are imported at their first use, whoever asked for them before, and some that change as they come."""

import contextlib
import importlib
import importlib.util
import sys
import threading
from collections.abc import Callable, Collection
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

_ONE = threading.Lock()


class Late(ModuleType):
    """Stands for an installed module while others import it, and gives way to it at the first use.

    Of its `functions` importing them by name is no use yet, calling them is. Its parts that work `alone` are none.
    """

    def __init__(self, name: str, functions: Collection[str] = (), alone: Collection[str] = ()) -> None:
        super().__init__(name)
        self._functions, self._alone = functions, alone

    def __getattr__(self, name: str) -> Any:
        if name in self._functions and sys.modules.get(self.__name__) is self:
            return lambda *args, **kwargs: getattr(self.real(), name)(*args, **kwargs)
        return getattr(self.real(), name)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if isinstance(value, ModuleType) and name not in self._alone:  # a part of it has been imported
            setattr(self.real(), name, value)

    def real(self) -> ModuleType:
        """The module that it stands for, from now on for everybody."""
        withdraw(self.__name__, self)
        return importlib.import_module(self.__name__)


def withdraw(name: str, ours: Late | None) -> None:
    """Whoever imports `name` from now on gets the real one."""
    with _ONE:  # else another thread's import of the real one could be taken away
        if sys.modules.get(name) is ours:
            sys.modules.pop(name, None)


def late(name: str, functions: Collection[str] = (), alone: Collection[str] = ()) -> Late | None:
    """In the place of a module that is installed and not imported yet; none if there is no such module."""
    with contextlib.suppress(ImportError):
        if name not in sys.modules and (spec := importlib.util.find_spec(name)):
            made = Late(name, functions, alone)
            # For who only looks whether it is there, or through all modules.
            made.__spec__, made.__file__, made.__path__ = spec, spec.origin, spec.submodule_search_locations or []
            return made
    return None


class After(MetaPathFinder):
    """Lets a module be found as it would be, and changed once it has run."""

    def __init__(self, name: str, change: Callable[[ModuleType], None]) -> None:
        self._name, self._change = name, change

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """Where `name` is, if it is the module to be changed."""
        return changing(PathFinder.find_spec(name, path, target), self._change) if name == self._name else None


def changing(
    spec: ModuleSpec | None,
    after: Callable[[ModuleType], None] | None,
    before: Callable[[ModuleType], None] | None = None,
) -> ModuleSpec | None:
    """`spec`, whose module is changed before and after it runs."""
    if spec and spec.loader:
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            for step in (before, execute, after):
                if step:
                    step(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
    return spec
