"""The host: how much memory this process may use, and how much of it is free. Told without torch."""

import contextlib
import ctypes
import os
import sys
from pathlib import Path

CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
CGROUP_V1_LIMIT = Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")
USAGE = ("memory.current", "memory.usage_in_bytes")  # beside these
MEMINFO = Path("/proc/meminfo")
AHEAD, SHARE = 4 << 30, 4  # planned with everywhere, though little else may be free; at most a fourth of the memory

STRIDE = 1 << 30  # bytes that come between two looks at what is free


def host_memory() -> int:
    """Bytes this process may use: the machine's, or its container's if that has fewer."""
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for path in (CGROUP_LIMIT, CGROUP_V1_LIMIT):
        with contextlib.suppress(OSError, ValueError):  # not there, or "max"
            limits.append(int(path.read_text()))
    return min(limits)


def free_memory() -> int:
    """Bytes that nobody has, of the machine's and its container's, with what only caches files. 0 if none can tell."""
    free = [0]
    with contextlib.suppress(OSError, ValueError, StopIteration):
        free = [1024 * _row(MEMINFO, "MemAvailable:")]
    for limit, usage in zip((CGROUP_LIMIT, CGROUP_V1_LIMIT), USAGE, strict=True):
        with contextlib.suppress(OSError, ValueError, StopIteration):
            most = int(limit.read_text())
            free.append(0)  # for a limit whose use cannot be read
            cached = _row(limit.with_name("memory.stat"), "inactive_file")
            free[-1] = most - int(limit.with_name(usage).read_text()) + cached
    return max(0, min(free))


def _row(path: Path, name: str) -> int:
    return next(int(words[1]) for line in path.read_text().splitlines() if (words := line.split())[:1] == [name])


def read_ahead(host: int) -> int:
    """How many bytes of files may always wait in the memory of a host that has so many bytes."""
    return min(AHEAD, host // SHARE)


class Headroom:
    """Of bytes that wait in memory: `least` may always; once it is told to `fill`, as many more as are free."""

    def __init__(self, least: int) -> None:
        self.waiting, self._least = 0, least
        self._kept, self._spare, self._look = sys.maxsize, 0, False  # whether to look again how many are spare

    def fill(self, kept: int) -> None:
        """Up to `kept` bytes, which stay free."""
        self._kept, self._look = kept, True

    def fits(self, size: int) -> bool:
        if self.waiting + size <= self._least:
            return True
        if self._spare < size and self._look:
            free = free_memory() - self._kept
            self._spare, self._look = min(free, STRIDE), free > STRIDE
        return size <= self._spare

    def more(self, size: int) -> None:
        """So many come."""
        self.waiting, self._spare = self.waiting + size, self._spare - size

    def less(self, size: int) -> None:
        """So many wait no longer; perhaps they are free."""
        self.waiting, self._look = self.waiting - size, True


def trim() -> None:
    """Give what the allocator keeps of freed memory back to the host, where it can: glibc's keeps what fits nothing."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
