"""Weights that are held: a model's bytes, read and checked before there is a worker, for copies of this process."""

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field

from handler.volume.given import identity
from handler.volume.manifest import Source
from handler.volume.overlay import NOTHING, Overlay
from handler.volume.reader import Reader

Readers = tuple[Reader, Reader | None]


@dataclass(slots=True)
class Held:
    """What `opened` would read of these, whole and in host memory; without a thread and without an open file.

    `used` says whether the last who wanted it has it. It is given once.
    """

    source: Source
    vae: Source | None
    over: Overlay
    used: bool = False
    _readers: Readers | None = field(default=None, repr=False)

    @classmethod
    @contextlib.contextmanager
    def reading(cls, source: Source, vae: Source | None, over: Overlay = NOTHING) -> Iterator["Held"]:
        """Read meanwhile, as fast as the volume brings it; at the end all is there. Raises what went wrong with it."""
        with contextlib.ExitStack() as unless_whole:
            readers = _entered(unless_whole, source, vae, over, sys.maxsize)
            held = cls(source, vae, over, _readers=readers)
            yield held
            for reader in filter(None, readers):
                _finish(reader)
            unless_whole.pop_all()

    def take(self, source: Source, vae: Source | None, over: Overlay) -> Readers | None:
        """The readers, if reading these now would bring the same bytes. None the second time."""
        readers, same = self._readers, (self.source, self.vae, self.over) == (source, vae, over)
        self.used = bool(readers) and same and all(map(_current, filter(None, readers or ())))
        if not self.used:
            return None
        self._readers = None
        return readers

    def free(self) -> None:
        """Give the memory back, if nobody has taken it."""
        self._readers = None


def opened(
    files: contextlib.ExitStack,
    source: Source,
    vae: Source | None,
    over: Overlay = NOTHING,
    held: Held | None = None,
) -> Readers:
    """Readers of the model and of the other autoencoder, if there is one, for as long as `files` is open.

    They are those of `held`, if that holds the same.
    """
    if held and (readers := held.take(source, vae, over)):
        for reader in filter(None, readers):
            files.enter_context(reader)
        return readers
    return _entered(files, source, vae, over)


def _entered(
    files: contextlib.ExitStack, source: Source, vae: Source | None, over: Overlay, room: int | None = None
) -> Readers:
    reader = files.enter_context(Reader(source, room=room, without=("vae",) if vae else (), over=over))
    return reader, files.enter_context(Reader(vae, room=room)) if vae else None


def _finish(reader: Reader) -> None:
    """Until all is there, and no thread is left."""
    for file in reader.left:
        for start, _ in file.chunks:
            reader.wait(file, start)
    for thread in reader.threads:
        thread.join()


def _current(reader: Reader) -> bool:
    """Whether the files that no manifest has checksums of are still those that were read."""
    with contextlib.suppress(OSError):
        return all(identity(file.path.stat()) == file.identity for file in reader.left if not file.crc32)
    return False
