"""What is changed in libraries while they are imported, at the versions that were looked at. Others are left alone.

Each measure needs a known version of all that it concerns. All is put back afterwards but for the two functions of
`compiler.py` that do what diffusers' own do.
"""

import contextlib
import importlib.metadata
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from functools import cache, cached_property
from types import ModuleType
from typing import Any

from handler.model import compiler, structure
from handler.model.late import After

KNOWN = {"torch": ("2.11.0", "2.13.0"), "transformers": ("5.17.0", "5.23.0"), "diffusers": ("0.42.1",)}
MEASURES: dict[str, tuple[str, ...]] = {  # with the libraries that each concerns
    "structure": ("transformers",),  # transformers does not look through its models
    "distributions": ("transformers", "diffusers"),  # what distribution a package is of is asked when it matters
    "dynamo": ("torch", "transformers", "diffusers"),  # torch's compiler waits until something compiles
    "distributed": ("torch", "transformers", "diffusers"),  # of a process that works on one GPU, no part for several
}
_ONE = threading.Lock()
_undo = contextlib.ExitStack()
_inside = 0  # how many are in `changed`
_alone = False


def dedicated() -> None:
    """This process is a worker's own: nobody in it wants the libraries to share work among several GPUs."""
    global _alone
    _alone = True


def shared() -> None:
    """It is not: other processes draw with it, on GPUs of their own."""
    global _alone
    _alone = False


def unknown() -> str:
    """Which libraries are of versions that were not looked at, and so are left alone; empty if none is."""
    return "; ".join(f"{name} {_version(name)} is not known" for name in KNOWN if not _known(name))


def taken(measure: str) -> bool:
    """Whether all that it concerns is known."""
    return measure in MEASURES and all(map(_known, MEASURES[measure]))


def inductor() -> Any:
    """Inductor's settings, a module: it alone where torch is known, for Inductor itself brings all of the compiler."""
    return compiler.settings() if taken("dynamo") else importlib.import_module("torch._inductor.config")


@contextlib.contextmanager
def changed() -> Iterator[None]:
    """Around imports, of several threads too, and in one another: what was changed is as before when the last ends."""
    global _inside
    if _alone:
        importlib.import_module("torch.distributed")
    try:
        with _ONE:
            _inside += 1
            if _inside == 1:
                _change()
        yield
    finally:
        with _ONE:
            _inside -= 1
            if not _inside:
                _undo.close()


def _change() -> None:
    if taken("structure"):
        _after("transformers.utils.import_utils", _keep)
    if taken("dynamo"):
        _after("diffusers.utils.torch_utils", _wait)
    if taken("distributions"):
        _replace(importlib.metadata, "packages_distributions", Distributions)
    if _alone and taken("distributed"):
        _replace(sys.modules["torch.distributed"], "is_available", lambda: False)


def _keep(utils: Any) -> None:
    theirs = utils.define_import_structure
    _replace(utils, "define_import_structure", structure.kept(theirs, _version("transformers")))


def _wait(utils: Any) -> None:
    utils.is_compiled_module = compiler.is_compiled_module
    utils.lru_cache_unless_export = compiler.lru_cache_unless_export


class Distributions(Mapping[str, list[str]]):
    """What `importlib.metadata.packages_distributions` says, asked when somebody looks: it reads much."""

    _ask = staticmethod(importlib.metadata.packages_distributions)

    @cached_property
    def _found(self) -> Mapping[str, list[str]]:
        return self._ask()

    def __getitem__(self, name: str) -> list[str]:
        return self._found[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)


def _replace(module: Any, name: str, ours: Any) -> None:
    _undo.callback(setattr, module, name, getattr(module, name))
    setattr(module, name, ours)


def _after(name: str, change: Callable[[ModuleType], None]) -> None:
    """Change a module when it has been imported, before anybody sees it."""
    if module := sys.modules.get(name):
        change(module)
    else:
        sys.meta_path.insert(0, finder := After(name, change))
        _undo.callback(sys.meta_path.remove, finder)


def _known(name: str) -> bool:
    return _version(name).partition("+")[0] in KNOWN.get(name, ())


@cache
def _version(name: str) -> str:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(name)
    return "none"
