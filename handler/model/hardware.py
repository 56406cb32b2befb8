"""What the model runs on, as a value with its reason. Imports torch only when asked."""

import contextlib
import math
import re
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from handler.catalog.attention import NATIVE
from handler.catalog.attention import choose as choose_kernel
from handler.catalog.precisions import PRECISIONS, choose
from handler.core.errors import DeviceMissing
from handler.core.host import host_memory
from handler.core.processor import processor
from handler.core.settings import Settings

GPU_DRIVER = Path("/proc/driver/nvidia/version")
GPU_DEVICE = Path("/dev/nvidiactl")  # the other sign of a GPU, for sandboxes that hide /proc
GPUS = Path("/proc/driver/nvidia/gpus")
CARDS = {  # by words that the driver's name of a GPU must all have: compute capability, and GB
    "L4": ((8, 9), 24),
    "L40S": ((8, 9), 48),
    "L40": ((8, 9), 48),
    "RTX 4090": ((8, 9), 24),
    "RTX 6000 Ada": ((8, 9), 48),
    "T4": ((7, 5), 16),
    "A10": ((8, 6), 24),
    "A10G": ((8, 6), 24),
    "RTX 3090": ((8, 6), 24),
    "RTX A5000": ((8, 6), 24),
    "RTX A6000": ((8, 6), 48),
    "A40": ((8, 6), 48),
    "A100 80GB": ((8, 0), 80),
    "A100": ((8, 0), 40),
    "H100": ((9, 0), 80),
    "H200": ((9, 0), 141),
    "B200": ((10, 0), 180),
    "RTX PRO 6000": ((12, 0), 96),
}


@dataclass(frozen=True, slots=True)
class Hardware:
    """A device, a precision, and the kernel of attention: empty until it is measured.

    `name` is the vendor's, `capability` a GPU's compute capability, memory is in all; `processor` says which CPU.
    """

    device: str
    name: str
    precision: str
    reason: str
    memory_gb: float = math.inf
    capability: tuple[int, int] | None = None
    attention: str = NATIVE
    processor: str = ""

    @property
    def identity(self) -> str:
        """What is measured here holds for this: a GPU by its name, a CPU by which it is. Empty if not known."""
        return f"{self.name} {self.processor}".strip()

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
        hardware = _cpu(settings)
    else:
        found = torch.cuda.get_device_properties(0)
        name, capability = torch.cuda.get_device_name(), (found.major, found.minor)
        chosen = choose(settings.precision, device, name, capability)
        hardware = Hardware(device, name, *chosen, found.total_memory / 1e9, capability)
    kernel = choose_kernel(settings.attention, hardware.capability, hardware.dtype)
    return replace(hardware, attention=kernel.id if kernel else "")


def _cpu(settings: Settings) -> Hardware:
    chosen = choose(settings.precision, "cpu")
    return Hardware("cpu", "CPU", *chosen, host_memory() / 1e9, processor=processor().name)


def sees_gpu() -> bool:
    """Whether there is an NVIDIA driver, told without torch."""
    return GPU_DRIVER.exists() or GPU_DEVICE.exists()


def expected(settings: Settings) -> Hardware:
    """What `detect` will most likely find, told without torch: weights are read while torch is being imported.

    Of a GPU that neither the driver's library nor the table of cards tells, the name is empty.
    """
    if settings.device == "cpu" or not sees_gpu():
        return _cpu(settings)
    name, capability, memory_gb = _from_nvml() or _from_name()
    return Hardware("cuda", name, *choose(settings.precision, "cuda"), memory_gb, capability)


Card = tuple[str, tuple[int, int] | None, float]


def _from_nvml() -> Card | None:
    """The GPU as the driver's own library tells it, in a few milliseconds; None of several that are not alike.

    Which of those torch takes first is its own affair, and CUDA_VISIBLE_DEVICES'.
    """
    with contextlib.suppress(Exception):
        import pynvml

        pynvml.nvmlInit()
        gpus = map(pynvml.nvmlDeviceGetHandleByIndex, range(pynvml.nvmlDeviceGetCount()))
        [card] = {_card(pynvml, gpu) for gpu in gpus}
        return card
    return None


def _card(nvml: ModuleType, gpu: Any) -> Card:
    major, minor = nvml.nvmlDeviceGetCudaComputeCapability(gpu)
    return nvml.nvmlDeviceGetName(gpu), (major, minor), nvml.nvmlDeviceGetMemoryInfo(gpu).total / 1e9


def _from_name() -> Card:
    """The GPUs' name as the kernel's driver tells it, if they have one, and what cards of that name are."""
    told: list[str] = []
    with contextlib.suppress(OSError):
        told = [line for path in GPUS.glob("*/information") for line in path.read_text().splitlines()]
    names = {line.partition(":")[2].strip() for line in told if line.startswith("Model:")}
    name = names.pop() if len(names) == 1 else ""
    for card, (capability, memory_gb) in CARDS.items():
        if _words(card) <= _words(name):
            return name, capability, memory_gb
    return name, None, math.inf


def _words(name: str) -> set[str]:
    return set(re.split(r"[^a-z0-9]+", name.lower()))
