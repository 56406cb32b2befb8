"""How compiling failed, on the volume: what one worker ran into, no later one tries again at each start.

A record stands beside the artifacts, as baked/<id>/<key>.failed.json. It holds for exactly the fingerprint that failed,
with the toolchain and the version of Kindling, so whatever may mend it makes workers try again by themselves.
"""

import contextlib
import errno
import json
import logging
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import handler
from handler import compiled, toolchain
from handler.blocks import digest
from handler.errors import KindlingError, NumericalError, VolumeFailed
from handler.faults import LOST, NO_MEMORY
from handler.hardware import Hardware
from handler.publishing import retire
from handler.spec import ModelSpec
from handler.volume import write_atomically

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
)
UNWRITTEN = (errno.ENOSPC, errno.EDQUOT, errno.ENOMEM, errno.EROFS, errno.EACCES)
WHEELS = ("nvidia-cuda-runtime", "nvidia-cuda-crt", "nvidia-cuda-cccl")  # of `toolchain.HEADERS`
TOLD = 200  # characters of an error
LONGEST = 64 << 10  # bytes of a record; a longer one is none
log = logging.getLogger(__name__)


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
        return toolchain.look().missing(self.hardware.device) or self._before()

    def reason(self, error: Exception) -> str:
        """Why compiling failed, in a line: for want of a tool if one is missing, whatever `error` says then."""
        return f"compiling failed: {toolchain.look().missing(self.hardware.device) or gist(error)}"

    def note(self, error: Exception, reason: str) -> None:
        """Leave word that compiling failed for `reason`, unless `error` may pass or the volume takes nothing."""
        if passing(error):
            return
        facts = self._facts()
        path = self._path(facts)
        found = {"reason": reason, "when": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC", "facts": facts}
        with contextlib.suppress(OSError):
            self._folder.mkdir(parents=True, exist_ok=True)
            write_atomically(path, json.dumps(found, indent=1).encode() + b"\n")
            log.error("no later worker compiles this in vain, by %s; %s", path, AGAIN)

    def forget(self) -> None:
        """Compiling succeeded: what was noted of it holds no longer."""
        with contextlib.suppress(OSError):
            self._path(self._facts()).unlink(missing_ok=True)

    def blame(self, found: compiled.Found, error: Exception | None) -> None:
        """Remove a published package that does not work, so that another is made; not for an error that may pass."""
        wrong = isinstance(error, NumericalError) or (error and not passing(error))
        if not (found.source and wrong and found.outcome in ("HIT", "ERROR")):
            return
        with contextlib.suppress(VolumeFailed):
            retire(found.source)
            log.error("%s does not work and was removed: another is compiled in its place", found.source.folder)

    def _path(self, facts: dict[str, str]) -> Path:
        return self._folder / f"{digest(facts)}.failed.json"

    def _before(self) -> str:
        wanted = self._facts()
        for path in self._records():
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
                found = json.loads(path.read_bytes())
                if not compiled.differing(wanted, found["facts"]):
                    return f"{found['reason']} ({found['when']}); {AGAIN}"
        return ""

    def _records(self) -> list[Path]:
        with contextlib.suppress(OSError):
            found = sorted(self._folder.glob("*.failed.json"))
            return [path for path in found if path.is_file() and path.stat().st_size <= LONGEST]
        return []

    @property
    def _folder(self) -> Path:
        return self.volume / "baked" / self.spec.id

    def _facts(self) -> dict[str, str]:
        """All that may mend it."""
        tools = toolchain.look().facts | {name: compiled.version_of(name) for name in WHEELS}
        code = compiled.fingerprint(self.spec, self.hardware, self.decoder)
        return {**code, **tools, "kindling": handler.__version__}


def passing(error: Exception) -> bool:
    """Whether `error`, or what it came from, says nothing about another try."""
    return any(
        isinstance(each, KindlingError | MemoryError)
        or getattr(each, "errno", None) in UNWRITTEN
        or any(sign in str(each).lower() for sign in PASSING)
        for each in _chain(error)
    )


def _chain(error: BaseException | None) -> list[BaseException]:
    """`error` and what it came from, which may be itself."""
    found: list[BaseException] = []
    while error and error not in found:
        found.append(error)
        error = error.__cause__ or error.__context__
    return found


def gist(error: Exception) -> str:
    """One line about `error`: of a compiler's many, the one that says what is wrong."""
    rows = [row.strip() for row in str(error).splitlines() if row.strip()]
    told = next((row for row in rows if "error: " in row), rows[0] if rows else "")
    return f"{type(error).__name__}: {told}"[:TOLD]
