"""A layer's weight with LoRAs added to it, in place: plain, or in the rounded parts of a quantised layer.

What is added is scale * up @ down (Hu et al. 2021, arXiv:2106.09685, section 4.1), all of it to what the weight was
at first, in float32, and rounded once.

An 8-bit weight lies on its grid, and what a LoRA adds is mostly less than half a step of it: rounded to the nearest,
most would vanish. So it is rounded up or down by chance, as near as it is to either (stochastic rounding; Gupta et al.
2015, arXiv:1502.02551), which on average is exact, and by the same chance each time. The scales stay, but of rows that
would not fit: so a LoRA of weight 0 changes nothing.
"""

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn

from handler.model.adapters.keys import Delta
from handler.model.loading.blockwise import E4M3_MOST
from handler.model.loading.lora import Misfit
from handler.model.loading.quant import QuantisedLinear
from handler.model.loading.rounding import Parts

SEED = 150202551  # any, but one that nobody draws weights with
RANGES = {torch.float8_e4m3fn: (-E4M3_MOST, E4M3_MOST), torch.int8: (-128, 127)}  # of values with a scale for each row
LARGEST = 0x7E  # of 8-bit floats' bytes without the sign; above it there is NaN
PIECE = 1 << 24  # elements that are computed at once: in float32 64 MB, a few times over
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
Terms = Iterable[tuple[Delta, float]]  # what is added, each times its weight


def tensors(layer: nn.Module) -> Parts:
    """What holds the layer's weight."""
    return layer.parts if isinstance(layer, QuantisedLinear) else (cast(Tensor, layer.weight),)


def require(layer: nn.Module, path: str, delta: Delta) -> None:
    """Misfit, which names the layer, unless `delta` can be added to its weight; of a convolution as to a matrix."""
    held, weight = tensors(layer), cast(Tensor, layer.weight)
    down, up = delta.down, delta.up
    fits = up.ndim > 1 and down.ndim > 1 and up.shape[0] == weight.shape[0] and up[0].numel() == down.shape[0]
    if not fits or down[0].numel() != weight[0].numel():
        raise Misfit(
            f"{path} is shared by several GPUs (KINDLING_TP_SIZE)" if _part(layer) else f"{path} has another shape"
        )
    if isinstance(layer, QuantisedLinear) and (held[0].dtype not in RANGES or held[1].dtype != torch.float32):
        raise Misfit(f"{path} has a scale for each block; a worker takes LoRAs in fp8, int8 or 16 bits")
    if not isinstance(layer, QuantisedLinear) and weight.dtype not in FLOATS:
        raise Misfit(f"{path} has no floats")


def _part(layer: nn.Module) -> bool:
    """Whether other processes have the rest of its weight."""
    return isinstance(layer, nn.Linear) and layer.weight.shape != (layer.out_features, layer.in_features)


def add(layer: nn.Module, first: Parts, terms: Terms, device: Any) -> Tensor:
    """Let the weight of `layer` be what it was `first`, and `terms`; computed on `device`, some rows after others.

    Whether all of it is finite, as `device` will know.
    """
    held, matrices = tensors(layer), [_matrices(delta, weight, device) for delta, weight in terms]
    chance = torch.Generator(device).manual_seed(SEED)
    count, finite = max(1, PIECE // held[0][0].numel()), torch.ones((), dtype=torch.bool, device=device)
    for start in range(0, len(held[0]), count):
        rows = slice(start, start + count)
        here = tuple(part[rows].to(device, non_blocking=True) for part in first)
        added = sum(up[rows] @ down for down, up in matrices)
        if isinstance(layer, QuantisedLinear):
            here = _rounded(chance, here[0].float() * here[1] + added, *here)
        else:
            here = (here[0].float() + cast(Tensor, added).view(here[0].shape),)
        finite &= here[-1].to(held[-1].dtype).isfinite().all()  # of a rounded weight, its scales tell
        put(tuple(tensor[rows] for tensor in held), here)
    return finite


def _matrices(delta: Delta, weight: float, device: Any) -> tuple[Tensor, Tensor]:
    down, up = (matrix.to(device, torch.float32).flatten(1) for matrix in (delta.down, delta.up))
    return down, up * (weight * delta.scale)


def put(held: Parts, parts: Parts) -> None:
    """Let memory that is held have these values: whoever shares it, as compiled code does, sees them.

    Host memory has them at once, or what a device still writes there would come after what the host writes next.
    """
    for tensor, part in zip(held, parts, strict=True):
        tensor.copy_(part, non_blocking=tensor.device.type != "cpu")


def _rounded(generator: torch.Generator, whole: Tensor, before: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """`whole` as rounded values (rows, columns) and scales (rows, 1), near what was `before`."""
    low, high = RANGES[before.dtype]
    scale = torch.maximum(scale, whole.abs().amax(1, keepdim=True) / -low)
    exact = (whole / scale).clamp_(low, high)
    chance = torch.rand(exact.shape, generator=generator, device=exact.device)
    if before.dtype == torch.int8:
        return (exact + chance).floor_().clamp_(low, high).to(torch.int8), scale
    return _float8(exact, chance), scale


def _float8(exact: Tensor, chance: Tensor) -> Tensor:
    """Float32 as 8-bit floats, up or down by chance: those of one sign follow each other as their bytes do."""
    size = exact.abs()
    near = size.to(torch.float8_e4m3fn)
    low = near.view(torch.uint8) - (near.float() > size).to(torch.uint8)
    high = (low + 1).clamp_(max=LARGEST)
    least, step = _value(low), _value(high) - _value(low)
    up = chance * step < size - least
    return torch.where(up, high, low).bitwise_or_(torch.signbit(exact).to(torch.uint8) << 7).view(torch.float8_e4m3fn)


def _value(code: Tensor) -> Tensor:
    return code.view(torch.float8_e4m3fn).float()
