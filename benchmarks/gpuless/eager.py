"""What a model does when it runs as it is: every operation that reaches the device, on tensors without values."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gpuless.cards import FP8_ATTENTION
from gpuless.work import Work, line

FREE = {  # operations that start no kernel: they look at memory in another way, or only take some
    "_reshape_alias", "_unsafe_view", "alias", "as_strided", "detach", "diagonal", "empty", "empty_like",
    "empty_strided", "expand", "lift_fresh", "movedim", "narrow", "permute", "select", "slice", "split",
    "split_with_sizes", "squeeze", "t", "transpose", "unbind", "unfold", "unsqueeze", "view",
    "view_as_complex", "view_as_real",
}  # fmt: skip
LEFT = {"mm": 0, "bmm": 0, "_scaled_mm": 0, "_int_mm": 0, "addmm": 1, "baddbmm": 1}  # where a product's left side is
ATTENTION = {  # torch's operators, and what their kernels are called here
    "_scaled_dot_product_cudnn_attention": "cudnn",
    "_scaled_dot_product_flash_attention": "flash",
    "_scaled_dot_product_efficient_attention": "efficient",
    "attend_wide": "wide",  # Kindling's own, of an autoencoder
    "attention_fp8": FP8_ATTENTION,  # Kindling's own
}


class Count(TorchDispatchMode):
    """Counts into `work` while it is the mode; not while `paused`."""

    def __init__(self) -> None:
        super().__init__()
        self.work, self.paused = Work(), False

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result, name = function(*args, **(kwargs or {})), function.overloadpacket.__name__
        if self.paused or name in FREE or function.namespace not in ("aten", "kindling"):
            return result
        if heavy := described(name, args, result):
            self.work.add(heavy)
            return result
        tensors = [t for t in tree_leaves((args, kwargs, result)) if isinstance(t, torch.Tensor) and t.is_cuda]
        self.work.launches += bool(tensors)
        self.work.triton_bytes += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return result


def described(name: str, operands: Any, result: Any) -> str:
    """The line of `work.py` for an operation of torch's; empty for one that is not heavy."""
    if name in LEFT:
        left = operands[LEFT[name]]
        return product(left.dtype, left.shape, result.shape)
    if name in ATTENTION:
        return attended(ATTENTION[name], operands[0], operands[1])
    if name == "convolution":
        x, weight = operands[:2]
        pixels = result.shape[2:].numel()
        return line("conv", kind(x.dtype), x.shape[0], *weight.shape[:2], weight.shape[2:].numel(), pixels)
    return ""


def product(dtype: torch.dtype, left: Any, result: Any) -> str:
    """Of matrices, or of one: `left` (..., rows, inner) and `result` (..., rows, columns) are shapes."""
    inner = left[-1] * (2 if dtype is torch.float4_e2m1fn_x2 else 1)  # two in a byte
    return line("mm", kind(dtype), *([1] if len(left) == 2 else []), *result, inner)


def attended(kernel: str, queries: Any, keys: Any) -> str:
    """Of tensors (pictures, heads, tokens, width), or for attention in FP8 (pictures, tokens, heads, width)."""
    return attention_line(kernel, queries.dtype, list(queries.shape), list(keys.shape))


def attention_line(kernel: str, dtype: torch.dtype, queries: list[int], keys: list[int]) -> str:
    """The same of shapes."""
    pictures, *both, width = queries
    heads, tokens, others = (both[1], both[0], keys[1]) if kernel == FP8_ATTENTION else (*both, keys[2])
    return line(kernel, kind(dtype), pictures, heads, tokens, others, width)


def kind(dtype: torch.dtype) -> str:
    """torch.bfloat16 -> bfloat16"""
    return str(dtype).removeprefix("torch.")


def counted(call: Callable[[], object], pausing: Callable[[Count], object] = lambda count: None) -> Work:
    """What `call` does; `pausing` may let parts of the model pause the count."""
    with torch.no_grad(), Count() as count:  # inference mode would hide what operations are made of
        pausing(count)
        call()
    return count.work
