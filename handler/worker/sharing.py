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

TP_SIZE = "KINDLING_TP_SIZE"


def require_splittable(spec: ModelSpec, settings: Settings) -> None:
    """SettingsError, which says why, unless several GPUs can draw `spec` together as `settings` ask."""
    both = min(settings.ring_degree, settings.ulysses_degree) > 1  # which diffusers splits evenly only
    for wrong, why in (
        (not spec.splits, f"diffusers cannot split {spec.id} over several GPUs"),
        (both and of_any_length(spec), "its prompts are of any length; use one of both degrees"),
        (settings.step_cache != "off", "a step cache skips blocks of whole pictures; use KINDLING_STEP_CACHE=off"),
        (settings.offload == "blocks", "blocks that wait in host memory cannot be split; use KINDLING_OFFLOAD=auto"),
    ):
        if max(settings.ranks, settings.tp_size) > 1 and wrong:
            name = degree(settings) if settings.ranks > 1 else TP_SIZE
            raise SettingsError(f"{name}: {why}.", name)
    if settings.tp_size > 1 and not spec.streams.shared:
        raise _unshared(f"transformers cannot split the text encoders of {spec.id}; use 1")
    if settings.ranks % settings.tp_size:
        told = (
            f"{settings.tp_size} GPUs are to share a text encoder, so as many or a multiple have to draw each picture"
        )
        raise _unshared(f"{told}; set KINDLING_ULYSSES_DEGREE")


def require_exact(hardware: Hardware, settings: Settings) -> None:
    """SettingsError if the text encoders that several GPUs are to share would be rounded."""
    if settings.tp_size > 1 and hardware.quantised:
        told = f"text encoders that are rounded to {hardware.precision} cannot be split over several GPUs"
        raise _unshared(f"{told}; use KINDLING_PRECISION=bf16, or 1 here")


def _unshared(why: str) -> SettingsError:
    return SettingsError(f"{TP_SIZE}: {why}.", TP_SIZE)


def require_ring(hardware: Hardware, settings: Settings) -> None:
    """SettingsError, which says why, if `settings` ask for ring attention that `hardware` cannot compute."""
    if settings.ring_degree > 1:
        ring.choose(settings.attention, hardware.capability, hardware.dtype)


def require_shared(source: Source, settings: Settings) -> None:
    """SettingsError unless as many ranks as are to can share the heads of the model, and of its text encoder."""
    heads = json_of(source, "transformer/config.json").get("num_attention_heads", 0)
    if heads % settings.ulysses_degree:
        told = f"the model has {heads} heads of attention, which {settings.ulysses_degree} GPUs cannot share evenly"
        raise SettingsError(f"{degree(settings)}: {told}.", degree(settings))
    config = json_of(source, "text_encoder/config.json") if settings.tp_size > 1 else {}
    heads = config.get("text_config", config).get("num_key_value_heads", 0)
    if heads % settings.tp_size:
        raise _unshared(
            f"the text encoder has {heads} heads of keys, which {settings.tp_size} GPUs cannot share evenly"
        )


def degree(settings: Settings) -> str:
    """The variable that asks for several GPUs."""
    if settings.ranks == 1:
        return "KINDLING_WORKERS"
    return f"KINDLING_{'RING' if settings.ulysses_degree == 1 else 'ULYSSES'}_DEGREE"


def shared_by(settings: Settings) -> str:
    """How several share each picture; empty where one GPU draws it."""
    return f"ulysses {settings.ulysses_degree}, ring {settings.ring_degree}" if settings.ranks > 1 else ""


def uncompiled(spec: ModelSpec, settings: Settings) -> str:
    """Why several GPUs draw `spec` together without compiled code; empty if they need not."""
    if settings.ring_degree > 1:
        return "several GPUs draw each picture, and ring attention is not compiled"
    if settings.ranks > 1 and (of_any_length(spec) or spec.text_tokens % settings.ranks):
        return "several GPUs draw each picture, and compiled code wants prompts that they can split evenly"
    return ""


def of_any_length(spec: ModelSpec) -> bool:
    """Whether its prompts have as many tokens as they need, which several GPUs cannot always split evenly."""
    return spec.family.endswith("qwen_image")


def alone(settings: Settings) -> Settings:
    """The same on one GPU."""
    return settings.model_copy(update={"ulysses_degree": 1, "ring_degree": 1, "tp_size": 1, "workers": 1})


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
