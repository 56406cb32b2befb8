"""Quantised linear layers: one function for each way to multiply, one row for each precision of `precisions.py`.

A weight of n rows becomes q = round(w / s), with a float32 scale s = max|w| / most for each row, or one for all, as
torchao rounds it (`rounding.py`). It keeps that in tensors of its own kind. These here are plain tensors in plain
modules, so the code that reads, checks, assigns, streams, saves and compiles any other weight does so with these too,
and baked weights need no torchao. Activations are rounded here, as they come, and the matrix products are torch's own
(`_scaled_mm`, `_int_mm`), the same that torchao calls; tests hold both to its numbers. Those with a scale for each
block of a row are in `blockwise.py`. No scale of activations is for more than one picture: what is drawn beside a
picture changes nothing of it, and a NaN stays where it is.

Where a picture is made, only the layers of the repeated blocks are quantised, and of those not the ones that make
modulations from the timestep (`KEPT`), which shift and scale everything after them; nor what is before and after the
blocks. Of text encoders all layers are, weights alone and by row: they run once a prompt, and have outliers.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from handler.catalog.precisions import KEPT, PRECISIONS, TIED
from handler.model.loading import rounding
from handler.model.loading.blockwise import E4M3_MOST, mxfp8, nvfp4, times_mxfp8, times_nvfp4
from handler.model.loading.rounding import Parts, Round, by_config
from handler.volume.listing import STEMS

LEAST = 17  # rows of activations that `_int_mm` takes on a GPU
TINY = torch.finfo(torch.float32).eps  # the least scale, for rows of zeros
PARTS = ("rounded", "scale", "whole")  # what a quantised layer's tensors are called; the last is NVFP4's
Multiply = Callable[[Tensor, Parts, Tensor | None], Tensor]


@dataclass(frozen=True, slots=True)
class Scheme:
    """How weights (out, in) become parts, and how activations (pictures, tokens, in) meet those.

    `likewise` rounds activations into parts of the same kind, and so tells what those of a weight without memory are.
    """

    parts: Round
    likewise: Round
    multiply: Multiply


def rounded(values: Tensor, dtype: torch.dtype, most: float, pictures: int = 0) -> tuple[Tensor, Tensor]:
    """`values` (rows, columns) in `dtype`, and the float32 scales (rows, 1): each row's own, or one for each picture's.

    The rows' peaks come first either way, for whatever makes the values finds them on its way.
    """
    peak = values.abs().amax(1, keepdim=True)
    if pictures:
        peak = peak.view(pictures, -1).amax(1, keepdim=True).expand(-1, values.shape[0] // pictures).reshape(-1, 1)
    scale = (peak.float() / most).clamp(min=TINY)
    exact = (values.float() / scale).clamp(-most, most)
    return (exact if dtype.is_floating_point else exact.round()).to(dtype), scale


def weights_alone(x: Tensor, parts: Parts, bias: Tensor | None) -> Tensor:
    """Exact activations, rounded weights, whose 8-bit values a 16-bit float holds exactly: only the product is scaled.

    Scaling the weight first takes three passes over it in float32: 19 bytes a parameter beside the product's 2, not 3.
    """
    weight, scale = parts
    product = nn.functional.linear(x, weight.to(x.dtype)).mul_(scale.t())  # in float32, and rounded once
    return product if bias is None else product.add_(bias)


def fp8(x: Tensor, parts: Parts, bias: Tensor | None, whole: bool = False) -> Tensor:
    """Activations rounded to 8-bit floats as they come: each token by itself or, `whole`, each picture."""
    weight, scale = parts
    rows, row_scale = FP8_ROWS(x.flatten(0, 1), pictures=x.shape[0] if whole else 0)
    return torch._scaled_mm(rows, weight.t(), row_scale, scale.t(), bias=bias, out_dtype=x.dtype, use_fast_accum=True)


def int8(x: Tensor, parts: Parts, bias: Tensor | None) -> Tensor:
    """Activations rounded to 8-bit integers as they come, each token by itself."""
    weight, scale = parts
    x = x.flatten(0, 1)
    missing = torch.sym_max(LEAST - x.shape[0], 0)  # not a branch: compiled code must serve every picture size
    rows, row_scale = INT8_ROWS(nn.functional.pad(x, (0, 0, 0, missing)))
    product = (torch._int_mm(rows, weight.t()).float() * row_scale * scale.t())[: x.shape[0]]
    return (product if bias is None else product + bias.float()).to(x.dtype)


FP8_ROWS = partial(rounded, dtype=torch.float8_e4m3fn, most=E4M3_MOST)
INT8_ROWS = partial(rounded, dtype=torch.int8, most=127)
FP8 = "Float8DynamicActivationFloat8WeightConfig"
SCHEMES = {
    "fp8": Scheme(by_config(FP8), FP8_ROWS, fp8),
    "fp8-tensor": Scheme(by_config(FP8, "PerTensor"), FP8_ROWS, partial(fp8, whole=True)),
    "int8": Scheme(by_config("Int8WeightOnlyConfig"), INT8_ROWS, weights_alone),
    "int8-dynamic": Scheme(by_config("Int8DynamicActivationInt8WeightConfig"), INT8_ROWS, int8),
    "mxfp8": Scheme(rounding.mxfp8, mxfp8, times_mxfp8),
    "nvfp4": Scheme(rounding.nvfp4, nvfp4, times_nvfp4),
}


class QuantisedLinear(nn.Module):
    """nn.Linear over the parts of a weight, by `PARTS`."""

    def __init__(self, linear: nn.Linear, scheme: Scheme, multiply: Multiply) -> None:
        super().__init__()
        weight = linear.weight.detach()
        nothing = weight.is_meta or isinstance(weight, FakeTensor)
        for name, part in zip(PARTS, (scheme.likewise if nothing else scheme.parts)(weight), strict=False):
            self.register_buffer(name, part)
        self.multiply, self.bias = multiply, linear.bias
        self.weight = weight.to("meta")

    @property
    def parts(self) -> Parts:
        """The weight as its scheme keeps it."""
        return tuple(self._buffers[name] for name in PARTS if name in self._buffers)  # type: ignore[misc]

    def forward(self, x: Tensor) -> Tensor:
        """(pictures, tokens, in) -> (pictures, tokens, out); without an axis for pictures it is one."""
        product = self.multiply(x.reshape(-1, *x.shape[-2:]), self.parts, self.bias)
        return product.view(*x.shape[:-1], product.shape[-1])


def quantise(model: nn.Module, precision: str, device: str) -> None:
    """Replace the layers of `model` that `precision` quantises, one after another, each on `device`.

    `model` may be on the host, or without memory at all: then what takes its layers' place has none either.
    """
    for layer in layers(model, precision):
        layer.quantise(device)


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer to quantise, `name` in the module `place`, and how."""

    place: nn.Module
    name: str
    scheme: Scheme
    multiply: Multiply

    @property
    def linear(self) -> Any:
        """As it is so far."""
        return getattr(self.place, self.name)

    def quantise(self, device: str) -> None:
        """Let the quantised layer, made on `device`, take its place."""
        there = self.linear if self.linear.weight.is_meta else self.linear.to(device)
        setattr(self.place, self.name, QuantisedLinear(there, self.scheme, self.multiply))


def layers(model: nn.Module, precision: str) -> list[Layer]:
    """Those of `model` that `precision` quantises."""
    denoises = _denoises(model)
    row = PRECISIONS[precision if denoises else PRECISIONS[precision].encoders or precision]
    scheme = SCHEMES[row.id]
    multiply = scheme.multiply if denoises else weights_alone
    return [Layer(place, name, scheme, multiply) for place, name in _places(model, denoises, row.grid)]


def _denoises(model: nn.Module) -> bool:
    return bool(getattr(model, "_repeated_blocks", None))


def _places(model: nn.Module, denoises: bool, grid: int) -> list[tuple[nn.Module, str]]:
    """The layers to quantise, each by the module that holds it and its name there."""
    kinds: Any = model._repeated_blocks if denoises else [type(model).__name__]
    within, kept = [m for m in model.modules() if type(m).__name__ in kinds], KEPT if denoises else TIED
    return [
        (place, name)
        for block in within
        for path, place in block.named_modules()
        for name, child in place.named_children()
        if type(child) is nn.Linear
        and child.in_features % grid == child.out_features % grid == 0
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
