"""Embeddings on the volume, which a prompt names as `embedding:NAME`: what textual inversion has learned.

embeddings/                    files, also in folders; `style` and `faces/anna.safetensors` are names
models/embeddings/             likewise, where the volume is worker-comfyui's too
ComfyUI/models/embeddings/     or ComfyUI's
"""

from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path

from handler.core.errors import InvalidValue
from handler.core.recipe import Embedding
from handler.core.untrusted import printed
from handler.volume.layout import FLOATS, Slot, layout, read_head
from handler.volume.named import REMEMBERED, Folders, hashed, stamp

KEPT = Folders("prompt", ("embeddings", "models/embeddings", "ComfyUI/models/embeddings"))
LARGEST = 64 << 20  # bytes of a file; published ones have less than one
MOST = 1024  # vectors; published ones have up to 128


def chosen(names: Iterable[str], volume: Path) -> tuple[Embedding, ...]:
    """The files that a prompt's names mean. InvalidValue says which is not there, or is no embedding."""
    return tuple(_chosen(name, volume) for name in names)


def names(volume: Path) -> list[str]:
    """Of all that are on the volume."""
    return sorted(KEPT.files(volume))


def _chosen(asked: str, volume: Path) -> Embedding:
    try:
        _, path = KEPT.found(asked, volume)
        seen = stamp(path)
        if fault := _fault(*seen):
            raise InvalidValue(f"prompt: embedding '{asked:.80}' cannot be used: it is {fault}.", "prompt")
        return Embedding(asked, hashed(*seen), path)
    except OSError as error:
        raise InvalidValue(f"prompt: embedding '{asked:.80}' cannot be read: {error.strerror}.", "prompt") from None


@lru_cache(REMEMBERED)
def _fault(path: Path, size: int, written: int, changed: int) -> str:
    """Why the file is no embedding, told from its header alone; empty for one that may be."""
    if size > LARGEST:
        return f"too large: it has {size / 1e6:.0f} MB, and an embedding may have {LARGEST / 1e6:.0f}"
    head, whole = read_head(path)
    try:
        return _unusable(layout(head, whole))
    except ValueError as error:
        return f"no whole safetensors file: {printed(str(error)).strip():.100}"


def _unusable(slots: Mapping[str, Slot]) -> str:
    for name, slot in slots.items():
        if slot.dtype not in FLOATS:
            return f"kept in {slot.dtype}, and should be in 16 or 32 bits: {name:.80}"
        if len(slot.shape) not in (1, 2) or 0 in slot.shape or (len(slot.shape) == 2 and slot.shape[0] > MOST):
            return f"no embedding, which has a list of vectors: {name:.80} is {list(slot.shape)!s:.80}"
    return "" if slots else "empty"
