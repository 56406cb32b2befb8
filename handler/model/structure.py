"""What transformers finds in the files of its models when it is imported: which names are where, and what they need.

It reads all of them for it, 70 MB in 3,400, twice. So what it found is kept where Python keeps byte code: whoever may
write there may change the code itself, an image has it from when it was built, and it goes with the environment. Where
nobody may write there, it reads them once.
"""

import json
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from importlib.machinery import SourceFileLoader
from importlib.util import cache_from_source
from pathlib import Path

Structure = dict[frozenset[str], dict[str, set[str]]]  # needs -> module -> names


def kept(scan: Callable[..., Structure], version: str) -> Callable[..., Structure]:
    """transformers' `define_import_structure`, but that `scan` looks into all models' files once and never again."""

    def define_import_structure(module_path: str | Path, prefix: str | None = None) -> Structure:
        folder = Path(module_path) if Path(module_path).is_dir() else Path(module_path).parent
        if (folder.parent.name, folder.name) != ("transformers", "models"):
            return scan(module_path, prefix)
        found = _found(folder, scan, version)
        before = f"{prefix}." if prefix else ""
        return {needs: {before + name: names for name, names in part.items()} for needs, part in found.items()}

    return define_import_structure


def _found(folder: Path, scan: Callable[..., Structure], version: str) -> Structure:
    file, models = _file(folder.parent, version), sorted({*os.listdir(folder)} - {"__pycache__"})
    with suppress(OSError, ValueError, TypeError, LookupError, AttributeError):
        said = json.loads(file.read_bytes())
        if said["models"] == models and not _renewed(folder.parent, version, file):
            return {
                frozenset(needs): {name: set(names) for name, names in part.items()}
                for needs, part in said["structure"]
            }
    found = scan(folder)
    if not sys.dont_write_bytecode:
        said = {"models": models, "structure": [[[*needs], part] for needs, part in found.items()]}
        data = json.dumps(said, default=sorted).encode()  # names come in sets
        # As byte code is written: whole or not at all, and no error where that is not allowed.
        SourceFileLoader("", "").set_data(str(file), data)
    return found


def _renewed(package: Path, version: str, file: Path) -> bool:
    """Whether the package was installed after `file` was written: of one version there may be several builds."""
    record = Path(f"{package}-{version}.dist-info", "RECORD")
    return record.exists() and file.stat().st_mtime < record.stat().st_mtime


def _file(package: Path, version: str) -> Path:
    """Where it is kept, beside the package's own folder."""
    return Path(cache_from_source(f"{package}-{version}.py")).with_suffix(".json")
