"""What the model runs on, as a value with its reason. Imports torch only when asked."""

import contextlib
import math
import os
from dataclasses import dataclass, replace
from pathlib import Path

from handler.errors import DeviceMissing
from handler.kernels import NATIVE
from handler.kernels import choose as choose_kernel
from handler.precisions import PRECISIONS, choose
from handler.settings import Settings

CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
GPU_DRIVER = Path("/proc/driver/nvidia/version")
GPUS = Path("/proc/driver/nvidia/gpus")


@dataclass(frozen=True, slots=True)
class Hardware:
    """A device, a precision, and the kernel of attention: empty until it is measured.

    `name` is the vendor's, `capability` a GPU's compute capability, memory is in all.
    """

    device: str
    name: str
    precision: str
    reason: str
    memory_gb: float = math.inf
    capability: tuple[int, int] | None = None
    attention: str = NATIVE

    @property
    def dtype(self) -> str:
        """torch's name of what pictures are computed in."""
        row = PRECISIONS[self.precision]
        return row.on_cpu if self.device == "cpu" else row.activations

    @property
    def quantised(self) -> bool:
        return PRECISIONS[self.precision].quantised


def detect(settings: Settings) -> Hardware:
    """Choose device, precision and, where that needs no measuring, kernel; DeviceMissing for a GPU that is absent."""
    import torch

    present = torch.cuda.is_available()
    if settings.device == "cuda" and not present:
        raise DeviceMissing("KINDLING_DEVICE=cuda, but torch sees no GPU. Check the driver, or use auto.", "device")
    device = "cuda" if present and settings.device != "cpu" else "cpu"
    if device == "cpu":
        hardware = Hardware(device, "CPU", *choose(settings.precision, device), host_memory() / 1e9)
    else:
        found = torch.cuda.get_device_properties(0)
        name, capability = torch.cuda.get_device_name(), (found.major, found.minor)
        chosen = choose(settings.precision, device, name, capability)
        hardware = Hardware(device, name, *chosen, found.total_memory / 1e9, capability)
    kernel = choose_kernel(settings.attention, hardware.capability, hardware.dtype)
    return replace(hardware, attention=kernel.id if kernel else "")


def host_memory() -> int:
    """Bytes this process may use: the machine's, or its container's if that has fewer."""
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        limit = CGROUP_LIMIT.read_text().strip()
    except OSError:
        return machine
    return min(machine, int(limit)) if limit.isdigit() else machine


def expected_precision(settings: Settings) -> str:
    """What `detect` will most likely choose, told without torch: weights are read while torch is being imported."""
    gpu = settings.device != "cpu" and GPU_DRIVER.exists()
    return choose(settings.precision, "cuda" if gpu else "cpu")[0]


def expected_name(settings: Settings) -> str | None:
    """What `detect` will most likely call the device, told without torch; None where the driver does not say."""
    if settings.device == "cpu" or not GPU_DRIVER.exists():
        return "CPU"
    told: list[str] = []
    with contextlib.suppress(OSError):
        told = [line for path in GPUS.glob("*/information") for line in path.read_text().splitlines()]
    names = {line.partition(":")[2].strip() for line in told if line.startswith("Model:")}
    return names.pop() if len(names) == 1 else None
