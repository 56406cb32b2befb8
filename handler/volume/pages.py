"""The page cache, asked without waiting for a disk."""

import os

_shared = False


def share() -> None:
    """Other processes here read what this one reads: from now on all of it goes through the page cache, and once."""
    global _shared
    _shared = True


def cached(descriptor: int, start: int) -> bool:
    """Whether the page cache has what begins there, or shall have it: yes also where the file system cannot tell."""
    return _shared or not cold(descriptor, start)


def cold(descriptor: int, start: int) -> bool:
    """Whether the page cache lacks the byte there; no where the file system cannot tell."""
    try:
        os.preadv(descriptor, [bytearray(1)], start, os.RWF_NOWAIT)
    except OSError as error:
        return isinstance(error, BlockingIOError)
    return False
