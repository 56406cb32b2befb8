"""A shelf in this process's memory, for a prompt that comes with its files and takes its pictures with it."""

import threading
import time
from collections.abc import Mapping

from handler.api.comfy.shelf import Entry


class Memory:
    """Holds `files` by their names on a shelf, such as `input/cat.png`, and what is put there later."""

    shared = False
    look_s = 1.0

    def __init__(self, files: Mapping[str, bytes]) -> None:
        now = time.time()
        self._files = {name: (now, data) for name, data in files.items()}
        self._one = threading.Lock()

    def get(self, name: str) -> bytes:
        """See `Shelf`."""
        try:
            return self._files[name][1]
        except KeyError:
            raise FileNotFoundError(name) from None

    def has(self, name: str) -> bool:
        """See `Shelf`."""
        return name in self._files

    def put(self, name: str, data: bytes, anew: bool = False) -> None:
        """See `Shelf`."""
        with self._one:
            if anew and name in self._files:
                raise FileExistsError(name)
            self._files[name] = (time.time(), data)

    def remove(self, name: str) -> None:
        """See `Shelf`."""
        self._files.pop(name, None)

    def now(self) -> float:
        """See `Shelf`."""
        return time.time()

    def sweep(self, folder: str, since: float) -> None:
        """See `Shelf`: nothing is here in part."""

    def entries(self, folder: str, deep: bool = False) -> list[Entry]:
        """See `Shelf`."""
        top = f"{folder}/"
        inside = [(name, at, data) for name, (at, data) in [*self._files.items()] if name.startswith(top)]
        flat = [Entry(at, name, len(data)) for name, at, data in inside if deep or "/" not in name.removeprefix(top)]
        return sorted(flat)
