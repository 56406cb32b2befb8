"""Publishing: a folder of the volume is there whole, with its manifest, or not at all; a whole one is never lost.

A publisher fills a folder of its own, beside the place, and moves it there at once. What is in the way stays if it is
whole and was made for the same. Else the two change places, at once, and what came out is looked at again: another
publisher may have put a whole one there meanwhile, which then goes back. Where a file system cannot exchange folders,
the old one is moved aside, and back. No locks: network volumes need not have them.
"""

import contextlib
import ctypes
import errno
import os
import secrets
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from handler.core.errors import VolumeFailed, WeightsCorrupt
from handler.volume.leftovers import sweep
from handler.volume.manifest import MANIFEST, Source, checked, read_manifest, summarize, write_manifest
from handler.volume.room import discard, writing
from handler.volume.sealing import seal, sealed

HERE, EXCHANGE = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of renameat2(2)


@contextlib.contextmanager
def publishing(target: Path, facts: Mapping[str, str], volume_key: str = "") -> Iterator[Path]:
    """Fill a temporary folder beside `target`; afterwards `target` is that one, or a whole one with these facts.

    With a `volume_key` it is sealed, and one that is not is not whole. Raises VolumeFailed if the volume cannot be
    written; nothing half-written stays.
    """
    part = _beside(target)
    try:
        with writing(target):
            part.mkdir(parents=True)
            yield part
            manifest = write_manifest(part, facts)
            _open_alike(part, manifest.files)
            if volume_key:
                seal(part, manifest, volume_key)
            now = (part / MANIFEST).stat().st_mtime
            while not _moved(part, target) and not whole(target, facts, volume_key):
                if _exchanged(part, target):
                    if whole(part, facts, volume_key):  # another publisher's, put there since
                        _exchanged(part, target)
                    break
                _clear(target, keep=lambda folder: whole(folder, facts, volume_key))
        sweep(target.parent, now)
    finally:
        discard(part)


def _open_alike(folder: Path, files: Iterable[str]) -> None:
    """Let whoever may read the manifest read all: safetensors writes files for its user alone, whatever the umask."""
    mode = stat.S_IMODE((folder / MANIFEST).stat().st_mode)
    for path in map(folder.joinpath, files):
        if not path.is_symlink() and stat.S_IMODE(path.stat().st_mode) != mode:
            with contextlib.suppress(OSError):  # the file system has no modes
                path.chmod(mode)


def whole(folder: Path, facts: Mapping[str, str], volume_key: str = "") -> bool:
    """Whether `folder` was made for exactly this, with this seal if one is wanted, and has every byte that it promises.

    Reads all of it. Raises VolumeFailed where that cannot be told, for reading fails.
    """
    try:
        source = checked(folder)
        if source is None or source.manifest is None or source.manifest.facts != dict(facts):
            return False
        if volume_key and not sealed(source, volume_key):
            return False
        files = source.manifest.files
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            return all(threads.map(lambda name: summarize(folder / name) == files[name], files))
    except (WeightsCorrupt, FileNotFoundError):  # the second: it is being moved aside
        return False
    except OSError as error:
        raise VolumeFailed(f"Cannot read {folder}: {error.strerror or error}.") from None


def retire(source: Source, keep: Callable[[Path], bool] | None = None) -> None:
    """Remove a published folder that is no good, unless another was put in its place. VolumeFailed if it cannot go.

    Another has another manifest; or `keep` tells, where what is made again is the same.
    """
    try:
        _clear(source.folder, keep or (lambda folder: _manifest(folder) != source.manifest))
    except OSError as error:
        raise VolumeFailed(f"Cannot remove {source.folder}: {error.strerror or error}.") from error


def _clear(target: Path, keep: Callable[[Path], bool]) -> None:
    """Move `target` aside and remove it there; back again if what came aside is to be kept, or nobody can tell."""
    aside, kept = _beside(target), True
    with contextlib.suppress(FileNotFoundError):  # another was faster
        target.rename(aside)
        try:
            kept = keep(aside)
        finally:
            if not (kept and _moved(aside, target)):
                discard(aside)


def _beside(target: Path) -> Path:
    """A name of its own, which readers pass over, on the same file system."""
    return target.with_name(f".{target.name}.{secrets.token_hex(4)}")


def _moved(part: Path, target: Path) -> bool:
    """Whether `part` is `target` now: not if a folder with files is there already."""
    try:
        part.rename(target)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
            raise
        return False
    return True


def _exchanged(part: Path, target: Path) -> bool:
    """Whether the two have changed places, so that `target` was never missing; not where that cannot be done."""
    with contextlib.suppress(OSError, AttributeError):
        paths = os.fsencode(part), os.fsencode(target)
        return bool(ctypes.CDLL(None).renameat2(HERE, paths[0], HERE, paths[1], EXCHANGE) == 0)
    return False


def _manifest(folder: Path) -> object:
    with contextlib.suppress(WeightsCorrupt):
        return read_manifest(folder)
    return None
