"""The page cache, asked without waiting for a disk."""

import os

_shared = False


def share() -> None:
    """Other processes here read what this one reads: from now on all of it goes through the page cache, and once."""
    global _shared
    _shared = True


def cached(descriptor: int, chunk: memoryview, start: int) -> bool:
    """Whether the page cache has the chunk, or shall have it: yes also where the file system cannot tell."""
    if _shared:
        return True
    try:  # of its first byte
        return os.preadv(descriptor, [chunk[:1]], start, os.RWF_NOWAIT) >= 0
    except OSError as error:
        return not isinstance(error, BlockingIOError)
