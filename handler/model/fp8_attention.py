"""Attention in 8-bit floats (e4m3), as an operator of torch: cuDNN's on Hopper and newer, the same roundings on a CPU.

All is rounded as it is: e4m3 keeps four bits of everything from 2^-6 to 448. Every family that has this choice
normalises queries and keys to about 1; values come from normalised tokens, and the result is an average of them. A
scale measured for each call would cost half of what 8 bits gain, and let one picture of a batch round another; a fixed
one would make Inductor write FLUX's longest concatenation twice. The numerators of the softmax, at most 1, are in steps
of 1/256. Sums are in float32.

The operator takes and gives 8 bits: in compiled code roundings become part of the kernels before and after it.
Importing this makes it a backend of diffusers' dispatcher, and lets compiled code that calls it be loaded.
"""

from functools import cache, lru_cache
from typing import Any

import torch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from torch import Tensor

from handler.model.loading.blockwise import E4M3_MOST

BACKEND = "kindling_fp8"
E4M3 = torch.float8_e4m3fn
NUMERATOR = 256.0  # what the numerators, at most 1, are multiplied by; FlashAttention 3 takes the same
CHANNELS, GRID = 128, 16  # of a head: at most, and a multiple of (cuDNN's limits on Blackwell)
SHAPES = 64  # graphs that are kept: one for each number of tokens and pictures
# cuDNN's tensors, and how one number lies in memory
QUERY, KEY, VALUE, OUT, ONE, NUMERATORS, NUMERATORS_UNIT, MOST_NUMERATOR, MOST_OUT = range(1, 10)
NUMBER = {"dim": [1] * 4, "stride": [1] * 4}
Shape = tuple[int, int, int, int]  # pictures, tokens, heads, channels


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Attention of tensors (pictures, tokens, heads, channels), in their type; ValueError for what it cannot do."""
    channels = query.shape[3]
    if attn_mask is not None or is_causal or enable_gqa:
        raise ValueError("attention in FP8 takes no mask and no grouped heads")
    if channels % GRID or channels > CHANNELS:
        raise ValueError(f"attention in FP8 takes heads of {GRID} to {CHANNELS} channels, by {GRID}, not {channels}")
    q, k, v = (x.clamp(-E4M3_MOST, E4M3_MOST).to(E4M3).contiguous() for x in (query, key, value))
    result: Tensor = torch.ops.kindling.attention_fp8(q, k, v, channels**-0.5 if scale is None else scale)
    return result.to(query.dtype)


@torch.library.custom_op("kindling::attention_fp8", mutates_args=(), device_types="cpu")
def attention_fp8(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """softmax(query key^T scale) value of e4m3 (pictures, tokens, heads, channels), on a CPU."""
    q, k, v = (x.transpose(1, 2).float() for x in (query, key, value))
    scores = (q @ k.mT) * scale
    numerators = (scores - scores.amax(-1, keepdim=True)).exp()
    rounded = (numerators * NUMERATOR).to(E4M3).float() / NUMERATOR
    result = (rounded @ v / numerators.sum(-1, keepdim=True)).transpose(1, 2)
    return result.to(E4M3).contiguous()


@attention_fp8.register_fake
def _shape_of(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    return torch.empty_like(query)


@attention_fp8.register_kernel("cuda")
def _by_cudnn(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """The same by cuDNN, on the current stream."""
    import cudnn

    device, out = query.device, torch.empty_like(query)
    handle, graph = _handle(), _graph(query.shape, key.shape[1], scale)
    cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream(device).cuda_stream)
    workspace = torch.empty(graph.get_workspace_size(), dtype=torch.uint8, device=device)
    tensors = {QUERY: query, KEY: key, VALUE: value, OUT: out, **_numbers(device)}
    graph.execute(tensors, workspace, handle=handle)
    return out


@cache
def _handle() -> Any:
    """cuDNN's, for the only GPU that a worker uses, from the only thread that draws."""
    import cudnn

    return cudnn.create_handle()


@cache
def _numbers(device: torch.device) -> dict[int, Tensor]:
    """What is the same in every call, and where cuDNN leaves the largest numerator and result, which nobody reads."""
    numbers = {ONE: 1.0, NUMERATORS: NUMERATOR, NUMERATORS_UNIT: 1 / NUMERATOR, MOST_NUMERATOR: 0.0, MOST_OUT: 0.0}
    return {name: torch.tensor([number], device=device) for name, number in numbers.items()}


@lru_cache(SHAPES)
def _graph(shape: Shape, keys: int, scale: float) -> Any:
    """cuDNN's plan for queries of this shape and as many keys."""
    import cudnn

    graph = described(shape, keys, scale, handle=_handle())
    graph.build([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
    return graph


def described(shape: Shape, keys: int, scale: float, **given: Any) -> Any:
    """The computation in cuDNN's words; `given` goes to its graph, such as `sm_version` where there is no GPU.

    On Hopper cuDNN gives only 8-bit results of 8-bit tensors (its sdpa_support_surface.h).
    """
    import cudnn

    e4m3, float32 = cudnn.data_type.FP8_E4M3, cudnn.data_type.FLOAT
    graph = cudnn.pygraph(io_data_type=e4m3, intermediate_data_type=float32, compute_data_type=float32, **given)
    q, k, v = (
        graph.tensor(uid=name, **_layout(shape, tokens), data_type=e4m3)
        for name, tokens in ((QUERY, shape[1]), (KEY, keys), (VALUE, keys))
    )
    one, more, less = (
        graph.tensor(uid=name, **NUMBER, data_type=float32) for name in (ONE, NUMERATORS, NUMERATORS_UNIT)
    )
    units = {"descale_q": one, "descale_k": one, "descale_v": one, "descale_s": less, "scale_s": more, "scale_o": one}
    out, _, *most = graph.sdpa_fp8(q=q, k=k, v=v, **units, attn_scale=scale, generate_stats=False)
    outputs = {OUT: (out, _layout(shape, shape[1]), e4m3)}
    outputs |= {name: (made, NUMBER, float32) for name, made in zip((MOST_NUMERATOR, MOST_OUT), most, strict=True)}
    for name, (made, layout, kind) in outputs.items():
        made.set_uid(name).set_output(True).set_dim(layout["dim"]).set_stride(layout["stride"]).set_data_type(kind)
    return graph


def _layout(shape: Shape, tokens: int) -> dict[str, list[int]]:
    """cuDNN names heads before tokens, however they lie in memory."""
    pictures, _, heads, channels = shape
    row = heads * channels
    return {"dim": [pictures, heads, tokens, channels], "stride": [tokens * row, channels, row, 1]}


def _register() -> None:
    """Make `attend` a backend of diffusers' dispatcher, whose names are an enumeration that takes no new ones."""
    name = str.__new__(AttentionBackendName, BACKEND)
    name._name_, name._value_ = BACKEND.upper(), BACKEND
    AttentionBackendName._member_map_[name.name] = AttentionBackendName._value2member_map_[BACKEND] = name
    _AttentionBackendRegistry.register(name)(attend)


_register()
