"""Precisions with a scale for each block of a row, for Blackwell's tensor cores: MXFP8 and NVFP4.

MXFP8 (Open Compute's Microscaling 1.0): 32 8-bit floats and a power of two, here the least that holds the largest
value. NVFP4 (NVIDIA's): 16 4-bit floats and an 8-bit one, which one float scales again: one for a weight, one for each
picture's activations. Both as torchao has them; the matrix product is torch's own. Where there is none, on a CPU, it
is emulated: the same roundings, then exact.

Scales are kept as bytes, in the order that cuBLAS wants: tiles of 128 rows and 4 blocks, in which the rows j, 32 + j,
64 + j and 96 + j lie side by side (its "1D block scaling factors layout").
"""

import torch
from torch import Tensor, nn

MX_BLOCK, NV_BLOCK = 32, 16
E4M3_MOST, E2M1_MOST = 448.0, 6.0
E4M3_LEAST = 2.0**-6  # the smallest that is not subnormal
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # and again below zero, from code 8 on
BIAS, LOWEST, HIGHEST = 127, -126, 127  # of a power of two as a byte
TINY = torch.finfo(torch.float32).tiny


def mxfp8(values: Tensor) -> tuple[Tensor, Tensor]:
    """`values` (rows, columns) as 8-bit floats, and the scales' bytes."""
    blocks = values.float().unflatten(1, (-1, MX_BLOCK))
    fraction, exponent = torch.frexp(blocks.abs().amax(2) / E4M3_MOST)
    power = (exponent - (fraction == 0.5).int()).clamp(LOWEST, HIGHEST)  # frexp's fraction is from 0.5 to below 1
    rounded = torch.ldexp(blocks, -power.unsqueeze(2)).to(torch.float8_e4m3fn).flatten(1)
    return rounded, in_tiles((power + BIAS).to(torch.uint8))


def from_mxfp8(rounded: Tensor, scale: Tensor) -> Tensor:
    """What those stand for, in float32."""
    power = from_tiles(scale, rounded.shape[0], rounded.shape[1] // MX_BLOCK).int() - BIAS
    return torch.ldexp(rounded.float().unflatten(1, (-1, MX_BLOCK)), power.unsqueeze(2)).flatten(1)


def times_mxfp8(x: Tensor, parts: tuple[Tensor, ...], bias: Tensor | None) -> Tensor:
    """`x` (pictures, tokens, in), rounded likewise, by a weight (out, in) and its bias."""
    rounded, scale = mxfp8(x.flatten(0, 1))
    if not x.is_cuda:
        return nn.functional.linear(from_mxfp8(rounded, scale).to(x.dtype), from_mxfp8(*parts).to(x.dtype), bias)
    e8m0 = torch.float8_e8m0fnu
    scales = scale.view(e8m0), parts[1].view(e8m0)
    product: Tensor = torch._scaled_mm(rounded, parts[0].t(), *scales, bias=bias, out_dtype=x.dtype)
    return product


def nvfp4(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`values` (..., rows, columns) as 4-bit floats, two in a byte, by rows; the scales' bytes; their scales (...)."""
    blocks = values.float().unflatten(-1, (-1, NV_BLOCK))
    peaks = blocks.abs().amax(-1)
    whole = (peaks.amax((-2, -1), keepdim=True) / (E4M3_MOST * E2M1_MOST)).clamp(min=TINY)
    scale = (peaks / E2M1_MOST / whole).clamp(E4M3_LEAST, E4M3_MOST).to(torch.float8_e4m3fn)
    exact = (blocks / (scale.float() * whole).unsqueeze(-1)).reshape(-1, values.shape[-1])
    size = exact.abs().clamp(max=E2M1_MOST)
    octave = (size >= 2).int() + (size >= 4).int()
    # torch rounds halves to even, and codes of neighbours take turns in being even
    codes = torch.ldexp(size, 1 - octave).round().to(torch.uint8) + 2 * octave.to(torch.uint8)
    codes = codes + 8 * (exact < 0).to(torch.uint8)
    tiles = in_tiles(scale.view(torch.uint8).reshape(codes.shape[0], -1))
    return codes[:, ::2] + (codes[:, 1::2] << 4), tiles, whole[..., 0, 0]


def from_nvfp4(packed: Tensor, scale: Tensor, whole: Tensor | float) -> Tensor:
    """What those stand for, in float32."""
    codes = torch.stack((packed & 15, packed >> 4), 2).flatten(1)
    levels = torch.tensor((*E2M1, *(-level for level in E2M1)), device=packed.device)[codes.int()]
    scales = from_tiles(scale, levels.shape[0], levels.shape[1] // NV_BLOCK).view(torch.float8_e4m3fn).float() * whole
    return (levels.view(*scales.shape, NV_BLOCK) * scales.unsqueeze(2)).flatten(1)


def times_nvfp4(x: Tensor, parts: tuple[Tensor, ...], bias: Tensor | None) -> Tensor:
    """`x` (pictures, tokens, in), rounded likewise, by a weight (out, in) and its bias."""
    packed, scale, whole = nvfp4(x)
    if x.is_cuda:
        e2m1, e4m3 = torch.float4_e2m1fn_x2, torch.float8_e4m3fn
        scales = scale.view(e4m3), parts[1].view(e4m3)
        product = torch._scaled_mm(packed.view(e2m1), parts[0].view(e2m1).t(), *scales, out_dtype=x.dtype)
    else:
        exact, weight = from_nvfp4(packed, scale, 1.0), from_nvfp4(parts[0], parts[1], 1.0)
        product = nn.functional.linear(exact.to(x.dtype), weight.to(x.dtype))
    return scaled(product, (whole * parts[2])[:, None, None], bias)


def scaled(product: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """`product` (rows, out) by `scales` (pictures, 1, 1), in float32 and rounded once; with the bias."""
    result = product.view(scales.shape[0], -1, product.shape[1]).mul_(scales)
    return result if bias is None else result.add_(bias)


def in_tiles(scales: Tensor) -> Tensor:
    """Bytes (rows, blocks) in cuBLAS's order, in one row, with zeros where there is nothing."""
    rows, blocks = scales.shape
    tiles = scales.new_zeros(((rows + 127) // 128) * ((blocks + 3) // 4) * 512)
    tiles[_places(rows, blocks, scales.device)] = scales
    return tiles


def from_tiles(tiles: Tensor, rows: int, blocks: int) -> Tensor:
    """The bytes (rows, blocks) again."""
    return tiles[_places(rows, blocks, tiles.device)]


def _places(rows: int, blocks: int, device: torch.device) -> Tensor:
    """Where in the tiles each scale is. Not by reshaping, for how many rows there are may be open in compiled code."""
    row, block = torch.arange(rows, device=device).unsqueeze(1), torch.arange(blocks, device=device)
    tile = row // 128 * ((blocks + 3) // 4) + block // 4
    return tile * 512 + row % 32 * 16 + row % 128 // 32 * 4 + block % 4
