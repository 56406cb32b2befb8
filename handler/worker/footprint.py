"""Footprint: the bytes that a model's weights take, held and at the peak of loading, on the device and on the host.

Told from the headers of the files that its pipeline reads, or by the catalogue where there are none yet. Plans, `bake`,
`doctor`, `models` and the scripts of `platform/` all ask here.
"""

import math
from collections.abc import Collection
from dataclasses import dataclass

from handler.catalog.precisions import KEPT, PRECISIONS, TIED
from handler.catalog.spec import ModelSpec
from handler.core.errors import WeightsCorrupt
from handler.core.host import read_ahead
from handler.model.hardware import Hardware
from handler.model.offload import WAITING
from handler.model.tensor_parallel import WHOLE, Shard
from handler.volume.layout import FLOATS, WIDTHS, Slot, read_layout
from handler.volume.listing import LORA, weight_files
from handler.volume.manifest import Source
from handler.volume.overlay import NOTHING, Overlay
from handler.volume.room import reading

VAE = 127_000_000  # parameters of the largest, Qwen-Image's
PARTS = 2  # that come and go, at once on the GPU: the one computing, and the next
EXACT = 2  # bytes a parameter of such a part may take in any precision: embeddings and norms are not rounded
PROCESS = 3 << 30  # of a host: Python, torch and CUDA's libraries; an assumption
ROUNDING = 16  # bytes a parameter that torchao takes while it rounds one matrix, measured on a CPU
UNET = ("down_blocks", "mid_block", "up_blocks")  # how its layers' names begin
SCALES = ("scale", "whole")  # of rounded layers, in fp32 whatever the rest computes in


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes. On a CPU the device's memory is the host's, and all is counted there."""

    device: int
    device_peak: int
    host: int = 0
    host_peak: int = 0


@dataclass(frozen=True, slots=True)
class Part:
    """One component's weights: parameters, bytes in files, bytes as they are served; those that rounding one takes."""

    name: str
    parameters: int
    stored: int
    held: int
    rounding: int = 0


@dataclass(frozen=True, slots=True)
class Weights:
    """Those of `spec` as `hardware` serves them."""

    spec: ModelSpec
    hardware: Hardware
    parts: tuple[Part, ...]

    @property
    def stored(self) -> int:
        return sum(part.stored for part in self.parts)

    @property
    def held(self) -> int:
        return sum(part.held for part in self.parts)

    @property
    def changed(self) -> bool:
        """Whether what is served has another size than what the files have."""
        return any(part.held != part.stored for part in self.parts)

    def waiting(self, mode: str) -> tuple[Part, ...]:
        """What waits in host memory, where that is not the device's."""
        names = () if self.hardware.device == "cpu" else WAITING[mode]
        return tuple(part for part in self.parts if part.name.startswith(names))

    def comes(self, mode: str) -> int:
        """Bytes on the device for the parts that come and go, of those that wait."""
        if not self.waiting(mode):
            return 0
        streams, count = self.spec.streams, self.spec.parameters + self.spec.other_parameters
        largest = streams.layer if mode == "encoders" else max(streams.layer, streams.block)
        share = min(1.0, sum(part.parameters for part in self.parts) / count)  # files smaller than the catalogue says
        return int(PARTS * largest * max(PRECISIONS[self.hardware.precision].width, EXACT) * share)

    def footprint(self, mode: str = "resident", host: float = math.inf) -> Footprint:
        """What they take where `mode` says they are, of a host with so many bytes.

        Read are at most so many bytes more than were taken. What is served in fewer bytes than it is read in, on the
        host, is most just before the last of these are; each tensor is changed by itself.
        """
        ahead = min(self.stored, read_ahead(int(min(host, 1 << 60))))
        added = sum(part.stored for part in self.parts if part.name.endswith(LORA))
        if self.hardware.device == "cpu":
            shrinks = max(0.0, 1 - self.held / self.stored) if self.stored else 0
            return Footprint(self.held, int(self.held + ahead * shrinks + added + self._rounding(self.parts)))
        waits, read = (sum(getattr(p, size) for p in self.waiting(mode)) for size in ("held", "stored"))
        device, rest = self.held - waits + self.comes(mode), min(ahead, self.stored - read)
        coming = max(rest, int(ahead * (1 - waits / read)) if read else 0)
        there, here = self._rounding(set(self.parts) - set(self.waiting(mode))), self._rounding(self.waiting(mode))
        return Footprint(device, device + there, waits + PROCESS, waits + PROCESS + coming + added + here)

    def _rounding(self, parts: Collection[Part]) -> int:
        return max((part.rounding for part in parts), default=0)


def weigh(
    spec: ModelSpec,
    hardware: Hardware,
    source: Source | None = None,
    over: Overlay = NOTHING,
    shard: Shard = WHOLE,
) -> Weights:
    """The weights in `source`, with what is `over` them, else as the catalogue has them; of text encoders this `shard`.

    WeightsCorrupt or VolumeFailed names a bad file.
    """
    if source is None:
        return Weights(spec, hardware, _listed(spec, PRECISIONS[hardware.precision].width, shard))
    parts = []
    for component, files in weight_files(source).items():
        slots = [share.slots for share in over.get(component)] or [_slots(source, name) for name in files]
        parts.append(_part(component, [item for each in slots for item in each.items()], source, hardware, shard))
    return Weights(spec, hardware, tuple(parts))


def _part(
    component: str, found: list[tuple[str, Slot]], source: Source, hardware: Hardware, shard: Shard = WHOLE
) -> Part:
    counts = [math.prod(slot.shape) for _, slot in found]
    stored = sum(slot.stop - slot.start for _, slot in found)
    rounds = hardware.quantised and source.precision != hardware.precision and component != "vae"
    encodes, added = component.startswith("text_encoder"), component.endswith(LORA)
    row = PRECISIONS[hardware.precision]
    row = PRECISIONS[row.encoders] if encodes and row.encoders else row
    rounded = [rounds and _is_rounded(*item, row.grid, TIED if encodes else KEPT) for item in found]
    parts = [shard.parts if encodes and shard.shares(name) else 1 for name, _ in found]
    held = sum(
        _held(*item, hardware, row.rounded * each) // among
        for item, each, among in zip(found, rounded, parts, strict=True)
    )
    largest = max((count for count, each in zip(counts, rounded, strict=True) if each), default=0)
    return Part(component, sum(counts), stored, 0 if added else held, ROUNDING * largest)


def _listed(spec: ModelSpec, width: float, shard: Shard) -> tuple[Part, ...]:
    """By the catalogue; as they are fetched, in 16 bits."""
    elsewhere = spec.streams.shared * (shard.parts - 1) // shard.parts
    count, encoders = spec.parameters + spec.other_parameters, spec.streams.encoders
    vae = min(VAE, count - encoders)
    sizes = {"text_encoder": encoders, "transformer": count - encoders - vae, "vae": vae}
    held = sizes | {"text_encoder": encoders - elsewhere}
    return tuple(Part(name, size, 2 * size, int(held[name] * width)) for name, size in sizes.items())


def _slots(source: Source, name: str) -> dict[str, Slot]:
    path = source.folder / name
    try:
        with reading(path):
            return read_layout(path)
    except ValueError as error:
        told = f"{path} is no whole safetensors file: {error}. {source.remedy}"
        raise WeightsCorrupt(told, about=str(path)) from None


def _held(name: str, slot: Slot, hardware: Hardware, rounded: float) -> int:
    """Bytes that one tensor of a file takes as it is served; `rounded` is bytes a parameter, 0 where it is not."""
    if slot.dtype not in FLOATS or name.rpartition(".")[2] in SCALES:
        return slot.stop - slot.start
    if rounded:
        return int(math.prod(slot.shape) * rounded) + 4 * slot.shape[0]
    return math.prod(slot.shape) * WIDTHS[hardware.dtype]


def _is_rounded(name: str, slot: Slot, grid: int, kept: tuple[str, ...]) -> bool:
    """As `quant.layers` will find it to be, told by its name alone: a matrix within one of many blocks."""
    among = "transformer_blocks" in name  # of a U-Net, whose lists have layers of other kinds too
    listed = among if name.startswith(UNET) else any(word.isdigit() for word in name.split(".")[:-2])
    matrix = name.endswith(".weight") and len(slot.shape) == 2 and not any(side % grid for side in slot.shape)
    return listed and matrix and slot.dtype in FLOATS and not any(word in name for word in kept)
