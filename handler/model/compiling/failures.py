"""How compiling failed, on the volume: what one worker ran into, no later one tries again at each start.

A record stands beside the artifacts, as baked/<id>/<key>.failed.json. It holds for exactly the fingerprint that failed,
with the toolchain and the version of Kindling, so whatever may mend it makes workers try again by themselves. One of a
lost GPU holds for a day, also against what is compiled already: the fault may have been that one GPU's.
"""

import contextlib
import errno
import json
import logging
import stat
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from handler.catalog.spec import ModelSpec
from handler.core.errors import DeviceLost, KindlingError, NumericalError, VolumeFailed, WeightsCorrupt
from handler.core.tracebacks import causes
from handler.core.untrusted import Malformed, load, shaped
from handler.core.version import __version__
from handler.model.compiling import artifacts, toolchain
from handler.model.compiling.package import digest
from handler.model.faults import LOST, NO_MEMORY, meaning
from handler.model.hardware import Hardware
from handler.volume.manifest import write_atomically
from handler.volume.publishing import retire, whole
from handler.volume.room import inside, reading

AGAIN = "KINDLING_COMPILE=on tries again"
# What passes: too little memory, nowhere to write, or a GPU that failed; another worker need not have it so.
PASSING = (
    *NO_MEMORY,
    *LOST,
    "no space left",
    "quota exceeded",
    "no usable temporary directory",
    "cannot allocate",
    "killed signal terminated program",  # what g++ says of one that the kernel killed for its memory,
    "terminated abruptly",  # Python of a process that compiled kernels,
    "failed with error code -9",  # and Triton of ptxas
    "write callback failed",  # miniz, of no room for what it unpacks
    "file write failed",
    "file close failed",
    "file open failed",
)
LOST_S = 24 * 3600.0  # how long it is held against compiled code that a GPU was lost with it
UNWRITTEN = (errno.ENOSPC, errno.EDQUOT, errno.ENOMEM, errno.EROFS, errno.EACCES)
WHEELS = ("nvidia-cuda-runtime", "nvidia-cuda-crt", "nvidia-cuda-cccl")  # of `toolchain.HEADERS`
TOLD = 200  # characters of an error
LONGEST = 64 << 10  # bytes of a record; a longer one is none
UNKNOWN = "how compiling failed before is not known: %s"
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Record:
    """What a file must say."""

    reason: str
    when: str
    facts: dict[str, str]


@dataclass(frozen=True, slots=True)
class Failures:
    """Of compiling `spec` on `hardware`. `policy` is KINDLING_COMPILE as it was set: "on" wants it tried again.

    `decoder` is the VAE's that is compiled too, as fingerprints name it; empty where no model is loaded.
    """

    policy: str
    spec: ModelSpec
    hardware: Hardware
    volume: Path
    decoder: str = ""

    @property
    def expected(self) -> str:
        """Why compiling would fail: for want of a tool, or as it did before. Empty if nothing is known."""
        if self.policy == "on":
            return ""
        return toolchain.look().missing(self.hardware.device) or self._before(self._records())

    @property
    def lost(self) -> str:
        """Why what is compiled already may not run: a GPU was lost with it. Empty if none was."""
        return "" if self.policy == "on" else self._before(self._records("lost"))

    def reason(self, error: Exception) -> str:
        """Why compiling failed, in a line: for want of a tool if one is missing, whatever `error` says then."""
        return f"compiling failed: {toolchain.look().missing(self.hardware.device) or gist(error)}"

    def blame(self, error: Exception) -> str:
        """Why compiling failed, and leave word of it; DeviceLost if it took the GPU along."""
        reason = self.reason(error)
        if isinstance(meant := meaning(error, self.spec.size), DeviceLost):
            self.note_lost(reason)
            raise meant from error
        self.note(error, reason)
        return reason

    def note(self, error: Exception, reason: str) -> None:
        """Leave word that compiling failed for `reason`, unless `error` may pass or the volume takes nothing."""
        if not passing(error):
            self._leave(reason, "failed")

    def note_lost(self, reason: str) -> None:
        """Leave word that the GPU was lost to compiling, or to compiled code, if the volume takes it."""
        self._leave(reason, "lost")

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Leave word if compiled code loses the GPU inside: no later start shall run into it again."""
        try:
            yield
        except DeviceLost as error:
            self.note_lost(f"compiled code lost the GPU: {gist(error.__cause__ or error)}")
            raise

    def _leave(self, reason: str, kind: str) -> None:
        facts = self._facts()
        path = self._path(facts, kind)
        found = Record(reason, f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC", facts)
        with contextlib.suppress(OSError):
            self._folder.mkdir(parents=True, exist_ok=True)
            write_atomically(path, json.dumps(asdict(found), indent=1).encode() + b"\n")
            log.error("no later worker compiles this in vain, by %s; %s", path, AGAIN)

    def forget(self) -> None:
        """Compiled code has drawn: what was noted of it holds no longer."""
        facts = self._facts()
        for kind in ("failed", "lost"):
            with contextlib.suppress(OSError):
                self._path(facts, kind).unlink()

    def condemn(self, found: artifacts.Found, error: Exception | None) -> None:
        """Compiled code failed by `error`, if any, and the model itself draws: what was `found` goes.

        Of what was made here nothing stays, but word that it draws nothing sound; of other errors there is one already.
        """
        if found.outcome == "HIT":
            self.discredit(found, error)
        elif isinstance(error, NumericalError):
            self._leave(f"compiled code failed: {gist(error)}", "failed")

    def discredit(self, found: artifacts.Found, error: Exception | None) -> None:
        """Remove a published package that does not work, so that another is made; not for an error that may pass.

        Nor for a read that went wrong: one that is whole when it is read once more stays.
        """
        wrong = isinstance(error, NumericalError | WeightsCorrupt) or (error and not passing(error))
        if not (found.source and wrong and found.outcome in ("HIT", "ERROR")):
            return
        manifest = found.source.manifest
        try:
            if isinstance(error, WeightsCorrupt | OSError) and manifest and whole(found.source.folder, manifest.facts):
                log.warning("%s was read wrong and is whole: it stays", found.source.folder)
                return
            retire(found.source)
            log.error("%s does not work and was removed: another is compiled in its place", found.source.folder)
        except VolumeFailed as error:
            log.warning("%s does not work: %s", found.source.folder, error.message)

    def _path(self, facts: dict[str, str], kind: str) -> Path:
        return self._folder / f"{digest(facts)}.{kind}.json"

    def _before(self, records: list[Path]) -> str:
        wanted = self._facts() if records else {}
        for path in records:
            if (found := _record(path)) and not artifacts.differing(wanted, found.facts):
                return f"{found.reason} ({found.when}); {AGAIN}"
        return ""

    def _records(self, *kinds: str) -> list[Path]:
        """The files that hold, of these kinds or of all."""
        wanted = tuple(f".{kind}.json" for kind in kinds or ("failed", "lost"))
        try:
            return [path for path in inside(self._folder) if path.name.endswith(wanted) and _holds(path)]
        except VolumeFailed as error:
            log.warning(UNKNOWN, error.message)
            return []

    @property
    def _folder(self) -> Path:
        return self.volume / "baked" / self.spec.id

    def _facts(self) -> dict[str, str]:
        """All that may mend it."""
        tools = toolchain.look().facts | {name: artifacts.version_of(name) for name in WHEELS}
        code = artifacts.fingerprint(self.spec, self.hardware, self.decoder)
        return {**code, **tools, "kindling": __version__}


def _record(path: Path) -> Record | None:
    """None if it makes no sense, has just gone, or cannot be read, which is told."""
    try:
        with reading(path), contextlib.suppress(FileNotFoundError, Malformed):
            return shaped(Record, load(path, LONGEST))
    except VolumeFailed as error:
        log.warning(UNKNOWN, error.message)
    return None


def _holds(path: Path) -> bool:
    try:
        facts = path.stat()
    except OSError:  # whoever reads it says so
        return True
    young = path.suffixes[-2:] != [".lost", ".json"] or time.time() - facts.st_mtime < LOST_S
    return stat.S_ISREG(facts.st_mode) and young and facts.st_size <= LONGEST


def passing(error: Exception) -> bool:
    """Whether `error`, or what it came from, says nothing about another try."""
    return any(
        isinstance(each, KindlingError | MemoryError)
        or getattr(each, "errno", None) in UNWRITTEN
        or any(sign in str(each).lower() for sign in PASSING)
        for each in causes(error)
    )


def gist(error: BaseException) -> str:
    """One line about `error`: of a compiler's many, the one that says what is wrong."""
    rows = [row.strip() for row in str(error).splitlines() if row.strip()]
    told = next((row for row in rows if "error: " in row), rows[0] if rows else "")
    return f"{type(error).__name__}: {told}"[:TOLD]
