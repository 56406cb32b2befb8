"""Weights: bytes that a `Reader` brings -> tensors on the device -> the components that model_index.json names.

Modules are made without memory of their own and take the tensors as they are; on a CPU these are views into what was
read, so no weight is there twice. The result equals the libraries' own `from_pretrained`, bit by bit. Every key must
be there and wanted; nothing but classes of diffusers and transformers is ever made.
"""

import mmap
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from handler.core.errors import WeightsCorrupt, WeightsMissing
from handler.model.hardware import Hardware
from handler.model.loading import lora, modules
from handler.model.loading.filling import as_served, fill, layouts, slots_of
from handler.model.loading.packing import viewed
from handler.model.offload import unlock_pages
from handler.model.tensor_parallel import WHOLE, Shard
from handler.volume.codeless import require_codeless
from handler.volume.layout import Slot
from handler.volume.listing import INDEX, LORA, OURS, named
from handler.volume.manifest import CHUNK
from handler.volume.reader import CONFIGS, Reader, ReadFile
from handler.volume.room import reading

ALIGNMENT = 256  # where a GPU's allocations start, and so one weight of a file
KERNELS = 16  # where its fast kernels want every weight to start
TOKENIZER_OF = {"PixtralProcessor": "AutoTokenizer"}  # all that FLUX.2 uses of it; the rest wants torchvision


def load_components(
    reader: Reader, hardware: Hardware, waiting: tuple[str, ...] = (), shard: Shard = WHOLE
) -> dict[str, Any]:
    """All that the pipeline's constructor takes: models on the device, in eval mode; tokenizers; settings.

    Those whose names begin with what `waiting` has are in host memory. Of text encoders there is this `shard`.
    """
    for file in reader.take(CONFIGS):
        _arrive(reader, file)
    given = reader.source.index or ()  # one that is no file, whose names are folders'
    entries = {name: value for name, value in reader.index.items() if name[0] != "_" or name in given}
    places = {name: "cpu" if name.startswith(waiting) else hardware.device for name in entries}
    shards = {name: shard if name.startswith("text_encoder") else WHOLE for name in entries}
    return {
        name: _component(reader, name, value, hardware, places[name], shards[name]) for name, value in entries.items()
    }


def _component(reader: Reader, name: str, value: Any, hardware: Hardware, place: str, shard: Shard) -> Any:
    """One entry of model_index.json: [library, class], [null, null], or a setting of the pipeline."""
    match value:
        case [None, None]:
            return None
        case [library, str(word)]:
            return _made(reader, name, _class(reader, library, word), hardware, place, shard)
        case _:
            with reading(folder := reader.folder(name)):
                component = isinstance(value, list | dict) or folder.is_dir()
            if component:
                index = folder.parent / INDEX
                told = f"{index} does not say what {name} is made as. {reader.source.remedy}"
                raise WeightsCorrupt(told, about=str(index))
            return value


def _made(reader: Reader, name: str, kind: Any, hardware: Hardware, place: str, shard: Shard) -> Any:
    import torch

    folder = reader.folder(name)
    if kind.__name__ not in OURS:  # whose code is here
        require_codeless(folder, reader.source.remedy)
    if not issubclass(kind, torch.nn.Module):
        return kind.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    changes = tensors(reader, part) if reader.files(part := f"{name}/{LORA}") else {}
    try:
        model, faults = _weighed(reader, name, kind, hardware, place, changes, shard)
    except lora.Misfit as error:
        told = f"The LoRA in {folder} does not fit: {error}. {reader.source.remedy}"
        raise WeightsCorrupt(told, about=str(folder)) from None
    if told := "; ".join(f"{fault} {', '.join(sorted(keys)[:3])}" for fault, keys in faults.items() if keys):
        told = f"The weights in {folder} do not fit {kind.__name__}: {told}. {reader.source.remedy}"
        raise WeightsCorrupt(told, about=str(folder))
    return model.requires_grad_(False).to(place)  # what is left to move are buffers that no file has


def _weighed(
    reader: Reader, name: str, kind: Any, hardware: Hardware, place: str, changes: Mapping[str, Any], shard: Shard
) -> modules.Made:
    """The model with its weights, and what does not fit: over what was read, as it is, or filled tensor by tensor."""
    import diffusers
    import torch

    folder, dtype = reader.folder(name), getattr(torch, hardware.dtype)
    ours = issubclass(kind, diffusers.ModelMixin)
    rounds = hardware.quantised and not (ours and not kind._repeated_blocks)  # autoencoders are not
    baked = rounds and reader.source.precision == hardware.precision and not reader.over.get(name)
    maker: Callable[..., modules.Made] = modules.from_diffusers if ours else modules.from_transformers
    files = layouts(reader.files(name))
    if baked:
        maker = partial(modules.from_baked, precision=hardware.precision)
    elif files and (rounds or shard.parts > 1 or not as_served(files, dtype)):
        reader.take(name)
        make = partial(maker, kind, folder, dtype=dtype, device="cpu")
        precision = hardware.precision if rounds else ""
        return fill(reader, files, make, dtype, place, precision, changes, shard)
    found = tensors(reader, name, place)
    lora.fuse(found, changes)
    return maker(kind, folder, found, dtype, place)


def _class(reader: Reader, library: object, word: str) -> Any:
    """The class of that name. Only the two libraries' own are ever made, and only the kinds we know."""
    import transformers
    from diffusers import ModelMixin, SchedulerMixin

    known = (ModelMixin, SchedulerMixin, transformers.PreTrainedModel, transformers.PreTrainedTokenizerBase)
    others = (transformers.ProcessorMixin, transformers.ImageProcessingMixin, transformers.AutoTokenizer)
    found = named(library, TOKENIZER_OF.get(word, word))
    if not isinstance(found, type) or not issubclass(found, (*known, *others)):
        path = reader.source.folder / INDEX
        told = f"{path} asks for {library}.{word}: only models of diffusers and transformers are made."
        raise WeightsCorrupt(told, about=str(path))
    return found


def tensors(reader: Reader, component: str, device: str = "cpu") -> dict[str, Any]:
    """The tensors of one component as its files have them, on the device. Once only."""
    found: dict[str, Any] = {}
    for file in reader.take(component):
        reader.wait(file, 0)
        slots = slots_of(file)
        memory = _arrive(reader, file) if device == "cpu" else _sent(reader, file, device, aligned(slots))
        for name, slot in slots.items():
            if name in found:
                raise file.corrupt(f"has {name}, as another file of {component} does")
            found[name] = viewed(memory[slot.start : slot.stop], slot, 1 if device == "cpu" else KERNELS)
    if not found:
        folder = reader.source.folder / component
        raise WeightsMissing(f"{folder} has no weights in safetensors files. {reader.source.again}", about=str(folder))
    return found


def aligned(slots: Mapping[str, Slot]) -> int:
    """The byte of a file that starts where an allocation of a GPU does: the largest tensor's.

    Tensors of one width follow each other, and most of theirs are multiples of `KERNELS`; single scales before them
    need not be, and all that is not aligned is there twice.
    """
    return max(slots.values(), key=lambda slot: slot.stop - slot.start).start if slots else 0


def _arrive(reader: Reader, file: ReadFile) -> Any:
    """The whole file as bytes where it was read to; the tensor keeps them alive."""
    import torch

    reader.taken(sum(stop - start for start, stop in file.chunks))  # it stays, and so waits for nobody
    for start, _ in file.chunks:
        reader.wait(file, start)
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


def free(pipeline: Any) -> None:
    """Free the weights of a pipeline that draws no more, also those that somebody still knows.

    torch's loader of compiled code keeps for good a reference to each weight that it was given (2.11 and 2.13).
    """
    parts = [part for part in getattr(pipeline, "components", {}).values() if hasattr(part, "parameters")]
    unlock_pages(parts)
    for weight in [weight for part in parts for weight in (*part.parameters(), *part.buffers())]:
        for tensor in _plain(weight):
            if (storage := tensor.untyped_storage()).resizable():
                storage.resize_(0)
            else:  # it lies in what was read
                tensor.data = tensor.new_empty(0)


def _plain(tensor: Any) -> list[Any]:
    """`tensor`, or those that one of a class of its own is made of."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    return [plain for name in names for plain in _plain(getattr(tensor, name))]
