"""Filling: a model whose weights are not served as its files have them, tensor by tensor as the reader brings them.

The model is made first, over memory that nobody has touched and that so takes none: the libraries rename and tie what
they like, and each placeholder is found again by where it is. Then each tensor is changed as it arrives, to the type
that is served or to rounded parts, and what was read of its file goes: no model is there twice, nor once in a wider
type.
"""

import importlib
import itertools
import mmap
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from handler.core.host import trim
from handler.model.loading import lora
from handler.model.loading.modules import Made
from handler.model.loading.packing import dtype_of, unpacked, viewed
from handler.model.tensor_parallel import Shard
from handler.volume.layout import FLOATS, Slot, layout, read_layout
from handler.volume.manifest import CHUNK
from handler.volume.reader import Reader, ReadFile
from handler.volume.room import reading

Slots = Mapping[str, Slot]
Files = Mapping[ReadFile, Slots]
Maker = Callable[[dict[str, Any]], Made]
Changes = Mapping[str, Any]


def layouts(files: list[ReadFile]) -> dict[ReadFile, Slots]:
    """What each file holds; WeightsCorrupt if one is none of safetensors, or has what another has."""
    found: dict[ReadFile, Slots] = {}
    for file in files:
        slots = _read(file)
        if twice := next((name for name in slots for other in found.values() if name in other), None):
            raise file.corrupt(f"has {twice}, as another file of {file.path.parent.name} does")
        found[file] = slots
    return found


def _read(file: ReadFile) -> Slots:
    if file.slots is not None:
        return file.slots
    try:
        with reading(file.path):
            return read_layout(file.path)
    except ValueError as error:
        raise file.corrupt(f"is no whole safetensors file: {error}") from None


def slots_of(file: ReadFile) -> Slots:
    """What `file` holds, by its bytes that are there, and were checked."""
    if file.slots is not None:
        return file.slots
    try:
        return layout(memoryview(file.memory), len(file.memory))
    except ValueError as error:
        raise file.corrupt(f"is no whole safetensors file: {error}") from None


def as_served(files: Files, dtype: Any) -> bool:
    """Whether every float is of the type that is computed in already, and lies among its own."""
    each = [slot for slots in files.values() for slot in slots.values()]
    if any(slot.packed for slot in each) or any(2 * len(file.chunks) * CHUNK < len(file.memory) for file in files):
        return False
    found = {slot.dtype for slot in each}
    return found.intersection(FLOATS) <= {str(dtype).removeprefix("torch.")}


def fill(
    reader: Reader, files: Files, make: Maker, dtype: Any, place: str, precision: str, changes: Changes, shard: Shard
) -> Made:
    """The model that `make` makes of the tensors in `files`, floats in `dtype` on `place`, with what does not fit.

    Where `precision` is none but rounded, so are its layers. `changes` is a LoRA to add first, or empty. Misfit if
    that does not fit. The model has this `shard` of them.
    """
    given = {name: _placeholder(slot, dtype) for slots in files.values() for name, slot in slots.items()}
    changed = lora.named(given, changes)
    model, faults = make(dict(given))
    if any(faults.values()):
        return model, faults
    if lost := given.keys() - _found(model, given):
        early = {name: _early(reader, files, name, dtype) for name in lost}
        for name in lost & changed:
            lora.add(early[name], name, changes)
        model, faults = make(given | early)
    layers = importlib.import_module("handler.model.loading.quant").layers(model, precision) if precision else ()
    rounded = {layer.linear.weight.data_ptr(): layer for layer in layers}
    waiting = {tensor.data_ptr(): tensor for tensor in tensors_of(model)}
    for file, slots in files.items():
        for name, tensor in _arriving(reader, file, slots, dtype, place):
            if name in changed:
                lora.add(tensor, name, changes)
            if (weight := waiting.pop(given[name].data_ptr(), None)) is None:
                continue  # the library has it already, or one of two that are tied
            if layer := rounded.pop(given[name].data_ptr(), None):
                weight.data = tensor
                layer.quantise(place)
                trim()  # rounding one matrix takes several times its size
            else:
                weight.data = _own(shard.of(name, tensor), weight.dtype, place)
            del tensor, weight
    for layer in rounded.values():
        layer.quantise(place)
    return model, faults


def tensors_of(model: Any) -> Any:
    """Its parameters and buffers."""
    return itertools.chain(model.parameters(), model.buffers())


def _placeholder(slot: Slot, dtype: Any) -> Any:
    import torch

    return torch.empty(slot.shape, dtype=dtype if slot.dtype in FLOATS else dtype_of(slot))


def _found(model: Any, given: Mapping[str, Any]) -> set[str]:
    """Which placeholders are the model's: not those that its library copied, cut, turned or gave another type."""
    there = {_where(tensor) for tensor in tensors_of(model) if tensor.numel()}
    return {name for name, tensor in given.items() if _where(tensor) in there}


def _where(tensor: Any) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.shape, tensor.stride()


def _early(reader: Reader, files: Files, name: str, dtype: Any) -> Any:
    """A tensor whose bytes its library wants to see."""
    [(file, slot)] = [(file, slots[name]) for file, slots in files.items() if name in slots]
    if not slot.packed:
        return _seen(reader, file, slot).clone()
    scale = _seen(reader, file, slot.scale) if slot.scale else None
    return unpacked(_seen(reader, file, slot), slot, scale, dtype)


def _seen(reader: Reader, file: ReadFile, slot: Slot) -> Any:
    """The tensor in the memory that its file is read to, once it is there."""
    import torch

    for start in range(slot.start // CHUNK * CHUNK, slot.stop, CHUNK):
        reader.wait(file, start)
    return viewed(torch.frombuffer(file.memory, dtype=torch.uint8)[slot.start : slot.stop], slot)


def _arriving(reader: Reader, file: ReadFile, slots: Slots, dtype: Any, place: str) -> Any:
    """Each tensor, by its name, in the order of the file; its bytes go when the next one is asked for."""
    chunks = deque(file.chunks)
    scales = {name: _seen(reader, file, slot.scale).clone() for name, slot in slots.items() if slot.scale}

    def leave(end: int) -> None:
        while chunks and chunks[0][1] <= end:
            start, stop = chunks.popleft()
            reader.wait(file, start)
            file.memory.madvise(mmap.MADV_DONTNEED, start, stop - start)
            reader.taken(stop - start)

    reader.wait(file, 0)
    if slots_of(file) != slots:
        raise file.corrupt("was changed while it was read")
    for name, slot in sorted(slots.items(), key=lambda item: item[1].start):
        seen = _seen(reader, file, slot)
        yield name, unpacked(seen.to(place), slot, scales.get(name), dtype) if slot.packed else seen
        leave(slot.stop)
    leave(len(file.memory))


def _own(tensor: Any, dtype: Any, place: str) -> Any:
    """A copy, never a view of what was read; a GPU casts it there."""
    import torch

    there = torch.empty(tensor.shape, dtype=tensor.dtype, device=place).copy_(tensor) if place != "cpu" else tensor
    return there.to(dtype, copy=place == "cpu")
