"""How a model is laid out in the memory there is: a plan with its arithmetic, made before anything is loaded.

    resident    everything stays on the GPU
    encoders    the text encoders wait in host memory; each of their layers comes for its own call
    blocks      the denoiser does likewise; only the VAE stays

The first that fits is taken. A layer comes while the one before it computes (`offload.py`), so room for two is enough.
"""

import math
from dataclasses import dataclass
from typing import Literal

from handler.catalog import MODELS
from handler.errors import DoesNotFit
from handler.hardware import Hardware
from handler.precisions import PRECISIONS
from handler.request import MAX_SIDE
from handler.spec import ModelSpec

Mode = Literal["resident", "encoders", "blocks"]
TRIED: dict[str, tuple[Mode, ...]] = {  # for each value of KINDLING_OFFLOAD
    "auto": ("resident", "encoders", "blocks"),
    "off": ("resident",),
    "encoders": ("encoders",),
    "blocks": ("blocks",),
}
WAITS = {"encoders": "the text encoders wait in host memory", "blocks": "all but the VAE waits in host memory"}
VAE = 127_000_000  # parameters of the largest, Qwen-Image's
PARTS = 2  # at once on the GPU: the one computing, and the next
EXACT = 2  # bytes a parameter of a part may take in any precision: embeddings and norms are not rounded
HOST_GB = 4.0  # host memory for the process, and for what is being read; an assumption
CONTEXT_GB = 1.0  # what driver and libraries keep of a GPU's memory; an assumption
DECODED = 2500  # bytes a pixel while 16-bit VAEs decode: three times 256 channels, and cuDNN's work; an assumption
NONE = "No model of the catalogue fits."


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Where the weights are, GB needed on the device and the host, and how that was reckoned.

    Pictures of more pixels than `tile_above` are decoded in tiles; 0: none is.
    """

    fits: bool
    mode: Mode
    needs_gb: float
    host_gb: float
    tile_above: int
    reason: str

    @property
    def tiling(self) -> str:
        """When the VAE works in tiles, as pictures tell it."""
        return f"above {self.tile_above} pixels" if self.tile_above else "off"

    def tiles(self, size: tuple[int, int]) -> bool:
        return 0 < self.tile_above < size[0] * size[1]


def memory_plan(
    spec: ModelSpec,
    hardware: Hardware,
    stored_gb: float = math.inf,
    host_gb: float = math.inf,
    offload: str = "auto",
) -> MemoryPlan:
    """The first mode that fits, else the last one tried, with the reason.

    `stored_gb` is how much its weight files have, if they are there, `host_gb` what the host has, `offload` is
    KINDLING_OFFLOAD.
    """
    on_cpu = hardware.device == "cpu"  # whose memory is the host's: nothing is gained
    tried = TRIED["off" if on_cpu and offload == "auto" else offload]
    plans = [_laid_out(mode, spec, hardware, stored_gb, host_gb) for mode in tried]
    return next((plan for plan in plans if plan.fits), plans[-1])


def rounding_gb(spec: ModelSpec, plan: MemoryPlan) -> float:
    """Host memory that rounding to the precision of `plan` takes, of weights that were not baked.

    Beside what waits there the largest component is there in 16 bits, whole.
    """
    denoiser = spec.parameters + spec.other_parameters - spec.streams.encoders
    return EXACT * max(denoiser, spec.streams.encoders) / 1e9 + max(plan.host_gb, HOST_GB)


def fit(spec: ModelSpec, hardware: Hardware, stored_gb: float = math.inf) -> MemoryPlan:
    """Whether all of `spec` fits on the device at once."""
    return _laid_out("resident", spec, hardware, stored_gb, math.inf)


def _laid_out(mode: Mode, spec: ModelSpec, hardware: Hardware, stored_gb: float, host_gb: float) -> MemoryPlan:
    width, count = PRECISIONS[hardware.precision].width, (spec.parameters + spec.other_parameters) / 1e9
    share = min(1.0, stored_gb / (min(2, width) * count))  # files smaller than the catalogue says, or baked in 8 bits
    parts = spec.streams
    waiting = {"resident": 0.0, "encoders": parts.encoders / 1e9, "blocks": max(0.0, count - VAE / 1e9)}
    waits = 0.0 if hardware.device == "cpu" else waiting[mode]
    largest = parts.layer if mode == "encoders" else max(parts.layer, parts.block)
    comes = PARTS * largest / 1e9 * max(width, EXACT) * share if waits else 0.0
    stays = (count - waits) * width * share
    needs, host = stays + comes + spec.work_gb, waits * width * share + HOST_GB if waits else 0.0
    words = [f"{count - waits:.3g}B parameters x {width:g} bytes" if share == 1 else f"{stays:.3g} GB of weights"]
    words += [f"{comes:.2g} GB for parts that come and go"] if comes else []
    words += [f"{spec.work_gb:g} GB to work"]
    reason = f"{' + '.join(words)} = {needs:.1f} GB, of {hardware.memory_gb:.1f} GB on the {hardware.name}"
    if waits:
        reason = f"{WAITS[mode]} ({host:.1f} GB with the process, of {host_gb:.1f} GB): {reason}"
    fits = needs <= hardware.memory_gb and host <= host_gb
    return MemoryPlan(fits, mode, needs, host, _tile_above(hardware, stays + comes), reason)


def _tile_above(hardware: Hardware, taken_gb: float) -> int:
    """The most pixels that decode at once in what `taken_gb` leaves of a GPU; 0 where that is the largest picture."""
    if hardware.device == "cpu" or math.isinf(hardware.memory_gb):
        return 0
    wide = 1 if hardware.dtype == "bfloat16" else 2  # SDXL's VAE computes in fp32 where the rest does in fp16
    pixels = max(1, int((hardware.memory_gb - taken_gb - CONTEXT_GB) * 1e9 / (DECODED * wide)))
    return 0 if pixels >= MAX_SIDE**2 else pixels


def require(
    spec: ModelSpec, hardware: Hardware, stored_gb: float, host_gb: float = math.inf, offload: str = "auto"
) -> MemoryPlan:
    """The plan; DoesNotFit, with the arithmetic and what would fit, rather than running out of memory."""
    found = memory_plan(spec, hardware, stored_gb, host_gb, offload)
    if found.fits:
        return found
    could = offload != "auto" and memory_plan(spec, hardware, stored_gb, host_gb).fits
    advice = "It would with KINDLING_OFFLOAD=auto." if could else nearest(hardware, host_gb)
    raise DoesNotFit(f"{spec.id} does not fit at {hardware.precision}: {found.reason}. {advice}")


def largest_below(free_gb: float) -> str:
    """The largest model whose files, at two bytes a parameter, take less than `free_gb` of disk; as a sentence."""
    sizes = {spec.id: (spec.parameters + spec.other_parameters) * 2 / 1e9 for spec in MODELS.values()}
    best = max((model for model in sizes if sizes[model] < free_gb), key=lambda model: sizes[model], default="")
    return f"The largest that fits there is {best} ({sizes[best]:.3g} GB)." if best else NONE


def nearest(hardware: Hardware, host_gb: float = math.inf) -> str:
    """The largest model that fits, as a sentence."""
    fitting = [spec for spec in MODELS.values() if memory_plan(spec, hardware, host_gb=host_gb).fits]
    if not fitting:
        return NONE
    return f"The largest that fits is {max(fitting, key=lambda s: s.parameters + s.other_parameters).id}."
