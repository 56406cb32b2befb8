"""What textual inversion has learned: vectors that take the place of words, from files on the volume."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from handler.core.errors import InvalidValue
from handler.core.recipe import Embedding
from handler.model.adapters.applied import opened
from handler.model.text.encoders import Encoder


def vectors(embeddings: Iterable[Embedding], encoders: Sequence[Encoder]) -> list[dict[str, Any]]:
    """For each encoder its vectors (count, width) by the embedding's name, of whatever width the file has.

    InvalidValue names the file that fits no encoder, or cannot be read.
    """
    read = {embedding.name: opened(embedding, "prompt")[0] for embedding in embeddings}
    found = [{name: _vectors(held, encoder.key) for name, held in read.items()} for encoder in encoders]
    for name in read:
        widths = {each[name].shape[-1] for each in found}
        if not widths & {encoder.width for encoder in encoders}:
            told = " and ".join(map(str, sorted(widths)))
            raise InvalidValue(f"prompt: embedding '{name}' is for another model: its vectors have {told}.", "prompt")
    return found


def _vectors(held: Mapping[str, Any], key: str) -> Any:
    """Those under the encoder's own name, else the first by name, as ComfyUI takes them."""
    tensor = held[key if key in held else min(held)]
    return tensor.reshape(-1, tensor.shape[-1])
