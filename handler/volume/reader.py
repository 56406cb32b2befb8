"""Reading ahead: a model's files, from the volume into host memory, before torch is even imported.

Never faults through an mmap of the volume. Threads read whole chunks into anonymous memory and compare each chunk's
CRC-32 with the manifest while it is in cache; without one, a file must stay what it is. `weights.py` makes views of it.
"""

import contextlib
import mmap
import os
import stat
import threading
from collections import deque
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Self

from handler.core.errors import WeightsCorrupt, WeightsMissing
from handler.core.host import Headroom, host_memory, read_ahead
from handler.volume.fitting import Share
from handler.volume.given import identity
from handler.volume.layout import Slot
from handler.volume.listing import config_files, index_of, weight_files
from handler.volume.manifest import CHUNK, Source
from handler.volume.overlay import NOTHING, Overlay
from handler.volume.pages import cached
from handler.volume.room import reading
from handler.volume.single import AGAIN

THREADS = 8  # a network volume answers many better than one; on a local disk 4 and more measure the same
CONFIGS = ""  # what `take` calls the small files, which the libraries read again for themselves


@dataclass(frozen=True, slots=True, eq=False)
class ReadFile:
    """One file on its way into `memory`; `landed` has the first bytes of the chunks that are there.

    Of a file of `size` bytes with more in it than is wanted, `memory` begins with byte `base`, `wanted` are the chunks
    to read, and `slots` the tensors: by the model's names, and where they are in `memory`.
    """

    path: Path
    identity: tuple[int, ...]  # which file `memory` is for; checksums say more, also where inodes are made up
    crc32: tuple[int, ...]  # one for each chunk; none if nobody wrote them down
    remedy: str
    memory: mmap.mmap
    landed: set[int] = field(default_factory=set)
    base: int = 0
    size: int = 0
    wanted: tuple[tuple[int, int], ...] = ()
    slots: Mapping[str, Slot] | None = None

    @property
    def chunks(self) -> list[tuple[int, int]]:
        """First byte and end of each that is read."""
        return list(self.wanted) or _chunks(len(self.memory))

    def read(self, start: int, stop: int) -> None:
        """Bring one chunk into memory and check it. Opens the file for itself: threads share nothing."""
        with reading(self.path), self._opened() as descriptor:
            if fault := self._read(descriptor, start, stop):  # once more: a network may be at fault, and not the file
                os.posix_fadvise(descriptor, self.base + start, stop - start, os.POSIX_FADV_DONTNEED)
                fault = self._read(descriptor, start, stop)
        if fault:
            raise self.corrupt(fault)

    def _read(self, descriptor: int, start: int, stop: int) -> str:
        """What is wrong with the chunk that came."""
        from isal import isal_zlib

        chunk, at = memoryview(self.memory)[start:stop], self.base + start
        count = 0 if cached(descriptor, at) else self._read_directly(chunk, at)
        while got := os.preadv(descriptor, [chunk[count:]], at + count) if count < len(chunk) else 0:
            count += got
        if count < len(chunk):
            return f"ends at byte {at + count}, not at {self.size or len(self.memory)}"
        wrong = self.crc32 and isal_zlib.crc32(chunk) != self.crc32[at // CHUNK]
        return f"is damaged between bytes {at} and {self.base + stop}" if wrong else ""

    def _read_directly(self, chunk: memoryview, start: int) -> int:
        """Past the page cache: no second copy in memory, and from a cold disk twice as fast; how many bytes."""
        with contextlib.suppress(OSError), self._opened(os.O_DIRECT) as descriptor:
            return os.preadv(descriptor, [chunk[: len(chunk) // mmap.PAGESIZE * mmap.PAGESIZE]], start)
        return 0

    @contextlib.contextmanager
    def _opened(self, flags: int = 0) -> Iterator[int]:
        """For reading; WeightsCorrupt if, before or after, it is not the file that it was."""
        descriptor = os.open(self.path, os.O_RDONLY | os.O_NONBLOCK | flags)  # a FIFO would hold us in open
        try:
            self._check(os.fstat(descriptor))
            yield descriptor
            self._check(os.fstat(descriptor))
        finally:
            os.close(descriptor)

    def _check(self, status: os.stat_result) -> None:
        size = self.size or len(self.memory)
        if not stat.S_ISREG(status.st_mode) or status.st_size != size:
            raise self.corrupt(f"is no longer a file of {size} bytes")
        if not self.crc32 and identity(status) != self.identity:
            raise self.corrupt("was replaced, or written to, while it was read")

    def corrupt(self, what: str) -> WeightsCorrupt:
        return WeightsCorrupt(f"{self.path} {what}. {self.remedy}", about=str(self.path))


class Reader:
    """Reads `source` from now on, in the order of model_index.json, `without` some components. Used from one thread.

    Components that `over` has something for are read from there.
    At most `room` bytes wait to be taken, and the chunk that somebody waits for; once told to `fill`, as many more as
    are free. A file asked for out of order is read next. Leaving the context never waits for a read that hangs.
    """

    def __init__(
        self,
        source: Source,
        threads: int = THREADS,
        room: int | None = None,
        without: Collection[str] = (),
        over: Overlay = NOTHING,
    ) -> None:
        index = {**index_of(source), **over.index}.items()
        self.source, self.index = source, {name: value for name, value in index if name not in without}
        self.over = over
        self._files = {CONFIGS: [_file(source, name) for name in config_files(source)]}
        for part, other in over.folders.items():
            self._files[CONFIGS] += [_file(other, name) for name in config_files(other) if name.startswith(f"{part}/")]
        for component, names in weight_files(source, self.index).items():
            shared = [_shared(share) for share in over.get(component)]
            self._files[component] = shared or [_file(source, name) for name in names]
        self._ahead = Headroom(read_ahead(host_memory()) if room is None else room)  # what nobody has taken yet
        self._jobs = deque((file, *chunk) for file in self.left for chunk in file.chunks)
        self._turn = threading.Condition()
        self._wanted: tuple[ReadFile, int] | None = None
        self._failure: Exception | None = None
        names = [f"reader-{number}" for number in range(min(threads, len(self._jobs)))]
        self.threads = [threading.Thread(target=self._work, name=name, daemon=True) for name in names]
        for thread in self.threads:
            thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop(RuntimeError("The reader is closed."))
        self._files.clear()

    @property
    def left(self) -> list[ReadFile]:
        """All files that were not taken yet."""
        return list(chain(*self._files.values()))

    def files(self, component: str) -> list[ReadFile]:
        """Those of `component` that were not taken yet."""
        return self._files.get(component, [])

    def folder(self, component: str) -> Path:
        """Where the small files of `component` are."""
        return self.over.folders.get(component, self.source).folder / component

    def take(self, component: str) -> list[ReadFile]:
        """The files of `component`, for the caller to `wait` for and to report as `taken`; none the second time."""
        return self._files.pop(component, [])

    def wait(self, file: ReadFile, start: int) -> None:
        """Until the chunk at `start` is there; raises what went wrong with it or with any other."""
        with self._turn:
            self._wanted = file, start
            if start not in file.landed:
                self._jobs = deque(sorted(self._jobs, key=lambda job: (job[:2] != (file, start), job[0] is not file)))
                self._turn.notify_all()
            self._turn.wait_for(lambda: self._failure or start in file.landed)
            if self._failure:
                raise self._failure

    def fill(self, kept: int) -> None:
        """Read ahead while the host has more than `kept` bytes free: what loading takes at most."""
        with self._turn:
            self._ahead.fill(kept)
            self._turn.notify_all()

    def taken(self, count: int) -> None:
        """So many bytes wait no longer: there is room for others."""
        with self._turn:
            self._ahead.less(count)
            self._turn.notify_all()

    def _work(self) -> None:
        while self._read_next():
            pass

    def _read_next(self) -> bool:
        with self._turn:
            self._turn.wait_for(lambda: not self._jobs or self._fits(*self._jobs[0]))
            if not self._jobs:
                return False
            file, start, stop = self._jobs.popleft()
            self._ahead.more(stop - start)
        try:
            file.read(start, stop)
        except Exception as error:  # whatever it is, the thread that waits must hear of it
            self._stop(error)
        with self._turn:
            file.landed.add(start)
            self._turn.notify_all()
        return True

    def _fits(self, file: ReadFile, start: int, stop: int) -> bool:
        return (file, start) == self._wanted or self._ahead.fits(stop - start)

    def _stop(self, error: Exception) -> None:
        with self._turn:
            self._failure = self._failure or error
            self._jobs.clear()
            self._turn.notify_all()


def _file(source: Source, name: str) -> ReadFile:
    entry = source.manifest.files.get(name) if source.manifest else None
    with reading(path := source.folder / name):
        try:
            status = path.stat()
        except FileNotFoundError:
            raise WeightsMissing(f"{path} is missing. {source.again}", about=str(path)) from None
    if not stat.S_ISREG(status.st_mode) or not status.st_size:
        raise WeightsCorrupt(f"{path} is empty, or no file. {source.remedy}", about=str(path))
    if source.manifest and (entry is None or entry.size != status.st_size):
        told = f"{path} has {status.st_size} bytes, its manifest says otherwise. {source.remedy}"
        raise WeightsCorrupt(told, about=str(path))
    memory = _memory(status.st_size)
    return ReadFile(path, identity(status), entry.crc32 if entry else (), source.remedy, memory)


def _shared(share: Share) -> ReadFile:
    """What one component gets of a file: only the chunks that its tensors are in, and no memory before or after."""
    file = share.file
    spans = [(slot.start, slot.stop) for whole in share.slots.values() for slot in (whole, whole.scale) if slot]
    base = min(start for start, _ in spans) // CHUNK * CHUNK
    end = min(-(-max(stop for _, stop in spans) // CHUNK) * CHUNK, file.size)
    numbers = {number for start, stop in spans for number in range((start - base) // CHUNK, -(-(stop - base) // CHUNK))}
    wanted = tuple(chunk for number, chunk in enumerate(_chunks(end - base)) if number in numbers)
    slots = {name: slot.moved(-base) for name, slot in share.slots.items()}
    crc32, memory = file.entry.crc32 if file.entry else (), _memory(end - base)
    return ReadFile(file.path, file.identity, crc32, AGAIN, memory, set(), base, file.size, wanted, slots)


def _memory(size: int) -> mmap.mmap:
    memory = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without huge pages, by which reading is 3 times faster
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def _chunks(size: int) -> list[tuple[int, int]]:
    return [(start, min(start + CHUNK, size)) for start in range(0, size, CHUNK)]
