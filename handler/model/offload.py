"""Streaming: a model's parts wait in host memory, and each is on the device only for its own call.

A part is a block or layer that repeats, or any other module with tensors and no children. While one computes, the
next is on its way, by a stream of its own from page-locked memory; which one is next, the pass before has shown.
Weights change only while all parts rest (`rest`), so letting a part go copies nothing.

diffusers' group offloading does the same, but keeps a second, page-locked copy of what is in host memory already, does
not find the layers of text encoders, and waits for the device after each group. Code that was bound to weights where
they are (`compiling/package.py`) must not be bound to these.
"""

import itertools
import mmap
from collections.abc import Iterable, Iterator
from contextlib import nullcontext, suppress
from typing import Any
from weakref import WeakKeyDictionary

streamed: WeakKeyDictionary[Any, "Stream"] = WeakKeyDictionary()  # the models whose parts come and go
locked: WeakKeyDictionary[Any, list[int]] = WeakKeyDictionary()  # where spans begin, by the first of models with them
WAITING = {"resident": (), "encoders": ("text_encoder",), "blocks": ("text_encoder", "transformer", "unet")}


def stream(models: Iterable[Any], device: str) -> None:
    """Let the parts of `models`, which are in host memory, come to `device` one by one."""
    models = list(models)
    streams = [Stream(model, device) for model in models]
    if device == "cuda" and models:
        lock_pages((host for one in streams for host in one.waiting), locked.setdefault(models[0], []))


def rest(model: Any) -> None:
    """Let all of `model` that comes and goes be in host memory, where it may be changed: what is here would be lost."""
    if model in streamed:
        streamed[model].rest()


class Stream:
    """One model's parts: at most two are on the device, and between passes at most one."""

    def __init__(self, model: Any, device: str) -> None:
        import torch

        self._device, self._copies = device, torch.cuda.Stream() if device == "cuda" else None
        self._parts = {
            part: [(tensor, tensor.data) for tensor in _tensors(part)] for part in dict.fromkeys(_parts(model))
        }
        self._here: dict[Any, Any] = {}  # parts, with the event that ends their copying
        self._next: dict[Any, Any] = {}
        self._last: Any = None
        moved = {id(tensor) for tensors in self._parts.values() for tensor, _ in tensors}
        for tensor in _tensors(model):
            if id(tensor) not in moved:
                tensor.data = tensor.data.to(device)
        streamed[model] = self
        model.register_forward_pre_hook(self._begin)
        for part in self._parts:
            part.register_forward_pre_hook(self._enter)
            part.register_forward_hook(self._leave, always_call=True)

    @property
    def waiting(self) -> Iterator[Any]:
        """The tensors in host memory."""
        return (host for tensors in self._parts.values() for _, host in tensors)

    def rest(self) -> None:
        """Let every part go."""
        for part in list(self._here):
            self._go(part)

    def _begin(self, *_: Any) -> None:
        self._last = None

    def _enter(self, part: Any, *_: Any) -> None:
        if self._last is not None:
            self._next[self._last] = part
        self._last, following = part, self._next.get(part)
        for other in self._here.keys() - {part, following}:
            self._go(other)
        self._come(part)
        self._wait(part)
        if following is not None:
            self._come(following)

    def _leave(self, part: Any, *_: Any) -> None:
        self._go(part)

    def _come(self, part: Any) -> None:
        """Begin to copy, once the device has computed all that it was told before: memory let go of may be used."""
        import torch

        if part in self._here:
            return
        with torch.inference_mode(False):
            here = [torch.empty_like(host, device=self._device) for _, host in self._parts[part]]
            if self._copies:
                self._copies.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._copies) if self._copies else nullcontext():
                for (tensor, host), memory in zip(self._parts[part], here, strict=True):
                    tensor.data = memory.copy_(host, non_blocking=True)
        self._here[part] = self._copies.record_event() if self._copies else None

    def _wait(self, part: Any) -> None:
        """What the device is told from now on has the part."""
        import torch

        if self._copies:
            torch.cuda.current_stream().wait_event(self._here[part])

    def _go(self, part: Any) -> None:
        """Let go of the part's memory on the device, which may still be computing with it, or copying to it."""
        if part not in self._here:
            return
        self._wait(part)
        for tensor, host in self._parts[part]:
            tensor.data = host
        del self._here[part]


def _parts(model: Any) -> Iterator[Any]:
    from torch.nn import ModuleList

    blocks = set(getattr(model, "_repeated_blocks", None) or ())

    def within(module: Any, listed: bool) -> Iterator[Any]:
        if type(module).__name__ in blocks if blocks else listed:
            yield module
        elif children := list(module.children()):
            for child in children:
                yield from within(child, isinstance(module, ModuleList))
        elif next(_tensors(module), None) is not None:
            yield module

    return within(model, listed=False)


def _tensors(module: Any) -> Iterator[Any]:
    return itertools.chain(module.parameters(), module.buffers())


def lock_pages(tensors: Iterable[Any], starts: list[int]) -> None:
    """Page-lock host memory where it is: only then do copies from it go on beside computing.

    Where spans begin is added to `starts` as they are locked.
    """
    import torch

    storages = (tensor.untyped_storage() for tensor in tensors)
    spans = sorted((storage.data_ptr(), storage.data_ptr() + storage.nbytes()) for storage in storages)
    for start, stop in _pages(spans):
        torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(start, stop - start, 0))
        starts.append(start)


def unlock_pages(models: Iterable[Any]) -> None:
    """Let go of what was locked for `models`, before their memory goes: what came to lie there could not be locked."""
    import torch

    starts = [start for model in models for start in locked.pop(model, ())]
    if starts:
        with suppress(RuntimeError):  # of a GPU that is lost
            torch.cuda.synchronize()
    for start in starts:
        torch.cuda.cudart().cudaHostUnregister(start)


def _pages(spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """The whole pages of sorted spans, those that overlap as one: no page may be locked twice."""
    found: list[tuple[int, int]] = []
    for start, stop in spans:
        first, end = start // mmap.PAGESIZE * mmap.PAGESIZE, -(-stop // mmap.PAGESIZE) * mmap.PAGESIZE
        if found and first < found[-1][1]:
            found[-1] = found[-1][0], max(end, found[-1][1])
        elif end > first:
            found.append((first, end))
    return found
