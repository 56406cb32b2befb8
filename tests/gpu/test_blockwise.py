"""On Blackwell: the GPU's matrix products with a scale for each block, beside their emulation."""

import pytest
import torch

from handler.model.loading.quant import SCHEMES, QuantisedLinear

BLACKWELL = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (10, 0)
pytestmark = pytest.mark.skipif(not BLACKWELL, reason="needs an NVIDIA GPU of compute capability 10.0")


@pytest.mark.parametrize("rows", [1, 100, 4352])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("precision", ["mxfp8", "nvfp4"])
def test_the_gpu_multiplies_what_a_cpu_emulates(precision: str, bias: bool, rows: int) -> None:
    torch.manual_seed(0)
    linear, x = torch.nn.Linear(3072, 9216, bias).bfloat16().requires_grad_(False), torch.randn(rows, 3072).bfloat16()
    layer = QuantisedLinear(linear, SCHEMES[precision], SCHEMES[precision].multiply)
    emulated = layer(x).float()
    found = layer.cuda()(x.cuda()).float().cpu()
    assert (found - emulated).norm() < 0.01 * emulated.norm()
