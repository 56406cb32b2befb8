"""Does AOTInductor's C++ for CUDA compile and link? A linear layer, which needs no Triton kernel, is all it takes.

python -m gpuless.link           (says where the library is, or ends with the compiler's error)
"""

import os
import sysconfig
import tempfile
import warnings
from pathlib import Path

import torch
from torch._inductor import aot_compile
from torch._subclasses import FakeTensorMode
from torch.utils import cpp_extension

from gpuless import device, inductor
from handler import blocks

HOME = (
    Path(sysconfig.get_path("purelib")) / "nvidia" / "cu13"
)  # the headers' wheels, and the stub of the driver's library


def main() -> None:
    """Build it."""
    warnings.simplefilter("ignore")
    cpp_extension.CUDA_HOME = os.environ["CUDA_HOME"] = str(HOME)
    os.environ["LIBRARY_PATH"] = str(HOME / "lib")
    with FakeTensorMode(), torch.device("cuda"):
        layer = inductor.fill(torch.nn.Linear(16, 16, dtype=torch.bfloat16, device="meta"))
        module = torch.export.export(layer, (torch.zeros(32, 16, dtype=torch.bfloat16),)).module()
    values = inductor.placeholders(module)
    with tempfile.TemporaryDirectory() as folder, inductor.mode_of(values), inductor.distinct_weights():
        inductor.fill(module)
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        files = aot_compile(module, tuple(values), {}, options=blocks.OPTIONS)
    print(f"compute capability {device.CAPABILITY}:", *(Path(file).name for file in files))


if __name__ == "__main__":
    main()
