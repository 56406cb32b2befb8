"""Inductor's cache: what an earlier process on this machine compiled, this one only finds, in a part of the time."""

from pathlib import Path


def files() -> frozenset[Path]:
    """Those of the cache; whoever compiles adds some, unless it found all there."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return frozenset(path for path in Path(cache_dir()).rglob("*") if path.is_file())
