"""Autoencoders: how they lie in memory and compute attention, and which decoder can be compiled.

Their middle has one head as wide as all its channels, 512 or 384. Fused kernels end at 256, and torch then takes one
made for older GPUs: there two products and a softmax take its place. On a CPU attention is diffusers' own, bit by bit.
"""

from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import QwenImageAttentionBlock
from diffusers.models.autoencoders.vae import Decoder
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

WIDEST = 256  # channels of a head that a fused kernel takes; cuDNN's takes 128
SCORES = 1 << 27  # bytes of fp32 scores at once; 2.5 times as much with what softmax and rounding make of them


def prepare(vae: Any, device: str) -> None:
    """Lay `vae` out for convolutions, and on a GPU let heads too wide for fused kernels attend by `attend_wide`."""
    if all(parameter.ndim < 5 for parameter in vae.parameters()):  # those of videos stay
        vae.to(memory_format=torch.channels_last)
    if device != "cpu":
        widen(vae)


def widen(vae: Any) -> None:
    """Let every wide head of `vae` attend by `attend_wide`; what is exported from here on too."""
    for module in vae.modules():
        if isinstance(module, Attention | QwenImageAttentionBlock):
            vars(module)["forward"] = _wide(module.forward)


def compilable(pipeline: Any, device: str) -> Any:
    """The decoder of the pipeline's VAE where it can be compiled, and that pays: on a GPU. None where it stays eager.

    So do decoders that keep what they made (Qwen-Image's, of earlier frames), and those whose weights diffusers brings
    to fp32 for a while (SDXL's): compiled code would go on with where they were.
    """
    decoder = getattr(pipeline.vae, "decoder", None)
    stays = device == "cpu" or type(decoder) is not Decoder or hasattr(pipeline, "upcast_vae")
    return None if stays else decoder


def _wide(forward: Callable[..., Any]) -> Callable[..., Any]:
    def wide(*args: Any, **kwargs: Any) -> Any:
        with _Wide():
            return forward(*args, **kwargs)

    return wide


class _Wide(TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is scaled_dot_product_attention and args[0].shape[-1] > WIDEST:
            return attend_wide(*args[:3])  # VAEs mask nothing
        return function(*args, **(kwargs or {}))


@torch.library.custom_op("kindling::attend_wide", mutates_args=())
def attend_wide(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """What torch's `scaled_dot_product_attention` makes of (batch, heads, tokens, channels), with scores in fp32.

    An operator of its own, so that compiled code too takes as many queries at once as `SCORES` allows.
    """
    scaled, found = query * query.shape[-1] ** -0.5, torch.empty(query.shape, dtype=query.dtype, device=query.device)
    rows = max(1, SCORES // (4 * key.shape[-2]))
    for heads in zip(*(tensor.flatten(0, 1) for tensor in (scaled, key, value, found)), strict=True):
        queries, keys, values, attended = heads
        for some, into in zip(queries.split(rows), attended.split(rows), strict=True):
            torch.mm(_scores(some, keys.T).softmax(-1).to(values.dtype), values, out=into)
    return found


@attend_wide.register_fake
def _(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return torch.empty(query.shape, dtype=query.dtype, device=query.device)


def _scores(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Their product in fp32, which a GPU gives of 16-bit factors; a CPU does not."""
    if queries.is_cuda and queries.dtype is not torch.float32:
        return torch.mm(queries, keys, out_dtype=torch.float32)
    return queries.float() @ keys.float()
