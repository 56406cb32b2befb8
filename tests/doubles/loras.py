"""LoRAs of random matrices for the layers of a loaded model, as files that trainers write."""

import hashlib
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from handler.core.recipe import Lora

# Of spark's transformer.
LAYERS = ("transformer_blocks.0.attn.to_q", "transformer_blocks.1.ff.net.2", "single_transformer_blocks.0.proj_out")


def matrices(model: Any, layers: tuple[str, ...], rank: int = 2, seed: int = 0) -> dict[str, tuple[Any, Any]]:
    """For each layer of `model` down and up, that together are about a third as large as its weight."""
    generator, found = torch.Generator().manual_seed(seed), {}
    for layer in layers:
        out, into = model.get_submodule(layer).weight.shape
        down, up = torch.randn(rank, into, generator=generator), torch.randn(out, rank, generator=generator)
        found[layer] = down * into**-0.5, up * 0.3 * rank**-0.5
    return found


def peft(found: dict[str, tuple[Any, Any]], component: str = "transformer") -> dict[str, Any]:
    """As diffusers and ai-toolkit write them."""
    parts = {f"{component}.{layer}.lora_A.weight": down for layer, (down, _) in found.items()}
    return parts | {f"{component}.{layer}.lora_B.weight": up.contiguous() for layer, (_, up) in found.items()}


def put(path: Path, tensors: dict[str, Any], weight: float = 1.0, metadata: dict[str, str] | None = None) -> Lora:
    """Write a LoRA's file; the LoRA."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, metadata)
    return Lora(path.stem, weight, hashlib.sha256(path.read_bytes()).hexdigest(), path)
