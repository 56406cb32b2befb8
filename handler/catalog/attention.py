"""The kernels that can compute attention: a row each, with what they need. `attention.py` measures and uses them.

They are torch's own, FlashAttention 3 where its wheel is installed, and cuDNN's in FP8; none is ever fetched.
diffusers' dispatcher calls them by names of its own or, for the last, of ours. Native is what torch prefers: cuDNN's
on new GPUs, FlashAttention 2 on others.
"""

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from handler.core.errors import SettingsError

NATIVE = "native"
CUDNN = 91501  # earlier ones may read beside sequences whose length is no multiple of 128 (pytorch#169849)


@dataclass(frozen=True, slots=True)
class Kernel:
    """One way to compute attention. `backend` is diffusers' name for it; `lacking()` says what is missing here.

    `order` is what torch shall prefer, best first, while blocks are compiled: exported code forgets who asked.
    `module` is what to import before it is used, if it is not diffusers' own; `aside`, why it is never taken unasked.
    """

    id: str
    name: str
    backend: str
    capability: tuple[int, int] = (0, 0)
    below: tuple[int, int] = (99, 0)
    lacking: Callable[[], str] = str
    order: tuple[str, ...] = ()
    module: str = ""
    aside: str = ""


@dataclass(frozen=True, slots=True)
class KernelChoice:
    """A kernel's id, and why it was chosen."""

    id: str
    reason: str


def _old_cudnn() -> str:
    import torch

    has = torch.backends.cudnn.version() or 0
    return "" if has >= CUDNN else f"needs cuDNN {CUDNN} or newer, torch has {has}"


def _no_cudnn_fp8() -> str:
    missing = importlib.util.find_spec("cudnn") is None
    return "the package nvidia-cudnn-frontend is not installed" if missing else _old_cudnn()


def _no_flash3() -> str:
    try:
        importlib.import_module("flash_attn_interface")
    except ModuleNotFoundError:
        return "the package flash_attn_3 is not installed"
    except Exception as error:  # built for another torch, most likely
        return f"the package flash_attn_3 does not work here: {error}"
    return ""


FUSED = (
    "FLASH_ATTENTION",
    "EFFICIENT_ATTENTION",
    "MATH",
)  # torch's names; what cannot do a shape leaves it to the next
KERNELS: Mapping[str, Kernel] = {
    row.id: row
    for row in (
        Kernel(NATIVE, "SDPA", "native"),
        Kernel("cudnn", "cuDNN", "_native_cudnn", (8, 0), lacking=_old_cudnn, order=("CUDNN_ATTENTION", *FUSED)),
        Kernel("flash", "FlashAttention 2", "_native_flash", (8, 0), order=FUSED),
        Kernel("flash3", "FlashAttention 3", "_flash_3", (9, 0), below=(10, 0), lacking=_no_flash3),
        Kernel(
            "cudnn-fp8",
            "cuDNN FP8",
            "kindling_fp8",
            (9, 0),
            lacking=_no_cudnn_fp8,
            module="handler.model.fp8_attention",
            aside="rounds to 8 bits, so only when it is asked for",
        ),
    )
}


def refusal(row: Kernel, capability: tuple[int, int] | None, dtype: str) -> str:
    """Why attention cannot be computed so on a GPU of this compute capability, None for a CPU; empty if it can."""
    if row.id == NATIVE:
        return ""
    if capability is None:
        return "a CPU has only native"
    if not row.capability <= capability < row.below:
        needs = "{}.{}".format(*row.capability) + (" (Hopper)" if row.below < (99, 0) else " or newer")
        return "needs compute capability {}, this GPU has {}.{}".format(needs, *capability)
    if dtype == "float32":
        return "computes in 16-bit floats, and this precision in 32-bit ones"
    return row.lacking()


def refusals(capability: tuple[int, int] | None, dtype: str) -> dict[str, str]:
    """Every kernel, with why this machine does not take it unasked: empty for those that it may."""
    return {row.id: refusal(row, capability, dtype) or row.aside for row in KERNELS.values()}


def backend(kernel: str) -> str:
    """diffusers' name for a kernel, which it knows from now on."""
    row = KERNELS[kernel]
    if row.module:
        importlib.import_module(row.module)
    return row.backend


def choose(asked: str, capability: tuple[int, int] | None, dtype: str) -> KernelChoice | None:
    """What needs no measuring: the kernel that was asked for, or the only one; None where several could be best.

    SettingsError, with the reason, for one that this machine cannot use.
    """
    if asked != "auto":
        if reason := refusal(KERNELS[asked], capability, dtype):
            raise SettingsError(f"KINDLING_ATTENTION={asked}: {reason}. Use auto, or native.", "KINDLING_ATTENTION")
        return KernelChoice(asked, f"KINDLING_ATTENTION={asked}")
    if capability is None:
        return KernelChoice(NATIVE, "a CPU has one")
    refused = {name: why for name, why in refusals(capability, dtype).items() if why}
    if len(refused) < len(KERNELS) - 1:
        return None
    return KernelChoice(NATIVE, "; ".join(f"{KERNELS[name].name} {why}" for name, why in refused.items()))
