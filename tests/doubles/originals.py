"""Single files as people hold them: the weights of a pipeline by the names of the models' first releases.

U-Nets and VAEs are renamed here by their configs, transformers and OpenCLIP by the tables of `handler/catalog/` read
backwards. Tests hold both to diffusers' own converters.
"""

import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from handler.catalog.naming import Rules
from handler.catalog.originals import CHROMA, CLIP, FLUX, FLUX2, SD3

Weights = dict[str, Any]
TABLES: dict[str, Rules] = {
    "FluxTransformer2DModel": FLUX,
    "ChromaTransformer2DModel": CHROMA,
    "Flux2Transformer2DModel": FLUX2,
    "SD3Transformer2DModel": SD3,
}
SCALES = re.compile(r"(query_norm|key_norm|norms\.\d+)\.weight$")
RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
    "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
UNET = {
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
}  # fmt: skip
VAE = [
    (r"mid_block\.resnets\.0", "mid.block_1"), (r"mid_block\.resnets\.1", "mid.block_2"),
    (r"mid_block\.attentions\.0", "mid.attn_1"), (r"conv_shortcut", "nin_shortcut"), (r"conv_norm_out", "norm_out"),
    (r"downsamplers\.0", "downsample"), (r"upsamplers\.0", "upsample"), (r"resnets", "block"),
    (r"group_norm", "norm"), (r"to_q", "q"), (r"to_k", "k"), (r"to_v", "v"), (r"to_out\.0", "proj_out"),
]  # fmt: skip


def original(model: Any) -> Weights:
    """The weights of one model by their first names."""
    weights, kind = model.state_dict(), type(model).__name__
    if kind in TABLES:
        return backwards(weights, TABLES[kind], swapped=last_context(weights))
    match kind:
        case "UNet2DConditionModel":
            return {unet_name(name, model.config): tensor for name, tensor in weights.items()}
        case "AutoencoderKL" | "AutoencoderKLFlux2":
            return dict(
                vae_item(name, tensor, len(model.config.block_out_channels)) for name, tensor in weights.items()
            )
        case "ZImageTransformer2DModel":
            return z_image(weights)
        case "CLIPTextModel" | "CLIPTextModelWithProjection":
            return {f"text_model.{bare(name)}" if "projection" not in name else name: t for name, t in weights.items()}
        case _:
            return dict(weights)


def open_clip(model: Any) -> Weights:
    """A CLIP with projection as OpenCLIP has it."""
    made = backwards({bare(name): tensor for name, tensor in model.state_dict().items()}, CLIP)
    return made | {"logit_scale": torch.tensor(4.6)}


def bare(name: str) -> str:
    return name.removeprefix("text_model.")


def backwards(weights: Mapping[str, Any], rules: Rules, swapped: str = "") -> Weights:
    """All of `weights` by the names that the rules are for."""
    found, used = Weights(), set[str]()
    for old, to in rules.items():
        for name in list(weights):
            first = re.escape(to.names[0] if to.names else "-").replace(r"\#", r"(\d+)")
            if not (match := re.fullmatch(rf"{first}(\.weight|\.bias)?", name)):
                continue
            *numbers, leaf = match.groups()
            parts = [numbered(part, numbers) + (leaf or "") for part in to.names]
            whole = torch.cat([weights[part] for part in parts]) if len(parts) > 1 else weights[parts[0]]
            turned = swap(whole) if to.turn == "swap" or (swapped and parts[0].startswith(swapped)) else whole
            key = numbered(old, numbers) + (leaf or "")
            found[SCALES.sub(r"\1.scale", key)] = turned.t().contiguous() if to.turn == "transpose" else turned
            used |= set(parts)
    assert used == set(weights), set(weights) - used
    return found


def numbered(pattern: str, numbers: list[str]) -> str:
    for number in numbers:
        pattern = pattern.replace("#", number, 1)
    return pattern


def swap(tensor: Any) -> Any:
    return torch.cat(tensor.chunk(2)[::-1])


def last_context(weights: Mapping[str, Any]) -> str:
    """Stable Diffusion 3's last modulation of text, whose halves are exchanged."""
    numbers = [
        int(found[1]) for name in weights if (found := re.match(r"transformer_blocks\.(\d+)\.norm1_context", name))
    ]
    return (
        f"transformer_blocks.{max(numbers)}.norm1_context.linear"
        if numbers and "pos_embed.pos_embed" in weights
        else ""
    )


def unet_name(name: str, config: Any) -> str:
    """By the arithmetic of Stable Diffusion's first release."""
    layers, blocks = config.layers_per_block, len(config.block_out_channels)
    stem, _, leaf = name.rpartition(".")
    if stem in UNET:
        return f"{UNET[stem]}.{leaf}"
    words = name.split(".")
    if words[0] == "mid_block":
        place = {"resnets0": 0, "attentions0": 1, "resnets1": 2}[words[1] + words[2]]
        return f"middle_block.{place}.{inner('.'.join(words[3:]))}"
    block, kind, number, rest = int(words[1]), words[2], int(words[3]), inner(".".join(words[4:]))
    if words[0] == "down_blocks":
        at = 1 + block * (layers + 1) + (layers if kind == "downsamplers" else number)
        return (
            f"input_blocks.{at}.0.op.{leaf}"
            if kind == "downsamplers"
            else f"input_blocks.{at}.{kind != 'resnets':d}.{rest}"
        )
    at = block * (layers + 1) + (layers if kind == "upsamplers" else number)
    attends = "CrossAttn" in config.up_block_types[block]
    assert block < blocks
    return (
        f"output_blocks.{at}.{1 + attends}.conv.{leaf}"
        if kind == "upsamplers"
        else f"output_blocks.{at}.{kind != 'resnets':d}.{rest}"
    )


def inner(name: str) -> str:
    stem, _, leaf = name.rpartition(".")
    return f"{RESNET.get(stem, stem)}.{leaf}"


def vae_item(name: str, tensor: Any, blocks: int) -> tuple[str, Any]:
    """Attention's matrices were convolutions of one pixel."""
    if re.search(r"attentions\.0\.to_.*weight", name):
        tensor = tensor[:, :, None, None]
    name = re.sub(r"up_blocks\.(\d)", lambda found: f"up.{blocks - 1 - int(found[1])}", name)
    name = name.replace("down_blocks", "down")
    for old, new in VAE:
        name = re.sub(old, new, name)
    return name, tensor


def z_image(weights: Mapping[str, Any]) -> Weights:
    found = Weights()
    for name, tensor in weights.items():
        if name.endswith("attention.to_q.weight"):
            head = name.removesuffix("to_q.weight")
            found[f"{head}qkv.weight"] = torch.cat([weights[f"{head}to_{each}.weight"] for each in "qkv"])
        elif not re.search(r"attention\.to_[kv]\.", name):
            for old, new in {"attention.to_out.0": "attention.out", "attention.norm_q": "attention.q_norm",
                             "attention.norm_k": "attention.k_norm", "all_final_layer.2-1": "final_layer",
                             "all_x_embedder.2-1": "x_embedder"}.items():  # fmt: skip
                name = name.replace(old, new)
            found[name] = tensor
    return found


def checkpoint(pipeline: Any) -> Weights:
    """All of a Stable Diffusion or SDXL pipeline's as one."""
    found = {f"model.diffusion_model.{name}": tensor for name, tensor in original(pipeline.unet).items()}
    found |= {f"first_stage_model.{name}": tensor for name, tensor in original(pipeline.vae).items()}
    if not hasattr(pipeline, "text_encoder_2"):
        return found | {f"cond_stage_model.transformer.{n}": t for n, t in original(pipeline.text_encoder).items()}
    found |= {f"conditioner.embedders.0.transformer.{n}": t for n, t in original(pipeline.text_encoder).items()}
    return found | {f"conditioner.embedders.1.model.{n}": t for n, t in open_clip(pipeline.text_encoder_2).items()}


def write_gguf(weights: Mapping[str, Any], path: Path, kind: str) -> Path:
    """A GGUF file: matrices as `kind`, where their rows fill its blocks, all else in full."""
    import gguf

    head, data, types = b"", b"", gguf.GGMLQuantizationType
    for name, tensor in weights.items():
        block = gguf.GGML_QUANT_SIZES[types[kind]][0]
        used = types[kind] if tensor.ndim == 2 and tensor.shape[1] % block == 0 else types.F32
        data += bytes(-len(data) % 32)
        head += struct.pack("<Q", len(name)) + name.encode() + struct.pack("<I", tensor.ndim)
        head += struct.pack(f"<{tensor.ndim}Q", *reversed(tensor.shape)) + struct.pack("<IQ", used, len(data))
        data += gguf.quants.quantize(tensor.float().numpy(), used).tobytes()
    fact = struct.pack("<Q", 20) + b"general.architecture" + struct.pack("<IQ", 8, 4) + b"flux"
    head = b"GGUF" + struct.pack("<IQQ", 3, len(weights), 1) + fact + head
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(head + bytes(-len(head) % 32) + data)
    return path


def write(weights: Mapping[str, Any], path: Path, prefix: str = "", **said: str) -> Path:
    """A safetensors file of `weights`, all names after `prefix`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({prefix + name: tensor.contiguous().clone() for name, tensor in weights.items()}, path, said or None)
    return path
