"""The processor this runs on, told without torch: which one it is, and what instructions it has."""

import contextlib
import platform
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
# What tells kinds of cores apart: on x86, where virtual machines may all have one name, and on ARM, where none has any.
TELLING = (
    *("vendor_id", "cpu family", "model", "stepping"),
    *("CPU implementer", "CPU architecture", "CPU variant", "CPU part", "CPU revision"),
)
X86 = ("abm", "amx", "avx", "bmi", "f16c", "fma", "gfni", "movbe", "popcnt", "sse")  # flags of the kernel's are many
MACOS = ("sysctl", "-n", "machdep.cpu.brand_string")


@dataclass(frozen=True, slots=True)
class Processor:
    """Its kind, and a digest of the instructions it has: code with one that another lacks ends the process there."""

    name: str
    instructions: str


def processor() -> Processor:
    """This machine's; of several kinds of cores all are named."""
    try:
        cores = list(_cores(CPUINFO.read_text()))
    except OSError:  # no Linux
        return Processor(_brand() or platform.machine(), _digest(set()))
    names = sorted({_name(core) for core in cores})
    has = {one for core in cores for one in core.get("Features", "").split()}
    has |= {flag for core in cores for flag in core.get("flags", "").split() if flag.startswith(X86)}
    return Processor(" and ".join(names) or platform.machine(), _digest(has))


def _cores(text: str) -> Iterator[dict[str, str]]:
    for block in text.split("\n\n"):
        rows = (line.partition(":") for line in block.splitlines())
        if core := {name.strip(): value.strip() for name, colon, value in rows if colon}:
            yield core


def _name(core: dict[str, str]) -> str:
    telling = " ".join(core[name] for name in TELLING if name in core)
    return f"{core.get('model name', platform.machine())} ({telling})"


def _brand() -> str:
    """What macOS calls it, as "Apple M2"."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(MACOS, capture_output=True, text=True, check=True, timeout=5).stdout.strip()  # noqa: S603
    return ""


def _digest(names: set[str]) -> str:
    return blake2b(" ".join(sorted(names)).encode(), digest_size=8).hexdigest()
