"""What a start touches of its environment, brought into the page cache by several threads before imports ask for it.

The list is made once, by `record`, where an image is built, and is kept with the environment that it describes. It is
trusted with nothing: by a wrong one files of this environment are read that nobody needs.
"""

import contextlib
import hashlib
import os
import re
import stat
import sys
import sysconfig
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from handler.catalog.models import find
from handler.model import imports, upstream
from handler.volume.pages import cold
from handler.worker.preload import libraries

LIST = "kindling.touched"  # in the environment's folder
MODEL = "spark"  # the families differ in little
THREADS = 4
PROBES = 32  # rows that tell whether the page cache has the others too
LONGEST = 8 << 20  # characters of a list
GAP = 256 << 10  # bytes that are read along rather than left out between two ranges
PAGE = os.sysconf("SC_PAGE_SIZE")
PRESENT = 1 << 63  # of a page's 8 bytes in pagemap
ROW = re.compile(r"(\d{1,12}) (\d{1,12}) ([^/\0][^\0]*)", re.ASCII)  # first byte and end, of which file in the folder
MAPPED = re.compile(r"(\w+)-(\w+) \S+ (\w+) \S+ \d+ +(/.*)")


def bring(prefix: str = sys.prefix) -> threading.Thread | None:
    """From now on, beside whoever asks; nothing where torch is imported already, or the page cache has it all."""
    if "torch" in sys.modules:
        return None
    thread = threading.Thread(target=_bring, args=(prefix,), name="touched", daemon=True)
    thread.start()
    return thread


def _bring(prefix: str) -> None:
    found = listed(prefix)
    if any(_of(row, prefix, _cold) for row in found[:: len(found) // PROBES + 1]):
        left = iter(found)  # hands each to one thread: its `next` is one step of Python's
        threads = [threading.Thread(target=_work, args=(prefix, left), daemon=True) for _ in range(THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


def _work(prefix: str, left: Iterator[str]) -> None:
    for row in left:
        _of(row, prefix, _ask)


def _of(row: str, prefix: str, function: Callable[[int, int, int], bool]) -> bool:
    """What `function` says of the range in its file; no of an odd row, and of what cannot be read or is no file."""
    found = ROW.fullmatch(row)
    if found is None or ".." in found[3].split("/"):
        return False
    with contextlib.suppress(OSError):
        descriptor = os.open(f"{prefix}/{found[3]}", os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
        try:
            return stat.S_ISREG(os.fstat(descriptor).st_mode) and function(descriptor, int(found[1]), int(found[2]))
        finally:
            os.close(descriptor)
    return False


def _ask(descriptor: int, start: int, stop: int) -> bool:
    os.posix_fadvise(descriptor, start, max(0, stop - start), os.POSIX_FADV_WILLNEED)
    return True


def _cold(descriptor: int, start: int, _: int) -> bool:
    return cold(descriptor, start)


def listed(prefix: str) -> list[str]:
    """The rows of this environment's list; none if there is no list, or if it is of other packages."""
    with contextlib.suppress(OSError, ValueError), open(f"{prefix}/{LIST}") as file:
        first, *found = file.read(LONGEST).splitlines() or [""]
        return found if first == _key() else []
    return []


def _key() -> str:
    """What a list is of: this Python and the packages beside it, with their versions."""
    packages = sorted(name for name in os.listdir(sysconfig.get_path("purelib")) if name.endswith(".dist-info"))
    return hashlib.sha256("\n".join([sys.version, *packages]).encode()).hexdigest()


def record() -> None:
    """Make the list of this environment, in a process that has imported nothing yet of what it is about.

    It is then as a worker's own process: that imports a fourth fewer files.
    """
    upstream.dedicated()
    Path(sys.prefix, LIST).write_text("\n".join([_key(), *rows(sys.prefix)]))


def rows(prefix: str) -> list[str]:
    """Of what is in `prefix`, the ranges that importing what draws touches, roughly in that order."""
    opened: list[str] = []

    def hear(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(arguments[0], str):
            opened.append(os.path.realpath(arguments[0]))

    sys.addaudithook(hear)
    with imports.lean():
        libraries(find(MODEL))
    root, files = os.path.realpath(prefix) + "/", filter(os.path.isfile, dict.fromkeys([*opened]))
    touched = [*mapped(), *((0, os.path.getsize(path), path) for path in files)]
    return [f"{start} {stop} {path.removeprefix(root)}" for start, stop, path in touched if path.startswith(root)]


def mapped() -> Iterator[tuple[int, int, str]]:
    """Of the libraries in this process the ranges that it has touched; nothing where the kernel does not tell."""
    touched: dict[str, set[int]] = defaultdict(set)
    with contextlib.suppress(OSError), open("/proc/self/maps") as maps, open("/proc/self/pagemap", "rb") as pagemap:
        for found in filter(None, map(MAPPED.match, maps.read().splitlines())):
            start, stop, offset = (int(word, 16) // PAGE for word in found.groups()[:3])
            pages = memoryview(os.pread(pagemap.fileno(), 8 * (stop - start), 8 * start)).cast("Q")
            touched[found[4]].update(offset + number for number, page in enumerate(pages) if page >= PRESENT)
    for path, numbers in touched.items():
        for first, last in _runs(sorted(numbers)):
            yield first * PAGE, (last + 1) * PAGE, path


def _runs(numbers: Iterable[int]) -> list[list[int]]:
    """First and last of each run, those with a small gap between them as one."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and (number - runs[-1][1]) * PAGE <= GAP:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return runs
