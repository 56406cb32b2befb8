"""Weights: bytes that a `Reader` brings -> tensors on the device -> the components that model_index.json names.

Modules are made without memory of their own and take the tensors as they are; on a CPU these are views into what was
read, so no weight is there twice. The result equals the libraries' own `from_pretrained`, bit by bit. Every key must
be there and wanted; nothing but classes of diffusers and transformers is ever made.
"""

import importlib
import math
import mmap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from handler import lora, modules
from handler.errors import WeightsCorrupt, WeightsMissing
from handler.hardware import Hardware
from handler.reader import CONFIGS, LORA, STEMS, Reader, ReadFile, remedy
from handler.untrusted import parse
from handler.volume import CHUNK, INDEX

ALIGNMENT = 256  # where a GPU's allocations start, and so one weight of a file
KERNELS = 16  # where its fast kernels want every weight to start
TOKENIZER_OF = {"PixtralProcessor": "AutoTokenizer"}  # all that FLUX.2 uses of it; the rest wants torchvision
OURS = {"Flux2TinyAutoEncoder": "handler.families.flux2_tiny"}  # whose repository would have us run its own code
DTYPES = {
    "BOOL": ("bool", 1), "U8": ("uint8", 1), "I8": ("int8", 1), "I16": ("int16", 2), "I32": ("int32", 4),
    "I64": ("int64", 8), "F8_E4M3": ("float8_e4m3fn", 1), "F8_E5M2": ("float8_e5m2", 1),
    "F8_E8M0": ("float8_e8m0fnu", 1), "F16": ("float16", 2), "BF16": ("bfloat16", 2), "F32": ("float32", 4),
    "F64": ("float64", 8),
}  # fmt: skip
LARGEST = 1 << 63  # what torch counts with
WIDTHS = dict(DTYPES.values())


@dataclass(frozen=True, slots=True)
class Slot:
    """Where a tensor is in its file; `dtype` is torch's name."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def layout(data: memoryview) -> dict[str, Slot]:
    """What a safetensors file holds, told from its header alone. ValueError says why it cannot be one."""
    end = 8 + int.from_bytes(data[:8], "little")
    if end > min(len(data), CHUNK):
        raise ValueError(f"its header cannot have {end - 8} bytes")
    try:
        entries = parse(bytes(data[8:end]))
        entries.pop("__metadata__", None)
        slots = {name: _slot(entry, end) for name, entry in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError("its header makes no sense") from None
    for name, slot in sorted(slots.items(), key=lambda item: (item[1].start, item[1].stop)):
        if slot.start != end:
            raise ValueError(f"there is a gap or an overlap before {name}")
        end = slot.stop
    if end != len(data):
        raise ValueError(f"its tensors end at byte {end}, the file at {len(data)}")
    return slots


def _slot(entry: dict[str, Any], base: int) -> Slot:
    dtype, width = DTYPES[entry["dtype"]]
    shape, (start, stop) = entry["shape"], entry["data_offsets"]
    counts = all(type(n) is int and 0 <= n < LARGEST for n in (*shape, start, stop))
    if not counts or stop - start != math.prod(shape) * width:
        raise ValueError(entry)
    return Slot(dtype, tuple(shape), base + start, base + stop)


def load_components(reader: Reader, hardware: Hardware, waiting: tuple[str, ...] = ()) -> dict[str, Any]:
    """All that the pipeline's constructor takes: models on the device, in eval mode; tokenizers; settings.

    Those whose names begin with what `waiting` has are in host memory.
    """
    for file in reader.take(CONFIGS):
        _arrive(reader, file)
    entries = {name: value for name, value in reader.index.items() if not name.startswith("_")}
    places = {name: "cpu" if name.startswith(waiting) else hardware.device for name in entries}
    return {name: _component(reader, name, value, hardware, places[name]) for name, value in entries.items()}


def _component(reader: Reader, name: str, value: Any, hardware: Hardware, place: str) -> Any:
    """One entry of model_index.json: [library, class], [null, null], or a setting of the pipeline."""
    match value:
        case [None, None]:
            return None
        case [library, str(word)]:
            return _made(reader, name, _class(reader, library, word), hardware, place)
        case _:
            return value


def _made(reader: Reader, name: str, kind: Any, hardware: Hardware, place: str) -> Any:
    import torch

    folder, dtype = reader.source.folder / name, getattr(torch, hardware.dtype)
    if not issubclass(kind, torch.nn.Module):
        return kind.from_pretrained(folder, local_files_only=True)
    make, rounds, device, width = _way(reader, kind, hardware, place)
    found = tensors(reader, name, device, width)
    if reader.has(part := f"{name}/{LORA}"):
        try:
            lora.fuse(found, tensors(reader, part, device))
        except (ValueError, RuntimeError) as error:
            raise WeightsCorrupt(f"The LoRA in {folder} does not fit: {error}. {remedy(reader.source)}") from None
    model, faults = make(kind, folder, found, dtype, device)
    found.clear()
    if told := "; ".join(f"{fault} {', '.join(sorted(keys)[:3])}" for fault, keys in faults.items() if keys):
        raise WeightsCorrupt(f"The weights in {folder} do not fit {kind.__name__}: {told}. {remedy(reader.source)}")
    if rounds:
        importlib.import_module("handler.quant").quantise(model, hardware.precision, place)
    return model.requires_grad_(False).to(place)  # what is left to move are buffers that no file has


def _way(
    reader: Reader, kind: Any, hardware: Hardware, place: str
) -> tuple[Callable[..., modules.Made], bool, str, int]:
    """What makes the model; is it rounded (not an autoencoder); its tensors' first device; their widest float there.

    What is to be rounded and was not baked so stays on the host until then: a GPU that has room for it in 8 bits may
    have none for 16.
    """
    import diffusers

    ours = issubclass(kind, diffusers.ModelMixin)
    make, width = modules.from_diffusers if ours else modules.from_transformers, WIDTHS[hardware.dtype]
    if not hardware.quantised or (ours and not kind._repeated_blocks):
        return make, False, place, width
    if reader.source.precision != hardware.precision:
        return make, True, "cpu", width
    return partial(modules.from_baked, precision=hardware.precision), True, place, max(WIDTHS.values())


def _class(reader: Reader, library: object, word: str) -> Any:
    """The class of that name. Only the two libraries' own are ever made, and only the kinds we know."""
    import transformers
    from diffusers import ModelMixin, SchedulerMixin

    known = (ModelMixin, SchedulerMixin, transformers.PreTrainedModel, transformers.PreTrainedTokenizerBase)
    others = (transformers.ProcessorMixin, transformers.ImageProcessingMixin, transformers.AutoTokenizer)
    found = named(library, TOKENIZER_OF.get(word, word))
    if not isinstance(found, type) or not issubclass(found, (*known, *others)):
        path = reader.source.folder / INDEX
        raise WeightsCorrupt(f"{path} asks for {library}.{word}: only models of diffusers and transformers are made.")
    return found


def named(library: object, word: object) -> Any:
    """What diffusers or transformers, or this package in their place, call so; None for anything else."""
    module = OURS.get(str(word), library)
    return getattr(importlib.import_module(module), str(word), None) if module in (*STEMS, *OURS.values()) else None


def tensors(reader: Reader, component: str, device: str = "cpu", width: int = 8) -> dict[str, Any]:
    """The tensors of one component as its files have them, on the device. Once only.

    Files of floats wider than `width` bytes stay in host memory, to be narrowed on their way: a GPU that has room for
    Z-Image in bf16 has none for its files in fp32.
    """
    import torch

    found: dict[str, Any] = {}
    for file in reader.take(component):
        reader.wait(file, 0)
        slots = _slots(file)
        wide = any(slot.dtype.startswith("float") and WIDTHS[slot.dtype] > width for slot in slots.values())
        memory = _arrive(reader, file) if wide or device == "cpu" else _sent(reader, file, device, aligned(slots))
        for name, slot in slots.items():
            if name in found:
                raise file.corrupt(f"has {name}, as another file of {component} does")
            flat, dtype = memory[slot.start : slot.stop], getattr(torch, slot.dtype)
            flat = flat.clone() if flat.storage_offset() % (dtype.itemsize if device == "cpu" else KERNELS) else flat
            found[name] = flat.view(dtype).view(slot.shape)
    if not found:
        folder = reader.source.folder / component
        raise WeightsMissing(f"{folder} has no weights in safetensors files. {remedy(reader.source)}")
    return found


def aligned(slots: Mapping[str, Slot]) -> int:
    """The byte of a file that starts where an allocation of a GPU does: the largest tensor's.

    Tensors of one width follow each other, and most of theirs are multiples of `KERNELS`; single scales before them
    need not be, and all that is not aligned is there twice.
    """
    return max(slots.values(), key=lambda slot: slot.stop - slot.start).start if slots else 0


def _slots(file: ReadFile) -> dict[str, Slot]:
    try:
        return layout(memoryview(file.memory))
    except ValueError as error:
        raise file.corrupt(f"is no whole safetensors file: {error}") from None


def _arrive(reader: Reader, file: ReadFile) -> Any:
    """The whole file as bytes where it was read to; the tensor keeps them alive."""
    import torch

    for start, _ in file.chunks:
        reader.wait(file, start)
    reader.taken(len(file.memory))
    return torch.frombuffer(file.memory, dtype=torch.uint8)


def _sent(reader: Reader, file: ReadFile, device: str, first: int) -> Any:
    """The file as bytes on the GPU, byte `first` aligned; each chunk leaves host memory as soon as it is copied.

    Two page-locked buffers take turns: one is filled while the other is on its way, beside threads that read on.
    """
    import torch

    shift = -first % ALIGNMENT
    memory = torch.empty(shift + len(file.memory), dtype=torch.uint8, device=device)[shift:]
    host, stream = torch.frombuffer(file.memory, dtype=torch.uint8), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    buffers = [(torch.empty(CHUNK, dtype=torch.uint8, pin_memory=True), torch.cuda.Event()) for _ in range(2)]
    for turn, (start, stop) in enumerate(file.chunks):
        reader.wait(file, start)
        locked, done = buffers[turn % 2]
        done.synchronize()
        locked[: stop - start].copy_(host[start:stop])
        with torch.cuda.stream(stream):
            memory[start:stop].copy_(locked[: stop - start], non_blocking=True)
            done.record(stream)
        file.memory.madvise(mmap.MADV_DONTNEED, start, stop - start)
        reader.taken(stop - start)
    stream.synchronize()
    return memory
