"""A CUDA build of torch that believes it has a GPU, over the libraries of `stubs.py`: for lowering, never for running.

Importing this imports torch and puts the answers that torch, Inductor and Triton ask a driver for in their places. Of
which compute capability the GPU is says the environment variable GPULESS_CAPABILITY ("9.0" if unset), which the stub
libcudart reads too: there torch's C++ half asks it. One process, one capability.
"""

import os
from types import SimpleNamespace
from typing import Any

import torch
from torch._dynamo import device_interface
from torch._subclasses import fake_tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

MAJOR, MINOR = (int(part) for part in os.environ.get("GPULESS_CAPABILITY", "9.0").split("."))
CAPABILITY = (MAJOR, MINOR)
CUDNN = 91900  # the release that torch's wheels bring
# Shared memory a block may have: CUDA C Programming Guide, "Technical Specifications per Compute Capability".
SHARED = {(8, 0): 166912, (8, 6): 101376, (8, 9): 101376, (9, 0): 232448, (10, 0): 232448}
# Streaming multiprocessors of the card that stands for the capability: A100, A10G, L40S, H200, B200 (data sheets).
MULTIPROCESSORS = {(8, 0): 108, (8, 6): 80, (8, 9): 142, (9, 0): 132, (10, 0): 148}
PROPERTIES = SimpleNamespace(
    name=f"a GPU of compute capability {MAJOR}.{MINOR}",
    major=MAJOR,
    minor=MINOR,
    multi_processor_count=MULTIPROCESSORS[CAPABILITY],
    total_memory=150_000_000_000,
    warp_size=32,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048 if MINOR == 0 else 1536,
    max_threads_per_block=1024,
    shared_memory_per_block=49152,
    shared_memory_per_block_optin=SHARED[CAPABILITY],
    shared_memory_per_multiprocessor=SHARED[CAPABILITY] + 1024,
    L2_cache_size=50 * 2**20,
    gcnArchName="",
    clock_rate=1_980_000,
    memory_clock_rate=3_201_000,
    memory_bus_width=6144,
)


class Driver:
    """What Triton asks its active driver for while Inductor writes kernels."""

    utils = SimpleNamespace(
        get_device_properties=lambda device: {
            "max_shared_mem": SHARED[CAPABILITY],
            "multiprocessor_count": MULTIPROCESSORS[CAPABILITY],
            "warpSize": 32,
            "max_num_regs": 65536,
        }
    )

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 10 * MAJOR + MINOR, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)

    def get_current_device(self) -> int:
        return 0

    def get_device_interface(self) -> Any:
        return torch.cuda


def _answer() -> None:
    cuda: Any = torch.cuda
    cuda.is_available = lambda: True
    cuda.device_count = lambda: 1
    cuda.current_device = lambda: 0
    cuda.is_initialized = lambda: False
    cuda._lazy_init = lambda: None
    cuda.synchronize = lambda device=None: None
    cuda.get_device_properties = lambda device=None: PROPERTIES
    cuda.get_device_capability = lambda device=None: CAPABILITY
    cuda.get_device_name = lambda device=None: PROPERTIES.name
    cuda.get_arch_list = lambda: [f"sm_{MAJOR}{MINOR}"]
    cuda.is_bf16_supported = lambda including_emulation=True: True
    cuda._maybe_exchange_device = cuda._exchange_device = lambda device: device
    torch.backends.cudnn.version = lambda: CUDNN  # type: ignore[assignment]
    torch.backends.cudnn.is_acceptable = lambda tensor: True
    interface: Any = device_interface.CudaInterface
    interface.is_available = staticmethod(lambda: True)
    interface.current_device = staticmethod(lambda: 0)
    interface.get_compute_capability = staticmethod(lambda device=None: 10 * MAJOR + MINOR)
    interface.get_raw_stream = staticmethod(lambda device: 0)
    interface.Worker.get_device_properties = staticmethod(lambda device=None: PROPERTIES)
    fake_tensor.init_gpu_context = lambda device=None: None
    driver.set_active(Driver())


_answer()
