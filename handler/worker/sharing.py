"""What several GPUs cannot draw together, and why: of single pictures `model/split.py` says that. Settings for them."""

import os

from handler.catalog import ring
from handler.catalog.spec import ModelSpec
from handler.core.errors import SettingsError
from handler.core.host import host_memory
from handler.core.settings import Settings
from handler.model.given_gpus import SEEN, gpu_count, named_gpus
from handler.model.hardware import Hardware
from handler.volume.listing import json_of
from handler.volume.manifest import Source


def require_splittable(spec: ModelSpec, settings: Settings) -> None:
    """SettingsError, which says why, unless several GPUs can draw `spec` together as `settings` ask."""
    both = min(settings.ring_degree, settings.ulysses_degree) > 1  # which diffusers splits evenly only
    for wrong, why in (
        (not spec.splits, f"diffusers cannot split {spec.id} over several GPUs"),
        (both and spec.family.endswith("qwen_image"), "its prompts are of any length; use one of both degrees"),
        (settings.step_cache != "off", "a step cache skips blocks of whole pictures; use KINDLING_STEP_CACHE=off"),
        (settings.offload == "blocks", "blocks that wait in host memory cannot be split; use KINDLING_OFFLOAD=auto"),
    ):
        if settings.ranks > 1 and wrong:
            raise SettingsError(f"{degree(settings)}: {why}.", degree(settings))


def require_ring(hardware: Hardware, settings: Settings) -> None:
    """SettingsError, which says why, if `settings` ask for ring attention that `hardware` cannot compute."""
    if settings.ring_degree > 1:
        ring.choose(settings.attention, hardware.capability, hardware.dtype)


def require_shared(source: Source, settings: Settings) -> None:
    """SettingsError unless as many ranks as Ulysses attention has can share the heads of the model in `source`."""
    heads = json_of(source, "transformer/config.json").get("num_attention_heads", 0)
    if heads % settings.ulysses_degree:
        told = f"the model has {heads} heads of attention, which {settings.ulysses_degree} GPUs cannot share evenly"
        raise SettingsError(f"{degree(settings)}: {told}.", degree(settings))


def degree(settings: Settings) -> str:
    """The variable that asks for several GPUs."""
    if settings.ranks == 1:
        return "KINDLING_WORKERS"
    return f"KINDLING_{'RING' if settings.ulysses_degree == 1 else 'ULYSSES'}_DEGREE"


def alone(settings: Settings) -> Settings:
    """The same on one GPU."""
    return settings.model_copy(update={"ulysses_degree": 1, "ring_degree": 1, "workers": 1})


def processes(settings: Settings) -> int:
    """How many of this machine's load the model, on a GPU each: all ranks of all workers, where these are counted."""
    return settings.ranks * (1 if settings.workers == "auto" else settings.workers)


def host_share(settings: Settings, host_gb: float | None = None) -> float:
    """What each of these has of a host's memory, in GB: of one with so much, or of this one."""
    return (host_memory() / 1e9 if host_gb is None else host_gb) / processes(settings)


def without_keys(settings: Settings) -> Settings:
    """The same for a process that serves nobody: of what is never shown, only what reading the volume needs."""
    keys = {name: one.get_default() for name, one in Settings.model_fields.items() if not one.repr}
    return settings.model_copy(update=keys | {"volume_key": settings.volume_key})


def visible(first: int, count: int = 1) -> dict[str, str]:
    """What lets a process see so many of the GPUs that this one sees, from the `first` on, and no others."""
    seen = named_gpus()
    return {SEEN: ",".join(seen[i] if i < len(seen) else str(i) for i in range(first, first + count))}


def require_workers(settings: Settings) -> int:
    """How many workers `settings` mean on this machine; SettingsError if they want more GPUs than it has.

    Without a GPU as many as it has processors, for trials; "auto" is one then.
    """
    if settings.workers == 1:
        return 1
    gpus, each = 0 if settings.device == "cpu" else gpu_count(), settings.ranks
    if settings.workers == "auto":
        return max(1, gpus // each)
    most, what = (gpus // each, f"GPU{'s' * (gpus > 1)}") if gpus else (os.cpu_count() or 1, "processors and no GPU")
    if settings.workers > max(1, most):
        many = f"{settings.workers} workers" + (f" of {each} GPUs each" if each > 1 else "")
        told = f"{many} are more than this machine has room for: it has {gpus or most} {what}"
        raise SettingsError(f"KINDLING_WORKERS: {told}. KINDLING_WORKERS=auto takes what is there.", "KINDLING_WORKERS")
    return settings.workers
