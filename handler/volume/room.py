"""What a file system refuses, as errors that name path and cause; and room, looked at before much is written."""

import errno
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from handler.core.errors import SettingsError, VolumeFailed

OPEN = "chmod -R a+rwX {}"
NUMBERED = re.compile(r"\(os error (\d{1,5})\)")  # as libraries in Rust say it: safetensors, hf_xet


def refused(error: BaseException) -> str:
    """What the file system said, if `error` came of it, as an OSError or in a library's own words; else nothing."""
    if isinstance(error, OSError):
        return error.strerror or str(error) or type(error).__name__
    found = NUMBERED.search(str(error))
    return os.strerror(int(found[1])) if found else ""


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """An OSError while `path` is read becomes VolumeFailed, which names it."""
    try:
        yield
    except OSError as error:
        raise VolumeFailed(f"Cannot read {path}: {error.strerror or error}.", about=str(path)) from None


def inside(folder: Path) -> list[Path]:
    """What is in `folder`, by name; nothing where it is none. VolumeFailed if nobody can tell: `glob` may not say."""
    with reading(folder):
        try:
            return sorted(folder.iterdir())
        except (FileNotFoundError, NotADirectoryError):
            return []


def discard(folder: Path) -> None:
    """Remove `folder` as far as that goes: what is left of it is passed over by all who read."""
    with suppress(OSError):  # rmtree ignores most
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def writing(target: Path) -> Iterator[None]:
    """VolumeFailed, naming `target`, where the file system takes no more."""
    try:
        yield
    except Exception as error:
        if not (why := refused(error)):
            raise
        raise VolumeFailed(f"Cannot write {target}: {why}.") from error


def require_folder(volume: Path) -> None:
    """VolumeFailed if `volume` is something else. Whether it is there, and can be read, is for whoever uses it."""
    try:
        folder = stat.S_ISDIR(volume.stat().st_mode)
    except OSError as error:
        folder = not isinstance(error, NotADirectoryError)
    if not folder:
        raise VolumeFailed(f"The volume {volume} is not a folder. KINDLING_VOLUME should name one.", "volume")


def try_to_write(folder: Path) -> None:
    """OSError where `folder` takes nothing; a disk that is full takes names still, so a byte is written."""
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(b"1")


def require_writable(folder: Path) -> None:
    """VolumeFailed if nothing can be put into `folder`, which need not be there yet."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        try_to_write(folder)


def require_temporary() -> None:
    """SettingsError if nothing temporary can be written anywhere, as torch and its compilers want to."""
    try:
        tempfile.gettempdir()
    except FileNotFoundError:
        told = "No folder for temporary files can be written: mount one (docker run --tmpfs /tmp), or set TMPDIR."
        raise SettingsError(told, "TMPDIR") from None


def remedy(volume: Path, error: BaseException | None) -> str:
    """What to do where `error` came of a process that may not write what is on `volume`; empty if it did not."""
    if not isinstance(error, PermissionError) or not Path(error.filename or "").is_relative_to(volume):
        return ""
    return f"To mend it, have the owner of {volume} run this, for this is user {os.getuid()}: {OPEN.format(volume)}."


def unwritable(volume: Path, error: OSError) -> str:
    """What it means that `volume` cannot be written, and what to do, in a line: a worker can serve without."""
    owner = f"To mend it, have its owner run this, for the worker is user {os.getuid()}: {OPEN.format(volume)}."
    meant = "If that is not meant, mount it writable."
    mends = {errno.EACCES: owner, errno.EPERM: owner, errno.EROFS: meant, errno.ENOSPC: "To mend it, make room."}
    return (
        f"The volume {volume} cannot be written ({error.strerror or error}): it is served from, but no compiled code "
        f"and no records are left for later workers. {mends.get(error.errno or 0, 'To mend it, see what ails it.')}"
    )


def require(folder: Path, size: float, what: str) -> None:
    """VolumeFailed if `folder`, which need not be there yet, has no room for `size` bytes of `what`."""
    with writing(folder):
        there = next(path for path in (folder, *folder.parents) if path.is_dir())
        free = shutil.disk_usage(there).free
    if size > free:
        raise VolumeFailed(f"{what} need {size / 1e9:.3g} GB, {folder} has {free / 1e9:.3g} GB free.")
