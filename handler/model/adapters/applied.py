"""What is added to a loaded model's weights now: no more and no less than the next picture's LoRAs.

Weights change where they lie, so nothing is loaded, wrapped or compiled anew, and compiled code, which shares them,
sees it. What a layer's weight was before the first LoRA that changed it is kept in host memory for good: all sums
begin with it, and without LoRAs the weights are what they were, to the bit. So a worker may come to hold its denoiser
and text encoders twice, once on the host: as far as there is room.
"""

import importlib
import math
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from hashlib import sha256
from typing import Any

from handler.core.errors import InvalidValue
from handler.core.recipe import Embedding, Lora
from handler.model import offload
from handler.model.loading.lora import Misfit
from handler.volume.adapters import LARGEST
from handler.volume.layout import Slot, described

CACHED = 1 << 30  # bytes of LoRAs in host memory, beside those in use


class Applied:
    """The LoRAs of one pipeline. On the thread of its model alone.

    `room` is how many bytes of host memory what the weights were may take.
    """

    def __init__(self, pipeline: Any, room: float = math.inf) -> None:
        self._pipeline, self._room = pipeline, room
        self._now: tuple[Lora, ...] | None = ()  # None: an error left it open
        self._first: dict[Any, Any] = {}  # what the weights were, of layers that any LoRA has changed
        self._changed: set[Any] = set()  # the layers that are not as they were
        self._read: OrderedDict[str, Mapping[Any, Any]] = OrderedDict()  # by SHA-256, the last used last

    def lacks(self, loras: Sequence[Lora]) -> bool:
        """Whether `apply` has anything to do."""
        return self._now != tuple(loras)

    def apply(self, loras: Sequence[Lora]) -> None:
        """Let the weights be the model's own and `loras`; InvalidValue says which of these does not go with them.

        Whatever is raised, the next call begins with what the weights were.
        """
        import torch

        if not self.lacks(loras):
            return
        with torch.inference_mode():
            wanted = self._wanted(loras)
            self._require_room(wanted, loras)
            self._now = None
            for name in {key[0] for key in {*wanted, *self._changed}}:
                offload.rest(self._pipeline.components[name])
            for key in self._changed - wanted.keys():
                self._sums.put(self._sums.tensors(self._layer(key)), self._first[key])
                self._changed.discard(key)
            self._make_room(wanted)
            sound = {key: self._change(key, terms) for key, terms in wanted.items()}
            if sound and not bool(torch.stack(list(sound.values())).all()):
                raise self._unsound(next(key for key, each in sound.items() if not each), loras)
            self._now = tuple(loras)

    def _require_room(self, wanted: Collection[Any], loras: Sequence[Lora]) -> None:
        if (size := sum(map(self._bytes, wanted))) > self._room:
            told = f"{_told(loras)} would change {size / 1e9:.3g} GB of weights, and for what these were there is room"
            raise InvalidValue(f"loras: {told} for {self._room / 1e9:.3g} GB in this worker's host memory.", "loras")

    def _make_room(self, wanted: Collection[Any]) -> None:
        """Forget what weights were that are as they were, and shall be, where that and the new is too much."""
        kept = self._first.keys()
        if sum(map(self._bytes, {*kept, *wanted})) > self._room:
            self._first = {key: first for key, first in self._first.items() if key in wanted}

    def _bytes(self, key: Any) -> int:
        return sum(tensor.nbytes for tensor in self._sums.tensors(self._layer(key)))

    def _unsound(self, key: Any, loras: Sequence[Lora]) -> InvalidValue:
        blamed = [lora for lora in loras if key in self._read[lora.sha256]]
        told = f"{_told(blamed)} would make {'.'.join(key)} infinite, or no numbers; try a smaller weight"
        return InvalidValue(f"loras: {told}.", "loras")

    def _change(self, key: Any, terms: Sequence[tuple[Any, float]]) -> Any:
        layer, device = self._layer(key), self._pipeline._execution_device
        if key not in self._first:
            self._first[key] = tuple(_on_host(tensor, device) for tensor in self._sums.tensors(layer))
        self._changed.add(key)
        return self._sums.add(layer, self._first[key], terms, device)

    def _wanted(self, loras: Sequence[Lora]) -> dict[Any, list[tuple[Any, float]]]:
        """What to add to each layer, by component and path."""
        wanted: dict[Any, list[tuple[Any, float]]] = {}
        for lora in loras:
            for key, delta in self._deltas(lora).items():
                wanted.setdefault(key, []).append((delta, _weight(lora, key[0])))
        used = {lora.sha256 for lora in loras}
        while self._read.keys() - used and self._held() > CACHED:
            del self._read[next(name for name in self._read if name not in used)]
        return wanted

    def _held(self) -> int:
        return sum(delta.nbytes for deltas in self._read.values() for delta in deltas.values())

    def _deltas(self, lora: Lora) -> Mapping[Any, Any]:
        if lora.sha256 not in self._read:
            try:
                found = importlib.import_module("handler.model.adapters.keys").read(self._pipeline, *opened(lora))
                for key, delta in found.items():
                    self._sums.require(self._layer(key), key[1], delta)
            except Misfit as error:
                raise InvalidValue(f"loras: '{lora.name}' does not go with this model: {error}.", "loras") from None
            self._read[lora.sha256] = found
        self._read.move_to_end(lora.sha256)
        return self._read[lora.sha256]

    def _layer(self, key: tuple[str, str]) -> Any:
        return self._pipeline.components[key[0]].get_submodule(key[1])

    @property
    def _sums(self) -> Any:
        return importlib.import_module("handler.model.adapters.sums")


def _told(loras: Sequence[Lora]) -> str:
    return " and ".join(f"'{lora.name}'" for lora in loras)


def _weight(lora: Lora, component: str) -> float:
    encodes = component.startswith("text_encoder")
    return lora.clip_weight if encodes and lora.clip_weight is not None else lora.weight


def _on_host(tensor: Any, device: Any) -> Any:
    """A copy in host memory; for a GPU page-locked, so that copies from it need not be waited for."""
    import torch

    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=device.type == "cuda").copy_(tensor)


def opened(asked: Lora | Embedding, param: str = "loras") -> tuple[dict[str, Any], Mapping[str, Any]]:
    """The tensors in its file, in host memory, and what that says of itself.

    InvalidValue if it is not the file that was asked for, or torn.
    """
    import torch

    try:
        data = bytearray(min(asked.path.stat().st_size, LARGEST))
        with asked.path.open("rb") as file:
            file.readinto(data)
        if sha256(data).hexdigest() != asked.sha256:
            raise ValueError("it was changed while it waited; ask again")
        slots, said = described(memoryview(data), len(data))
    except OSError as error:
        raise InvalidValue(f"{param}: '{asked.name}' cannot be read: {error.strerror}.", param) from None
    except ValueError as error:
        raise InvalidValue(f"{param}: '{asked.name}' cannot be used: {error}.", param) from None
    flat = torch.frombuffer(data, dtype=torch.uint8)
    return {name: _tensor(flat, slot) for name, slot in slots.items()}, said


def _tensor(flat: Any, slot: Slot) -> Any:
    import torch

    dtype, piece = getattr(torch, slot.dtype), flat[slot.start : slot.stop]
    return (piece.clone() if slot.start % dtype.itemsize else piece).view(dtype).view(slot.shape)
