"""A LoRA that belongs to a model, fused into its weights while they are loaded: no adapter is left at run time.

peft would wrap every layer to do the same, and importing it costs every cold start a tenth of a second.
"""

from collections.abc import Mapping
from typing import Any

DOWN, UP, ALPHA = ".lora_down.weight", ".lora_up.weight", ".alpha"


def fuse(weights: Mapping[str, Any], lora: Mapping[str, Any]) -> None:
    """Add alpha / rank * up @ down to each weight the LoRA names (Hu et al. 2021, arXiv:2106.09685, section 4.1).

    In place. ValueError names the first key that no weight answers to.
    """
    from torch import float32

    layers = {key.removesuffix(DOWN) for key in lora if key.endswith(DOWN)}
    known = {layer + part for layer in layers for part in (DOWN, UP, ALPHA)}
    if strange := sorted((lora.keys() - known) | {layer for layer in layers if f"{layer}.weight" not in weights}):
        raise ValueError(f"{strange[0]} fits no weight of the model")
    for layer in layers:
        weight = weights[f"{layer}.weight"]
        down, up = (lora[layer + part].to(weight.device, dtype=float32) for part in (DOWN, UP))
        rank = down.shape[0]
        scale = float(lora.get(layer + ALPHA, rank)) / rank
        weight.add_((scale * (up @ down)).to(weight.dtype))
