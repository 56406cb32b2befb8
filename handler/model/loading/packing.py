"""Packing: the bytes of a tensor in a file -> a tensor, of floats that people made smaller too.

8-bit floats and integers have a scale for the whole or for each row. Rotated weights were multiplied, so many columns
at a time, by a regular Hadamard matrix (comfy-kitchen's ConvRot), which is its own inverse. GGUF's blocks are read by
diffusers' functions, on the device that the weights are for.
"""

from functools import cache
from typing import Any

from handler.volume.gguf import BLOCKS
from handler.volume.layout import Slot

BLOCK = {name: (weights, width) for name, weights, width in BLOCKS.values()}


def dtype_of(slot: Slot) -> Any:
    """torch's own, of what is in the file."""
    import torch

    return torch.uint8 if slot.packed in BLOCK else getattr(torch, slot.packed or slot.dtype)


def viewed(flat: Any, slot: Slot, alignment: int = 1) -> Any:
    """These bytes as the tensor that `slot` says; what is packed is so still, and not turned. A view, if aligned."""
    dtype = dtype_of(slot)
    flat = flat.clone() if flat.storage_offset() % max(dtype.itemsize, alignment) else flat
    if slot.packed in BLOCK:
        return flat
    plain = flat.view(dtype).view(_before(slot))
    return plain if slot.packed else _turned(plain, slot)


def unpacked(seen: Any, slot: Slot, scale: Any, dtype: Any) -> Any:
    """What `viewed` gave as floats of `dtype`, turned, on the device it is on."""
    if slot.packed in BLOCK:
        return _turned(_from_blocks(seen, slot.packed, dtype).reshape(_before(slot)), slot)
    if scale is None:
        return _turned(seen.to(dtype), slot)
    floats = seen.float() * scale.to(seen.device).reshape(-1, *[1] * (seen.ndim - 1))
    if slot.rotated:
        grouped = floats.reshape(*floats.shape[:-1], -1, slot.rotated)
        floats = (grouped @ _hadamard(slot.rotated).to(seen.device)).reshape(floats.shape)
    return _turned(floats.to(dtype), slot)


def _before(slot: Slot) -> tuple[int, ...]:
    """Its shape in the file."""
    return slot.shape[::-1] if slot.turn == "transpose" else slot.shape


def _turned(tensor: Any, slot: Slot) -> Any:
    import torch

    match slot.turn:
        case "swap":
            return torch.cat(tensor.chunk(2)[::-1])
        case "transpose":
            return tensor.t().contiguous()
        case _:
            return tensor


@cache
def _hadamard(size: int) -> Any:
    """Regular, symmetric and orthogonal: a power of four's."""
    import torch

    four = torch.ones(4, 4) - 2 * torch.eye(4).flip(1)
    made = four
    while len(made) < size:
        made = torch.kron(made, four)
    return made / size**0.5


def _from_blocks(seen: Any, kind: str, dtype: Any) -> Any:
    """(bytes) -> (weights), in float32 until the last."""
    import torch
    from diffusers.quantizers.gguf.utils import dequantize_functions
    from gguf import GGMLQuantizationType

    weights, width = BLOCK[kind]
    function: Any = dequantize_functions[GGMLQuantizationType[kind]]
    return function(seen.view(-1, width), weights, width, torch.float32).to(dtype)
