"""The host: how much memory this process may use. Told without torch."""

import contextlib
import ctypes
import os
from pathlib import Path

CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
CGROUP_V1_LIMIT = Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")
AHEAD, SHARE = 4 << 30, 4  # what 1 GB/s brings while torch is imported; at most a fourth of the memory


def host_memory() -> int:
    """Bytes this process may use: the machine's, or its container's if that has fewer."""
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for path in (CGROUP_LIMIT, CGROUP_V1_LIMIT):
        with contextlib.suppress(OSError, ValueError):  # not there, or "max"
            limits.append(int(path.read_text()))
    return min(limits)


def read_ahead(host: int) -> int:
    """How many bytes of files may wait in the memory of a host that has so many bytes."""
    return min(AHEAD, host // SHARE)


def trim() -> None:
    """Give what the allocator keeps of freed memory back to the host, where it can: glibc's keeps what fits nothing."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
