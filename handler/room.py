"""Room on a volume: looked at before anything large is written, and what writers say where there is none."""

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from handler.errors import VolumeFailed

NUMBERED = re.compile(r"\(os error (\d{1,5})\)")  # as libraries in Rust say it: safetensors, hf_xet


def refused(error: BaseException) -> str:
    """What the file system said, if `error` came of it, as an OSError or in a library's own words; else nothing."""
    if isinstance(error, OSError):
        return error.strerror or str(error) or type(error).__name__
    found = NUMBERED.search(str(error))
    return os.strerror(int(found[1])) if found else ""


@contextmanager
def writing(target: Path) -> Iterator[None]:
    """VolumeFailed, naming `target`, where the file system takes no more."""
    try:
        yield
    except Exception as error:
        if not (why := refused(error)):
            raise
        raise VolumeFailed(f"Cannot write {target}: {why}.") from error


def require_writable(folder: Path) -> None:
    """VolumeFailed if nothing can be put into `folder`, which need not be there yet."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()


def require(folder: Path, size: float, what: str) -> None:
    """VolumeFailed if `folder`, which need not be there yet, has no room for `size` bytes of `what`."""
    there = next(path for path in (folder, *folder.parents) if path.is_dir())
    with writing(folder):
        free = shutil.disk_usage(there).free
    if size > free:
        raise VolumeFailed(f"{what} need {size / 1e9:.3g} GB, {folder} has {free / 1e9:.3g} GB free.")
