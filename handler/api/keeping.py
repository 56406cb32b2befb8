"""Files that are kept for a while: in this worker's memory, and where all workers see them, if there is such a place.

Whoever asks the worker that has a file waits for no volume; and a volume that fails or hangs loses nothing but what
others would have found. Bounds hold for each folder: here at once, where workers share it each time that one of them
has added an eighth of them, or that some minutes have passed.
"""

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from handler.api.comfy.bucket import shared
from handler.api.comfy.shelf import Shelf, prune
from handler.api.hands import Hands
from handler.api.loras import looked
from handler.core.deadline import Deadline
from handler.core.errors import KindlingError, NotReady
from handler.core.settings import Settings

T = TypeVar("T")
ROOT = "kept"
NEAR = 64e6  # bytes in memory of what is kept elsewhere too
LOOK_S = 10.0  # for which a volume may hang
TIDIED_S = 600.0  # between two times that it is looked whether there is too much
SHARE = 1 / 8  # of the bounds, after which it is looked at once
_hands = Hands(4, 4, "kept")  # their own: a volume may hang
log = logging.getLogger(__name__)


class Near:
    """The latest files of a folder, in this worker's memory. For one event loop."""

    def __init__(self, settings: Settings) -> None:
        self._files = OrderedDict[str, tuple[float, bytes]]()
        self._doubled = OrderedDict[str, int]()  # those that are elsewhere too, with their sizes
        self._most, self._largest = settings.kept, settings.kept_mb * 1e6
        self._oldest_s, self._size = settings.kept_s, 0

    def put(self, name: str, data: bytes) -> None:
        """Keep a file."""
        self.drop(name)
        self._files[name] = (time.monotonic(), data)
        self._size += len(data)
        while self._files and (len(self._files) > self._most or self._size > self._largest or self._old()):
            self.drop(next(iter(self._files)))

    def elsewhere(self, name: str) -> None:
        """This file is kept where others see it, too: of such ones there is less room here."""
        if name in self._files:
            self._doubled[name] = len(self._files[name][1])
        while sum(self._doubled.values()) > NEAR:
            self.drop(next(iter(self._doubled)))

    def get(self, name: str) -> bytes | None:
        """What is in it, if it is here and not too old."""
        at, data = self._files.get(name, (0.0, None))
        return data if data is not None and time.monotonic() - at < self._oldest_s else None

    def drop(self, name: str) -> None:
        """Be it there or not."""
        self._doubled.pop(name, None)
        if found := self._files.pop(name, None):
            self._size -= len(found[1])

    def _old(self) -> bool:
        at, _ = next(iter(self._files.values()))
        return time.monotonic() - at > self._oldest_s


@dataclass(slots=True)
class Added:
    """What this worker has added to a shared folder since it was last tidied, at `tidied`."""

    files: int = 0
    size: int = 0
    tidied: float = -TIDIED_S


class Keeper:
    """Keeps one folder's files. All but what is said to be for a thread is for one event loop."""

    def __init__(self, settings: Settings, folder: str, readers: Hands = _hands) -> None:
        self._settings, self._folder, self._readers = settings, folder, readers
        self._near = Near(settings)
        self._shelf: Shelf | None = None
        self._lock, self._looked = threading.Lock(), False
        self._added = Added()

    async def put(
        self, name: str, data: bytes, deadline: Deadline | None = None, wanted: Callable[[], bool] = lambda: True
    ) -> None:
        """Keep a file; `deadline` is by when this shall be over, be it where others see it or not.

        Others see it only if it is still `wanted` when a thread comes to that.
        """
        self._near.put(name, data)
        if await self._tried(partial(self._put, name, data, wanted), deadline, False):
            self._near.elsewhere(name)

    async def get(self, name: str, deadline: Deadline | None = None) -> bytes | None:
        """What is in a file that is not too old, whichever worker put it there; None if there is none.

        Raises NotReady where that cannot be known now, for it may be there.
        """
        if (near := self._near.get(name)) is not None:
            return near
        unknown = NotReady(f"The place of {self._folder} does not answer; try again.")
        act = partial(self._get, name)
        found: bytes | NotReady | None = await self._tried(act, deadline, unknown, self._readers)
        if isinstance(found, NotReady):
            raise found
        return found

    async def has(self, name: str) -> bool:
        """Whether there is such a file where workers share them."""
        where = f"{self._folder}/{name}"
        return await self._tried(lambda: bool((shelf := self.shelf()) and shelf.has(where)), None, False)

    def shelf(self) -> Shelf | None:
        """Where others see files, if anywhere. For a thread: it looks at the volume."""
        with self._lock:
            if not self._looked:
                self._shelf, self._looked = shared(self._settings, ROOT), True
            return self._shelf

    async def _tried(self, act: Callable[[], T], deadline: Deadline | None, otherwise: T, hands: Hands = _hands) -> T:
        """What `act` gives on a thread; where the volume fails or hangs, that is logged."""
        within = Deadline.within(min(LOOK_S, deadline.left_s / 2 if deadline else LOOK_S))
        try:
            return await looked(act, within, hands)
        except (OSError, KindlingError) as error:
            why = getattr(error, "strerror", None) or getattr(error, "code", "it failed")
            log.warning("%s cannot be kept or found where other workers see them: %s", self._folder, why)
            return otherwise

    def _put(self, name: str, data: bytes, wanted: Callable[[], bool]) -> bool:
        """Whether it is where others see it."""
        if (shelf := self.shelf()) is None or not wanted():
            return False
        shelf.put(f"{self._folder}/{name}", data)
        if not wanted() and (latest := self._near.get(name)) is not None:  # it hung, and may have come last
            shelf.put(f"{self._folder}/{name}", latest)
        try:
            self._tidy(shelf, len(data))
        except (OSError, KindlingError) as error:  # what is there is there
            why = getattr(error, "strerror", "") or error
            log.warning("%s that are too old cannot be removed: %s", self._folder, why)
        return True

    def _get(self, name: str) -> bytes | None:
        try:
            return shelf.get(f"{self._folder}/{name}") if (shelf := self.shelf()) else None
        except FileNotFoundError:
            return None

    def _tidy(self, shelf: Shelf, size: int) -> None:
        """Remove what is too old or too much, now and then."""
        with self._lock:
            added, settings = self._added, self._settings
            added.files, added.size = added.files + 1, added.size + size
            most = settings.kept_mb * 1e6
            full = added.size > most * SHARE or added.files > settings.kept * SHARE
            if not full and time.monotonic() - added.tidied < TIDIED_S:
                return
            self._added = Added(tidied=time.monotonic())
        prune(shelf, self._folder, settings.kept, settings.kept_s + settings.deadline_s, most)
