"""What the model runs on, as a value with its reason. Imports torch only when asked."""

import math
import os
from dataclasses import dataclass
from pathlib import Path

from handler.errors import DeviceMissing
from handler.settings import Settings

CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
GPU_DRIVER = Path("/proc/driver/nvidia/version")
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


@dataclass(frozen=True, slots=True)
class Hardware:
    """A device and a precision. `name` is the vendor's; `dtype` is torch's name of `precision`; memory is in all."""

    device: str
    name: str
    precision: str
    reason: str
    memory_gb: float = math.inf

    @property
    def dtype(self) -> str:
        return DTYPES[self.precision]


def detect(settings: Settings) -> Hardware:
    """Choose device and precision; DeviceMissing if a GPU is demanded and absent."""
    import torch

    present = torch.cuda.is_available()
    if settings.device == "cuda" and not present:
        raise DeviceMissing("KINDLING_DEVICE=cuda, but torch sees no GPU. Check the driver, or use auto.", "device")
    device = "cuda" if present and settings.device != "cpu" else "cpu"
    precision, reason = choose_precision(settings.precision, device)
    if device == "cpu":
        return Hardware(device, "CPU", precision, reason, host_memory() / 1e9)
    memory = torch.cuda.get_device_properties(0).total_memory
    return Hardware(device, torch.cuda.get_device_name(), precision, reason, memory / 1e9)


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
    return choose_precision(settings.precision, "cuda" if gpu else "cpu")[0]


def choose_precision(asked: str, device: str) -> tuple[str, str]:
    """The precision and why."""
    if asked != "auto":
        return asked, f"KINDLING_PRECISION={asked}"
    if device == "cuda":
        return "bf16", "a GPU: bf16 halves the bytes and keeps fp32's range"
    return "fp32", "a CPU: fp32 is exact and no slower"
