"""Weights that one product of compiled code multiplies, one after another in memory; layers keep them as slices."""

from collections.abc import Iterable, Mapping
from typing import Any

ALIGNMENT = 16  # bytes: where kernels want every weight to start
Merged = Mapping[str, list[str]]  # the weights that a constant of compiled code consists of


def joined(weights: Mapping[str, Any], merged: Merged) -> dict[str, Any]:
    """The tensors that `merged` names; the block's own `weights` share their memory from now on.

    Weights that are views of a file's memory change places within it, so nothing is there twice; nobody else may
    hold them.
    """
    import torch

    with torch.inference_mode(False), torch.no_grad():
        groups = {name: [weights[part] for part in parts] for name, parts in merged.items()}
        for parts in groups.values():
            if not _adjacent(parts):
                _gather(parts, list(weights.values()))
        return {name: _whole(parts) for name, parts in groups.items()}


def _adjacent(tensors: list[Any]) -> bool:
    """Whether each begins where the one before it ends, in the same allocation."""
    first, *rest = tensors
    end = first.data_ptr() + first.nbytes
    for tensor in rest:
        if tensor.data_ptr() != end or tensor.untyped_storage().data_ptr() != first.untyped_storage().data_ptr():
            return False
        end += tensor.nbytes
    return all(tensor.is_contiguous() for tensor in tensors)


def _gather(parts: list[Any], others: list[Any]) -> None:
    """Let `parts` be adjacent: where they are, if all that lies between them is known, else in new memory."""
    import torch

    start = min(part.data_ptr() for part in parts)
    stop = max(part.data_ptr() + part.nbytes for part in parts)
    between = sorted((each for each in others if start <= each.data_ptr() < stop), key=lambda each: each.data_ptr())
    if _adjacent(between) and not any(each.nbytes % ALIGNMENT for each in between):
        moved = [*parts, *(each for each in between if all(each is not part for part in parts))]
        offset = start - parts[0].untyped_storage().data_ptr()
        memory = _within(parts[0], torch.uint8, offset, (stop - start,)).copy_(as_bytes(moved, flat=True))
    else:
        moved, memory = parts, as_bytes(parts, flat=True)
    for tensor, piece in zip(moved, memory.split([each.nbytes for each in moved]), strict=True):
        tensor.data = piece.view(tensor.dtype).view(tensor.shape)


def _whole(parts: list[Any]) -> Any:
    """Adjacent tensors as one."""
    first, rows = parts[0], sum(part.shape[0] for part in parts)
    return _within(first, first.dtype, first.storage_offset(), (rows, *first.shape[1:]))


def _within(tensor: Any, dtype: Any, offset: int, shape: tuple[int, ...]) -> Any:
    """What is `offset` elements into the allocation of `tensor`, which may be made for inference only."""
    import torch

    there = torch.empty(0, dtype=dtype, device=tensor.device)
    return there.set_(tensor.untyped_storage(), offset, torch.Size(shape), torch.empty(shape, device="meta").stride())


def as_bytes(tensors: Iterable[Any], flat: bool = False) -> Any:
    """All rows of `tensors`, one after another, as bytes: there are dtypes that cannot be concatenated."""
    import torch

    rows = (tensor.contiguous().view(torch.uint8) for tensor in tensors)
    return torch.cat([each.flatten() if flat else each for each in rows])
