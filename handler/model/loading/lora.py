"""A LoRA that belongs to a model, fused into its weights while they are loaded: no adapter is left at run time.

peft would wrap every layer to do the same, and importing it costs every cold start a tenth of a second.
"""

from collections.abc import Collection, Mapping
from typing import Any


class Misfit(ValueError):
    """What of a LoRA does not go with the weights."""


DOWN, UP, ALPHA = ".lora_down.weight", ".lora_up.weight", ".alpha"


def fuse(weights: Mapping[str, Any], lora: Mapping[str, Any]) -> None:
    """`add` to each weight that the LoRA names. Misfit names the first key that no weight answers to."""
    for name in named(weights, lora):
        add(weights[name], name, lora)


def named(weights: Collection[str], lora: Mapping[str, Any]) -> set[str]:
    """The weights that the LoRA changes. Misfit names the first key that none of `weights` answers to."""
    layers = {key.removesuffix(DOWN) for key in lora if key.endswith(DOWN)}
    known = {layer + part for layer in layers for part in (DOWN, UP, ALPHA)}
    if strange := sorted((lora.keys() - known) | {layer for layer in layers if f"{layer}.weight" not in weights}):
        raise Misfit(f"{strange[0]} fits no weight of the model")
    return {f"{layer}.weight" for layer in layers}


def add(weight: Any, name: str, lora: Mapping[str, Any]) -> None:
    """Add alpha / rank * up @ down to the weight of this name (Hu et al. 2021, arXiv:2106.09685, section 4.1).

    In place. Misfit if their shapes do not go together.
    """
    from torch import float32

    layer = name.removesuffix(".weight")
    down, up = (lora[layer + part].to(weight.device, dtype=float32) for part in (DOWN, UP))
    if weight.shape != (up.shape[0], down.shape[-1]) or up.shape[-1] != down.shape[0]:
        raise Misfit(f"{name} has another shape")
    rank = down.shape[0]
    scale = float(lora.get(layer + ALPHA, rank)) / rank
    weight.add_((scale * (up @ down)).to(weight.dtype))
