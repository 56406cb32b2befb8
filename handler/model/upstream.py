"""What is changed in a library while it is imported, at the versions that were looked at. Others are left alone.

transformers reads all files of its models, 70 MB in 3,400, when it is imported, and again when the first of them is.
The second time it finds what it kept of the first, were it not for the spelling of the folder's name.
"""

import contextlib
import importlib
from collections.abc import Iterator
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any

KNOWN = {"transformers": ("5.17.0", "5.23.0")}


def unknown() -> str:
    """Which library is of a version that was not looked at, and so is left alone; empty if none is."""
    found = {name: _version(name) for name in KNOWN}
    return "; ".join(f"{name} {found[name]} is not known" for name in KNOWN if found[name] not in KNOWN[name])


def transformers_models() -> ModuleType:
    """transformers' models, imported without being looked for twice, whoever asked first."""
    with _spelt_alike() if _version("transformers") in KNOWN["transformers"] else contextlib.nullcontext():
        return importlib.import_module("transformers.models")


@contextlib.contextmanager
def _spelt_alike() -> Iterator[None]:
    utils: Any = importlib.import_module("transformers.utils.import_utils")
    scan = utils.create_import_structure_from_path

    def alike(path: str) -> Any:
        """As `scan` has it: a folder's, or for a file those of its folder."""
        return scan(Path(path).parent if Path(path).is_file() else Path(path))

    utils.create_import_structure_from_path = alike
    try:
        yield
    finally:
        utils.create_import_structure_from_path = scan


@cache
def _version(name: str) -> str:
    with contextlib.suppress(PackageNotFoundError):
        return version(name)
    return "none"
