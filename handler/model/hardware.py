"""What the model runs on, as a value with its reason. Imports torch only when asked."""

import contextlib
import ctypes
import logging
import math
import os
import resource
import sys
import threading
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from handler.catalog.attention import NATIVE
from handler.catalog.attention import choose as choose_kernel
from handler.catalog.gpus import Gpu, gpu_named
from handler.catalog.models import find
from handler.catalog.precisions import PRECISIONS, choose
from handler.core.errors import DeviceMissing
from handler.core.host import host_memory
from handler.core.processor import processor
from handler.core.settings import Settings
from handler.model.imports import yielding

log = logging.getLogger(__name__)

GPU_DRIVER = Path("/proc/driver/nvidia/version")
GPU_DEVICE = Path("/dev/nvidiactl")  # the other sign of a GPU, for sandboxes that hide /proc
DRIVER_LIBRARY = "libcuda.so.1"
GPU_FOLDER = Path("/proc/driver/nvidia/gpus")
HIDDEN = ("", "-1", "none", "NoDevFiles")  # of CUDA_VISIBLE_DEVICES: whoever says so wants none; the last is Slurm
GIVEN = {  # variables by which a platform, or NVIDIA's container toolkit, says that there is one, unless they say this
    "NVIDIA_VISIBLE_DEVICES": ("", "void", "none"),
    "RUNPOD_GPU_COUNT": ("", "0"),
}
IMAGE = "This image is for GPUs"  # as it says itself, and it may have been started without, as on a laptop
DRIVER = "There is an NVIDIA driver"
CONTEXT_GB = 1.0  # what driver and libraries keep of a GPU's memory; an assumption


@dataclass(frozen=True, slots=True)
class Hardware:
    """A device, a precision, and the kernel of attention: empty until it is measured.

    `name` is the vendor's, `capability` a GPU's compute capability; of its memory others hold `others_gb`, which
    `memory_gb` is without. `processor` says which CPU, `shared` how several draw a picture together, if they do.
    """

    device: str
    name: str
    precision: str
    reason: str
    memory_gb: float = math.inf
    capability: tuple[int, int] | None = None
    attention: str = NATIVE
    processor: str = ""
    others_gb: float = 0.0
    shared: str = ""

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
    """Choose device, precision and, where that needs no measuring, kernel.

    DeviceMissing, with torch's reason, for a GPU that is asked for, or was promised, and that torch does not see. Many
    a laptop has a driver that is too old for torch, or runs the image: there the embedded model, for CPUs, has one.
    """
    with yielding():
        import torch

    present = torch.cuda.is_available()
    asked = settings.device == "cuda" and "KINDLING_DEVICE=cuda"
    if not present and (why := asked or (settings.device == "auto" and promised())):
        told = f"{why}, but torch sees no GPU: {_unseen()}"
        if why not in (DRIVER, IMAGE) or not find(settings.model).embedded:
            raise DeviceMissing(f"{told} KINDLING_DEVICE=cpu draws without one, slowly.", "device")
        log.warning("%s %s is drawn on the CPU, which is enough for it.", told, settings.model)
    device = "cuda" if present and settings.device != "cpu" else "cpu"
    if device == "cpu":
        hardware = _cpu(settings)
    else:
        found = torch.cuda.get_device_properties(0)
        name, capability = torch.cuda.get_device_name(), (found.major, found.minor)
        chosen = choose(settings.precision, device, name, capability)
        left, others = _left(found.total_memory / 1e9, _used(name))
        hardware = Hardware(device, name, *chosen, left, capability, others_gb=others)
    kernel = choose_kernel(settings.attention, hardware.capability, hardware.dtype)
    return replace(hardware, attention=kernel.id if kernel else "")


def looked_at(settings: Settings) -> Hardware:
    """The same for who only looks: of a GPU that torch does not see, the reason, and the CPU."""
    try:
        return detect(settings)
    except DeviceMissing as error:
        if settings.device == "cuda":
            raise
        return replace(detect(settings.model_copy(update={"device": "cpu"})), reason=error.message)


def promised() -> str:
    """By what there should be a GPU, though torch may see none; empty if by nothing, or if it is hidden on purpose."""
    if _hidden():
        return ""
    said = (f"{name}={value}" for name, no in GIVEN.items() if (value := os.environ.get(name, "")) not in no)
    return next(said, DRIVER if sees_gpu() else IMAGE if os.environ.get("IMAGE_CUDA") else "")


def _unseen() -> str:
    """Why torch sees no GPU, in its own words."""
    import torch

    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        first = str(error).partition("\n")[0].rstrip(".")
        todo = "Check the driver, and that the container was started with its GPU (docker run --gpus all)."
        install = "Install a build of torch for CUDA, such as PyPI has; in a checkout, make TORCH=cuda does."
        return f"{first}. {todo if torch.version.cuda else install}"
    return "it was there, and is gone."


def _used(name: str) -> float:
    """GB of the GPU of that name that are not free, but for what torch has and does not use.

    NVML, which makes no context for it, knows of all of a GPU, even where this process has but a slice.
    """
    import torch

    idle = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    if " MIG " not in name:
        with contextlib.suppress(Exception):
            return (torch.cuda.device_memory_used() - idle) / 1e9
    free, total = torch.cuda.mem_get_info()
    return (total - free - idle) / 1e9


def _left(total_gb: float, used_gb: float) -> tuple[float, float]:
    """What of a GPU is this process's to use, and what others hold; each plan counts `CONTEXT_GB` for itself."""
    others = max(0.0, used_gb - CONTEXT_GB)
    return total_gb - others, others


def rented(settings: Settings, gpu: Gpu) -> Hardware:
    """`gpu` as a worker on it will find it; SettingsError where it cannot compute in KINDLING_PRECISION."""
    chosen = choose(settings.precision, "cuda", gpu.name, gpu.capability)
    return Hardware("cuda", gpu.name, *chosen, gpu.memory_gb, gpu.capability)


def _cpu(settings: Settings) -> Hardware:
    chosen = choose(settings.precision, "cpu")
    return Hardware("cpu", "CPU", *chosen, host_memory() / 1e9, processor=processor().name)


def peak_memory(device: str) -> int:
    """The most bytes that this process has had at once: of the GPU as torch counts them, or on a CPU of the host."""
    if device == "cuda":
        return int(sys.modules["torch"].cuda.max_memory_allocated())
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024  # macOS counts bytes, Linux 1024 of them


def sees_gpu() -> bool:
    """Whether there is an NVIDIA driver whose GPUs are not hidden from this process, told without torch."""
    return not _hidden() and (GPU_DRIVER.exists() or GPU_DEVICE.exists())


def _hidden() -> bool:
    first, *_ = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")  # CUDA reads no further than one that is none
    return first.strip() in HIDDEN


def wake(settings: Settings) -> threading.Thread | None:
    """Make the context on the first GPU beside whoever imports torch, which then has it; None where no GPU is meant.

    What goes wrong torch will meet again, and tell.
    """
    if settings.device == "cpu" or not sees_gpu():
        return None
    # As torch has it, but read once, here: else drivers of before CUDA 12.2 load all kernels that there are.
    os.environ.setdefault("CUDA_MODULE_LOADING", "LAZY")
    thread = threading.Thread(target=_make_context, name="context", daemon=True)
    thread.start()
    return thread


def _make_context() -> None:
    """The one that CUDA's runtime shares, so torch too; none of these calls holds the GIL."""
    device, context = ctypes.c_int(), ctypes.c_void_p()
    with contextlib.suppress(OSError, AttributeError):
        cuda = ctypes.CDLL(DRIVER_LIBRARY)
        if not cuda.cuInit(0) and not cuda.cuDeviceGet(ctypes.byref(device), 0):
            cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)


def expected(settings: Settings) -> Hardware:
    """What `detect` will most likely find, told without torch: weights are read while torch is being imported.

    Of a GPU that neither the driver's library nor the table of GPUs tells, the name is empty.
    """
    if settings.device == "cpu" or not sees_gpu():
        return _cpu(settings)
    name, capability, left, others = _from_nvml() or _from_name()
    return Hardware("cuda", name, *choose(settings.precision, "cuda"), left, capability, others_gb=others)


Card = tuple[str, tuple[int, int] | None, float, float]  # as `Hardware` has them


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
    memory = nvml.nvmlDeviceGetMemoryInfo(gpu)
    return nvml.nvmlDeviceGetName(gpu), (major, minor), *_left(memory.total / 1e9, memory.used / 1e9)


def _from_name() -> Card:
    """The GPUs' name as the kernel's driver tells it, if they have one, and what cards of that name are."""
    told: list[str] = []
    with contextlib.suppress(OSError):
        told = [line for path in GPU_FOLDER.glob("*/information") for line in path.read_text().splitlines()]
    names = {line.partition(":")[2].strip() for line in told if line.startswith("Model:")}
    name = names.pop() if len(names) == 1 else ""
    row = gpu_named(name)
    return (name, row.capability, row.memory_gb, 0.0) if row else (name, None, math.inf, 0.0)
