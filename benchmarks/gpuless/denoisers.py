"""What the pipelines call a denoiser with for one step: a function for each class, tensors without values.

Each takes the model, how many sequences it sees at once, the picture's (width, height) and the tokens of its text.
"""

from collections.abc import Callable
from typing import Any

import torch

from handler import ModelSpec

SHRINK, PATCH = 8, 2  # a latent is an eighth of a picture, a transformer's token two by two latents
WORDS = 64  # tokens of a prompt where a model does not fill it up
CLIP_TOKENS, CLIP_G = 77, 1280
UNPADDED = ("ZImageTransformer2DModel", "QwenImageTransformer2DModel")
TOGETHER = ("SD3Transformer2DModel", "UNet2DConditionModel")  # with and without the prompt: at once, not in turns
GUIDED = (*TOGETHER, "QwenImageTransformer2DModel", "ChromaTransformer2DModel")  # whose guidance needs both
Size = tuple[int, int]


def passes(model: Any, spec: ModelSpec) -> tuple[int, int]:
    """How many sequences a picture is in each call, and how many calls a step takes."""
    name = type(model).__name__
    guided = name in GUIDED and spec.guidance > 1
    return (2, 1) if guided and name in TOGETHER else (1, 1 + guided)


def call(model: Any, many: int, size: Size, spec: ModelSpec, longer: int = 0) -> dict[str, Any]:
    """The arguments of one call of `model`; prompts that are not filled up may be `longer`."""
    name = type(model).__name__
    words = WORDS + longer if name in UNPADDED else spec.text_tokens
    return ARGUMENTS[name](model.config, many, size, words)


def full(*sizes: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """A tensor on the GPU."""
    return torch.zeros(sizes, dtype=dtype, device="cuda")


def tokens(size: Size) -> int:
    return size[0] * size[1] // (SHRINK * PATCH) ** 2


def flux(config: Any, many: int, size: Size, words: int) -> dict[str, Any]:
    guidance = {"guidance": full(many)} if config.guidance_embeds else {}
    return {
        "hidden_states": full(many, tokens(size), config.in_channels),
        "encoder_hidden_states": full(many, words, config.joint_attention_dim),
        "pooled_projections": full(many, config.pooled_projection_dim),
        "timestep": full(many),
        "img_ids": full(tokens(size), 3),
        "txt_ids": full(words, 3),
        **guidance,
    }


def chroma(config: Any, many: int, size: Size, words: int) -> dict[str, Any]:
    return {
        "hidden_states": full(many, tokens(size), config.in_channels),
        "encoder_hidden_states": full(many, words, config.joint_attention_dim),
        "timestep": full(many),
        "img_ids": full(tokens(size), 3),
        "txt_ids": full(words, 3),
        "attention_mask": full(many, words + tokens(size)),
    }


def flux2(config: Any, many: int, size: Size, words: int) -> dict[str, Any]:
    return {
        "hidden_states": full(many, tokens(size), config.in_channels),
        "encoder_hidden_states": full(many, words, config.joint_attention_dim),
        "timestep": full(many),
        "img_ids": full(many, tokens(size), 4),
        "txt_ids": full(many, words, 4),
        "guidance": full(many) if config.guidance_embeds else None,
    }


def sd3(config: Any, many: int, size: Size, words: int) -> dict[str, Any]:
    return {
        "hidden_states": full(many, config.in_channels, size[1] // SHRINK, size[0] // SHRINK),
        "encoder_hidden_states": full(many, CLIP_TOKENS + words, config.joint_attention_dim),
        "pooled_projections": full(many, config.pooled_projection_dim),
        "timestep": full(many),
    }


def sdxl(config: Any, many: int, size: Size, words: int) -> dict[str, Any]:
    return {
        "sample": full(many, config.in_channels, size[1] // SHRINK, size[0] // SHRINK),
        "timestep": full(dtype=torch.float32),
        "encoder_hidden_states": full(many, words, config.cross_attention_dim),
        "added_cond_kwargs": {"text_embeds": full(many, CLIP_G), "time_ids": full(many, 6)},
    }


def z_image(config: Any, many: int, size: Size, words: int) -> dict[str, Any]:
    latents = (config.in_channels, 1, size[1] // SHRINK, size[0] // SHRINK)
    return {
        "x": [full(*latents) for _ in range(many)],
        "t": full(many),
        "cap_feats": [full(words, config.cap_feat_dim) for _ in range(many)],
    }


def qwen_image(config: Any, many: int, size: Size, words: int) -> dict[str, Any]:
    side = SHRINK * PATCH
    return {
        "hidden_states": full(many, tokens(size), config.in_channels),
        "encoder_hidden_states": full(many, words, config.joint_attention_dim),
        "timestep": full(many),
        "img_shapes": [[(1, size[1] // side, size[0] // side)]] * many,
    }


ARGUMENTS: dict[str, Callable[[Any, int, Size, int], dict[str, Any]]] = {
    "FluxTransformer2DModel": flux,
    "ChromaTransformer2DModel": chroma,
    "Flux2Transformer2DModel": flux2,
    "SD3Transformer2DModel": sd3,
    "UNet2DConditionModel": sdxl,
    "ZImageTransformer2DModel": z_image,
    "QwenImageTransformer2DModel": qwen_image,
}
