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
    """These bytes as the tensor that `slot` says, turned; still packed, if it is. A view, where it is aligned."""
    dtype = dtype_of(slot)
    flat = flat.clone() if flat.storage_offset() % max(dtype.itemsize, alignment) else flat
    if slot.packed in BLOCK:
        return flat
    plain = flat.view(dtype)
    return _turned(plain.view(slot.shape[::-1] if slot.turn == "transpose" else slot.shape), slot)


def unpacked(seen: Any, slot: Slot, scale: Any, dtype: Any) -> Any:
    """What `viewed` gave as floats of `dtype`, on the device it is on."""
    if slot.packed in BLOCK:
        shape = slot.shape[::-1] if slot.turn == "transpose" else slot.shape
        return _turned(_from_blocks(seen, slot.packed, dtype).reshape(shape), slot)
    if scale is None:
        return seen.to(dtype)
    import torch

    scale = scale.to(seen.device)
    floats = seen.to(torch.float32) * (
        scale.reshape(-1, *[1] * (seen.ndim - 1)) if scale.numel() > 1 else scale.reshape(())
    )
    if slot.rotated:
        grouped = floats.reshape(*floats.shape[:-1], -1, slot.rotated)
        floats = (grouped @ _hadamard(slot.rotated).to(seen.device)).reshape(floats.shape)
    return floats.to(dtype)


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
