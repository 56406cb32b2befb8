"""Does AOTInductor's C++ half compile and link for CUDA with what is installed here? No GPU is needed, nothing is run.

    python benchmarks/gpuless/toolchain.py    needs a CUDA build of torch, g++ and a libcuda.so.1 that loads

It compiles a linear layer, which has no Triton kernel, for a pretended H100: first as torch alone would (`bare`), then
in the environment that `handler.model.compiling.toolchain` finds (`given`). One line of JSON; exit code 0 if the second
is built.
"""

import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
H100 = SimpleNamespace(
    name="NVIDIA H100", major=9, minor=0, multi_processor_count=132, total_memory=80_000_000_000, warp_size=32,
    regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048, L2_cache_size=52_428_800, gcnArchName="",
)  # fmt: skip

QUICK = {  # of the C++ only whether it can be built matters
    "pattern_matcher": False, "aot_inductor.precompile_headers": False, "aot_inductor.compile_wrapper_opt_level": "O0",
}  # fmt: skip


def pretend() -> None:
    """Let torch believe in an H100 as far as compiling goes."""
    import torch
    from torch._dynamo.device_interface import CudaInterface
    from torch._subclasses import fake_tensor

    told = {
        "is_available": True, "device_count": 1, "current_device": 0, "get_device_properties": H100,
        "get_device_capability": (9, 0), "get_device_name": H100.name, "is_initialized": False, "_lazy_init": None,
        "get_arch_list": ["sm_90"], "synchronize": None, "_maybe_exchange_device": 0, "_exchange_device": 0,
    }  # fmt: skip
    told |= {"get_rng_state": torch.zeros(16, dtype=torch.uint8), "set_rng_state": None}
    for name, answer in told.items():
        setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
    CudaInterface.is_available = CudaInterface.current_device = staticmethod(lambda: True)
    CudaInterface.Worker.get_device_properties = staticmethod(lambda device=None: H100)
    CudaInterface.get_compute_capability = staticmethod(lambda device=None: 90)
    fake_tensor.init_gpu_context = lambda *_: None


def build() -> str:
    """The library that AOTInductor makes of a linear layer on cuda:0."""
    import torch
    from torch._guards import detect_fake_mode
    from torch._inductor import aot_compile
    from torch._subclasses import FakeTensorMode

    from handler.model.compiling.package import OPTIONS

    with FakeTensorMode():
        layer = torch.nn.Linear(16, 16, device="meta", dtype=torch.bfloat16).requires_grad_(False)
        moved(layer)
        program = torch.export.export(layer, (torch.zeros(32, 16, device="cuda:0", dtype=torch.bfloat16),)).module()
    inputs = tuple(node.meta["val"] for node in program.graph.nodes if node.op == "placeholder")
    with detect_fake_mode(inputs):
        moved(program)
        files: Any = aot_compile(program, inputs, {}, options={**OPTIONS, **QUICK})
    return next(file for file in files if str(file).endswith(".so"))


def moved(module: Any) -> None:
    """Let its parameters be fake ones on cuda:0."""
    import torch

    for part in module.modules():
        for name, value in part._parameters.items():
            fake = torch.empty(value.shape, dtype=value.dtype, device="cuda:0")
            part._parameters[name] = torch.nn.Parameter(fake, requires_grad=False)


def tried(environment: contextlib.AbstractContextManager[None]) -> dict[str, Any]:
    """What came of building in `environment`: bytes, or what is wrong."""
    from handler.model.compiling.failures import gist

    start = time.perf_counter()
    try:
        with environment:
            found: dict[str, Any] = {"bytes": Path(build()).stat().st_size}
    except Exception as error:
        found = {"error": gist(error)}
    return found | {"seconds": round(time.perf_counter() - start, 1)}


@contextlib.contextmanager
def cached_nowhere() -> Iterator[None]:
    """A new folder for what Inductor writes: nothing is found there that was built before."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        yield


def main() -> int:
    with cached_nowhere():
        import torch

        from handler.model.compiling import toolchain

        tools = toolchain.look()
        pretend()
        report = {"torch": torch.__version__, **tools.facts, "missing": tools.missing("cuda")}
        report["bare"] = tried(contextlib.nullcontext())
        report["given"] = tried(toolchain.environment())
        print(json.dumps(report))
        return 0 if "bytes" in report["given"] else 1


if __name__ == "__main__":
    sys.exit(main())
