"""LoRAs whose layers have the names of FLUX's first publication: `double_blocks.0.img_attn.qkv`, `single_blocks...`.

ComfyUI, ai-toolkit, fal's and other trainers write these with dots, below one of several prefixes, and diffusers'
converters read few of them. Which rows of a layer are which of diffusers', the tables of `catalog/originals.py` say.
"""

import re
from collections.abc import Mapping
from typing import Any

from handler.catalog.naming import Naming, Piece, pieces
from handler.catalog.originals import chroma, flux, flux2
from handler.model.loading.lora import Misfit

NAMINGS: Mapping[str, Naming] = {
    "FluxTransformer2DModel": flux,
    "ChromaTransformer2DModel": chroma,
    "Flux2Transformer2DModel": flux2,
}
PREFIX = re.compile(r"((base_model\.model|model|diffusion_model|transformer)\.)*")
WEIGHT = ".weight"
Layers = Mapping[str, Mapping[str, Any]]  # of each layer, by its name, what there is: down, up, alpha


def renamed(denoiser: Any, layers: Layers) -> dict[str, dict[str, Any]] | None:
    """The layers by diffusers' names; None if none of them has such a name. Misfit names one that is not whole, or that
    has no such name beside others.
    """
    if not (naming := NAMINGS.get(type(denoiser).__name__)):
        return None
    bare = {PREFIX.sub("", name, count=1) + WEIGHT: name for name in layers}
    if len(strange := pieces(naming, dict.fromkeys(bare, (1, 1)))[1]) == len(bare):
        return None
    if strange:
        raise Misfit(f"{bare[strange[0]]} fits no weight of the model")
    if twin := next((name for name in layers if name not in bare.values()), None):
        raise Misfit(f"{twin} is there under another name too")
    shapes = {plain: _shape(name, layers[name]) for plain, name in bare.items()}
    found: dict[str, dict[str, Any]] = {}
    for piece in pieces(naming, shapes)[0]:
        source, path = bare[piece.source], piece.name.removesuffix(WEIGHT)
        if not hasattr(_layer(denoiser, path), "weight"):
            raise Misfit(f"{source} fits no weight of the model")
        found[path] = {**layers[source], "up": _rows(layers[source]["up"], piece)}
    return found


def _shape(name: str, parts: Mapping[str, Any]) -> tuple[int, int]:
    """Of what a layer's two matrices make."""
    if not {"down", "up"} <= parts.keys():
        raise Misfit(f"{name} has half of a LoRA")
    if parts["down"].ndim != 2 or parts["up"].ndim != 2:
        raise Misfit(f"{name} has another shape")
    return len(parts["up"]), parts["down"].shape[1]


def _rows(up: Any, piece: Piece) -> Any:
    rows = up[piece.first : piece.last]
    return rows.roll(len(rows) // 2, 0) if piece.turn == "swap" else rows


def _layer(denoiser: Any, path: str) -> Any:
    try:
        return denoiser.get_submodule(path)
    except AttributeError:
        return None
