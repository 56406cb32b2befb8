"""Quantised linear layers: one function for each way to multiply, one row for each precision of `precisions.py`.

A weight of n rows becomes q = round(w / s), with a float32 scale s = max|w| / most for each row, or one for all. The
matrix products are torch's own (`_scaled_mm`, `_int_mm`), the same that torchao calls; a test holds the error to be no
larger than torchao's. torchao itself wraps weights into tensors of its own kind. These here are plain tensors in plain
modules, so the code that reads, checks, assigns, streams, saves and compiles any other weight does so with these too.

Where a picture is made, only the layers of the repeated blocks are quantised, and of those not the ones that make
modulations from the timestep (`KEPT`), which shift and scale everything after them; nor what is before and after the
blocks. Of text encoders all layers are, weights alone: they run once a prompt, and their activations have outliers.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from handler.reader import STEMS

KEPT = ("norm", "mod")  # in the names of layers of a denoiser that stay as they are
TIED = ("lm_head",)  # a text encoder's layer that is its embeddings again, and is not run
GRID = 16  # what both sides of a matrix must be a multiple of, for the GPU's kernels
LEAST = 17  # rows of activations that `_int_mm` takes on a GPU
TINY = torch.finfo(torch.float32).eps  # the least scale, for rows of zeros
ROUNDED, SCALE = "rounded", "scale"  # what a quantised layer's tensors are called
Multiply = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


@dataclass(frozen=True, slots=True)
class Scheme:
    """How weights are kept, and how activations (rows, in) meet them (out, in)."""

    dtype: torch.dtype
    most: float
    multiply: Multiply
    each_row: bool = True


def rounded(values: Tensor, dtype: torch.dtype, most: float, each_row: bool = True) -> tuple[Tensor, Tensor]:
    """`values` (rows, columns) in `dtype`, and the float32 scales: (rows, 1), or (1, 1)."""
    peak = values.abs().amax(1, keepdim=True) if each_row else values.abs().amax().reshape(1, 1)
    scale = (peak.float() / most).clamp(min=TINY)
    exact = (values.float() / scale).clamp(-most, most)
    return (exact if dtype.is_floating_point else exact.round()).to(dtype), scale


def weights_alone(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """Exact activations, rounded weights."""
    return nn.functional.linear(x, (weight.to(torch.float32) * scale).to(x.dtype), bias)


def fp8(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, each_row: bool = True) -> Tensor:
    """Activations rounded to 8-bit floats as they come."""
    rows, row_scale = rounded(x, weight.dtype, E4M3.most, each_row)
    return torch._scaled_mm(rows, weight.t(), row_scale, scale.t(), bias=bias, out_dtype=x.dtype, use_fast_accum=True)


def fp8_tensor(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """The same with one scale for all rows."""
    return fp8(x, weight, scale, bias, each_row=False)


def int8(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """Activations rounded to 8-bit integers as they come."""
    missing = torch.sym_max(LEAST - x.shape[0], 0)  # not a branch: compiled code must serve every picture size
    rows, row_scale = rounded(nn.functional.pad(x, (0, 0, 0, missing)), torch.int8, 127)
    product = (torch._int_mm(rows, weight.t()).float() * row_scale * scale.t())[: x.shape[0]]
    return (product if bias is None else product + bias.float()).to(x.dtype)


E4M3 = Scheme(torch.float8_e4m3fn, 448, fp8)
SCHEMES = {
    "fp8": E4M3,
    "fp8-tensor": Scheme(torch.float8_e4m3fn, 448, fp8_tensor, each_row=False),
    "int8": Scheme(torch.int8, 127, weights_alone),
    "int8-dynamic": Scheme(torch.int8, 127, int8),
}


class QuantisedLinear(nn.Module):
    """nn.Linear over `rounded` (out, in) and `scale`."""

    rounded: Tensor
    scale: Tensor

    def __init__(self, linear: nn.Linear, scheme: Scheme, multiply: Multiply) -> None:
        super().__init__()
        self.multiply = multiply
        rounded_weight, scale = rounded(linear.weight.detach(), scheme.dtype, scheme.most, scheme.each_row)
        self.register_buffer(ROUNDED, rounded_weight)
        self.register_buffer(SCALE, scale)
        self.bias = linear.bias
        self.dtype = linear.weight.dtype

    @property
    def weight(self) -> Tensor:
        """What the layer multiplies by, for code that looks at it, as T5's does at its dtype."""
        return (self.rounded.float() * self.scale).to(self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)"""
        flat = self.multiply(x.reshape(-1, x.shape[-1]), self.rounded, self.scale, self.bias)
        return flat.view(*x.shape[:-1], flat.shape[-1])


def quantise(model: nn.Module, precision: str, device: str) -> None:
    """Replace the layers of `model` that `precision` quantises, one after another, each on `device`.

    `model` may be on the host, or without memory at all: then what takes its layers' place has none either.
    """
    scheme, denoises = SCHEMES[precision], _denoises(model)
    multiply = scheme.multiply if denoises else weights_alone
    for place, name, linear in _layers(model, denoises):
        there = linear if linear.weight.is_meta else linear.to(device)
        setattr(place, name, QuantisedLinear(there, scheme, multiply))


def _denoises(model: nn.Module) -> bool:
    return bool(getattr(model, "_repeated_blocks", None))


def _layers(model: nn.Module, denoises: bool) -> list[tuple[nn.Module, str, nn.Linear]]:
    """The layers to quantise, each with the module that holds it and its name there."""
    kinds: Any = model._repeated_blocks if denoises else [type(model).__name__]
    within, kept = [m for m in model.modules() if type(m).__name__ in kinds], KEPT if denoises else TIED
    return [
        (place, name, child)
        for block in within
        for path, place in block.named_modules()
        for name, child in place.named_children()
        if type(child) is nn.Linear
        and child.in_features % GRID == child.out_features % GRID == 0
        and not any(word in f"{path}.{name}" for word in kept)
    ]


def is_quantised(model: Any) -> bool:
    """Whether any layer of `model` is."""
    return isinstance(model, nn.Module) and any(isinstance(module, QuantisedLinear) for module in model.modules())


def save(pipeline: Any, folder: Path) -> None:
    """Write a quantised pipeline in diffusers' layout, rounded weights under the names that the modules give them."""
    pipeline.save_config(folder)
    for name, part in pipeline.components.items():
        if part is None:
            continue
        if not is_quantised(part):
            part.save_pretrained(folder / name)
            continue
        ours = hasattr(part, "save_config")
        (part.save_config if ours else part.config.save_pretrained)(folder / name)
        tied = {tensor.data_ptr(): key for key, tensor in reversed(part.state_dict().items())}
        once = {key: tensor.contiguous() for key, tensor in part.state_dict().items() if tied[tensor.data_ptr()] == key}
        save_file(once, folder / name / f"{STEMS['diffusers' if ours else 'transformers']}.safetensors")
