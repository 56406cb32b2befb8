"""How a model is laid out in the memory there is: a plan with its arithmetic, made before anything is loaded.

    resident    everything stays on the GPU
    encoders    the text encoders wait in host memory; each of their layers comes for its own call
    blocks      the denoiser does likewise; only the VAE stays

The first that fits is taken. A layer comes while the one before it computes (`offload.py`), so room for two is enough.
"""

import math
from dataclasses import dataclass
from typing import Literal

from handler.catalog.models import MODELS
from handler.catalog.precisions import PRECISIONS
from handler.catalog.sizes import NONE
from handler.catalog.spec import ModelSpec
from handler.core.request import MAX_SIDE
from handler.model.adapters.applied import CACHED
from handler.model.hardware import CONTEXT_GB, Hardware
from handler.model.tensor_parallel import Shard
from handler.volume.manifest import Source
from handler.volume.overlay import NOTHING, Overlay
from handler.worker.footprint import Weights, weigh

Placement = Literal["resident", "encoders", "blocks"]
TRIED: dict[str, tuple[Placement, ...]] = {  # for each value of KINDLING_OFFLOAD
    "auto": ("resident", "encoders", "blocks"),
    "off": ("resident",),
    "encoders": ("encoders",),
    "blocks": ("blocks",),
}
WAITS = {"encoders": "the text encoders wait in host memory", "blocks": "all but the VAE waits in host memory"}
DECODED = 2500  # bytes a pixel while 16-bit VAEs decode: three times 256 channels, and cuDNN's work; an assumption


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Where the weights are, GB needed on the device and on the host at the worst, and how that was reckoned.

    `spare_gb` are those of the host that are left, once all is loaded, for what LoRAs of requests make a worker keep.
    Pictures of more pixels than `tile_above` are decoded in tiles; 0: none is.
    """

    fits: bool
    mode: Placement
    needs_gb: float
    host_gb: float
    tile_above: int
    reason: str
    spare_gb: float = math.inf

    @property
    def tiling(self) -> str:
        """When the VAE works in tiles, as pictures tell it."""
        return f"above {self.tile_above} pixels" if self.tile_above else "off"

    def tiles(self, size: tuple[int, int]) -> bool:
        return 0 < self.tile_above < size[0] * size[1]


def memory_plan(
    spec: ModelSpec,
    hardware: Hardware,
    source: Source | None = None,
    host_gb: float = math.inf,
    offload: str = "auto",
    over: Overlay = NOTHING,
    shared: bool = False,
    encoders: int = 1,
) -> MemoryPlan:
    """The first mode that fits, else the first that would on a larger host, or the last one tried, with the reason.

    `source` is its files, if they are there, with what is `over` them; `host_gb` what the host has, `offload` is
    KINDLING_OFFLOAD. What is `shared` by several GPUs never streams its blocks: those cannot be split. Each of them has
    one of so many parts of the text `encoders`.
    """
    on_cpu = hardware.device == "cpu"  # whose memory is the host's: nothing is gained
    tried = TRIED["off" if on_cpu and offload == "auto" else offload]
    if shared and offload == "auto":
        tried = tuple(mode for mode in tried if mode != "blocks")
    weights = weigh(spec, hardware, source, over, Shard(parts=encoders))
    plans = [_laid_out(mode, weights, host_gb, counted=source is None) for mode in tried]
    roomy = (plan for plan in plans if plan.needs_gb <= hardware.memory_gb)  # but for the host
    return next((plan for plan in plans if plan.fits), next(roomy, plans[-1]))


def fit(spec: ModelSpec, hardware: Hardware, source: Source | None = None) -> MemoryPlan:
    """Whether all of `spec` fits on the device at once."""
    return memory_plan(spec, hardware, source, offload="off")


def _laid_out(mode: Placement, weights: Weights, host_gb: float, counted: bool) -> MemoryPlan:
    """The plan for one mode; `counted`: by the catalogue's parameters, for there are no files."""
    spec, hardware = weights.spec, weights.hardware
    room_gb = min(hardware.memory_gb, host_gb) if hardware.device == "cpu" else hardware.memory_gb
    takes, comes = weights.footprint(mode, host_gb * 1e9), weights.comes(mode)
    stays, host = (takes.device - comes) / 1e9, takes.host_peak / 1e9
    loads, draws = takes.device_peak / 1e9 + CONTEXT_GB, takes.device / 1e9 + spec.work_gb
    needs = max(loads, draws)
    width = PRECISIONS[hardware.precision].width
    words = [f"{stays / width:.3g}B parameters x {width:g} bytes" if counted else f"{stays:.3g} GB of weights"]
    words += [f"{comes / 1e9:.2g} GB for parts that come and go"] if comes else []
    words.append(f"{spec.work_gb:g} GB to work" if draws >= loads else f"{needs - takes.device / 1e9:.2g} GB to load")
    reason = f"{' + '.join(words)} = {needs:.1f} GB, of {room_gb:.1f} GB on the {hardware.name}"
    reason += f", of which others hold {hardware.others_gb:.1f} GB more" if hardware.others_gb else ""
    if weights.waiting(mode):
        there = "" if math.isinf(host_gb) else f", of {host_gb:.1f} GB"
        reason = f"{WAITS[mode]} ({host:.1f} GB with the process and what is read{there}): {reason}"
    elif host > host_gb:
        reason = f"loading takes {host:.1f} GB of host memory, of {host_gb:.1f} GB: {reason}"
    tile_above = _tile_above(hardware, takes.device / 1e9)
    left = room_gb - draws if hardware.device == "cpu" else host_gb - takes.host / 1e9
    spare = max(0.0, left - CACHED / 1e9)
    return MemoryPlan(needs <= room_gb and host <= host_gb, mode, needs, host, tile_above, reason, spare)


def _tile_above(hardware: Hardware, taken_gb: float) -> int:
    """The most pixels that decode at once in what `taken_gb` leaves of a GPU; 0 where that is the largest picture."""
    if hardware.device == "cpu" or math.isinf(hardware.memory_gb):
        return 0
    wide = 1 if hardware.dtype == "bfloat16" else 2  # SDXL's VAE computes in fp32 where the rest does in fp16
    pixels = max(1, int((hardware.memory_gb - taken_gb - CONTEXT_GB) * 1e9 / (DECODED * wide)))
    return 0 if pixels >= MAX_SIDE**2 else pixels


def nearest(hardware: Hardware, host_gb: float = math.inf) -> str:
    """The largest model that fits, as a sentence."""
    fitting = [spec for spec in MODELS.values() if memory_plan(spec, hardware, host_gb=host_gb).fits]
    if not fitting:
        return NONE
    return f"The largest that fits is {max(fitting, key=lambda s: s.parameters + s.other_parameters).id}."
