"""What a process and its device tell right now. A GPU is asked for it, which may take its time, or for ever."""

import contextlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

Values = dict[str, float]


def cuda_of(device: str) -> ModuleType | None:
    """torch's module for the GPU, if that is where this process draws."""
    return sys.modules["torch"].cuda if device == "cuda" else None


def _memory(cuda: ModuleType) -> Values:
    free, total = cuda.mem_get_info()
    return {"gpu_peak": cuda.max_memory_allocated(), "gpu_used": total - free, "gpu_total": total}


def _kept(cuda: ModuleType) -> Values:
    kept = cuda.memory_reserved()
    return {"gpu_kept": kept, "gpu_unused": kept - cuda.memory_allocated()}


# The last two are NVML's, which torch has where the package nvidia-ml-py is installed.
OF_GPUS: tuple[Callable[[ModuleType], Values], ...] = (
    _memory,
    _kept,
    lambda cuda: {"gpu_utilization": cuda.utilization() * 0.01},
    lambda cuda: {"gpu_temperature": cuda.temperature()},
)


def readings(device: str) -> Values:
    """Bytes of memory, how busy (0 to 1) and how warm (Celsius) the GPU is, where this process draws on one.

    `gpu_kept` is what torch keeps of it, `gpu_unused` as much of that as no tensor has. A lost GPU, one without the
    reading, no NVML, no /proc: the rest is told all the same.
    """
    found = Values()
    with contextlib.suppress(Exception):
        status = Path("/proc/self/status").read_text()
        found["host_peak"] = float(status.partition("VmHWM:")[2].split()[0]) * 1024
    if cuda := cuda_of(device):
        for read in OF_GPUS:
            with contextlib.suppress(Exception):
                found |= read(cuda)
    return found
