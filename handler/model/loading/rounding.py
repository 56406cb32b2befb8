"""Rounding of weights, which is torchao's work: its result as plain tensors, for the layers of `quant.py`.

torchao is imported here alone, and only where weights are rounded: by `bake`, `optimize`, or a start that finds none
baked. Installed, it is found by diffusers and transformers, which import it at every start: 2 seconds, 94 modules and
lines on stderr, for what a worker with baked weights never calls. So `imports.py` hides it from those two.
"""

import contextlib
import importlib
import logging
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from handler.model.loading.blockwise import MX_BLOCK, NV_BLOCK

LEAST = torch.finfo(torch.float32).eps  # the least scale, for zeros; torchao has none for 8-bit floats, and makes NaNs
NOISY = ("torchao", "torchao.prototype", "torch.utils._pytree")  # while it is imported: kernels for other torches
Parts = tuple[Tensor, ...]
Round = Callable[[Tensor], Parts]


def _torchao(module: str) -> Any:
    """A module of torchao, imported without its advice."""
    with _quiet():
        return importlib.import_module(f"torchao.{module}")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    before = [(logger, logger.level) for logger in map(logging.getLogger, NOISY)]
    try:
        for logger, _ in before:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        for logger, level in before:
            logger.setLevel(level)


def by_config(config: str, granularity: str = "PerRow") -> Round:
    """(out, in) -> what `quantize_` with this config makes of it: 8-bit values (out, in), and float32 scales (out, 1).

    One scale for all is there for each row too: so products by such weights take what others take, and become one.
    """

    def parts(weight: Tensor) -> Parts:
        ao, api = _torchao("quantization"), _torchao("quantization.quant_api")
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        layer.weight = nn.Parameter(weight.to(torch.bfloat16), requires_grad=False)  # all it takes, by row
        made = getattr(ao, config)(granularity=getattr(ao, granularity)(), set_inductor_config=False)
        with _any_hardware(api):
            ao.quantize_(layer, made)
        found: Any = layer.weight
        values, scale = found.qdata, found.scale
        exact = values.view(torch.uint8) * (scale > 0)  # a row of zeros came out as 0 / 0
        return exact.view(values.dtype), scale.clamp(min=LEAST).expand(len(values), 1).contiguous()

    return parts


@contextlib.contextmanager
def _any_hardware(api: Any) -> Iterator[None]:
    """Its configs ask for the GPU that multiplies; rounding needs none."""
    check, api._check_hardware_support = api._check_hardware_support, lambda granularity: None
    try:
        yield
    finally:
        api._check_hardware_support = check


def mxfp8(weight: Tensor) -> Parts:
    """As `blockwise.mxfp8`, by torchao."""
    mx, utils = _torchao("prototype.mx_formats.mx_tensor"), _torchao("prototype.mx_formats.utils")
    ceil = mx.ScaleCalculationMode.RCEIL
    scale, values = mx.to_mx(weight.to(torch.bfloat16), torch.float8_e4m3fn, MX_BLOCK, ceil)
    return values, utils.to_blocked(scale.view(torch.uint8))


def nvfp4(weight: Tensor) -> Parts:
    """As `blockwise.nvfp4`, by torchao."""
    nv, utils = _torchao("prototype.mx_formats.nvfp4_tensor"), _torchao("prototype.mx_formats.utils")
    weight = weight.to(torch.bfloat16)
    whole = nv.per_tensor_amax_to_scale(weight.abs().amax()).clamp(min=LEAST)
    scale, values = nv.nvfp4_quantize(weight, NV_BLOCK, whole)
    return values.view(torch.uint8), utils.to_blocked(scale.view(torch.uint8)), whole
