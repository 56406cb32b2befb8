"""Making models on torch's meta device, where tensors have a shape and no values, without what needs none.

Some of what models do there torch does in Python, and imports its compiler for it, or sympy: a second, for nothing.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class Weightless(TorchFunctionMode):
    """On this thread: what would fill a tensor without values does nothing, and what counts is done elsewhere."""

    def __torch_function__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        device, first = kwargs.get("device"), kwargs.get("tensor", args[0] if args else None)
        without = isinstance(first, torch.Tensor) and first.is_meta
        if without and getattr(function, "__module__", "") == "torch.nn.init":
            return first
        if without and function is torch.empty_like and device is not None:
            return torch.empty(first.shape, **{**kwargs, "dtype": kwargs.get("dtype") or first.dtype})
        if function is torch.arange and device is not None and torch.device(device).type == "meta":
            return function(*args, **{**kwargs, "device": "cpu"}).to(device)
        return function(*args, **kwargs)
