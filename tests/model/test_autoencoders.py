"""Autoencoders as a GPU has them: wide heads attend by products, the decoder runs compiled; both tried on a CPU."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode

import tiny
from handler import MODELS
from handler.model import families
from handler.model.compiling import artifacts
from handler.model.compiling import package as blocks
from handler.model.families import autoencoders, sdxl
from handler.model.hardware import Hardware

SPARK, GPU = MODELS["spark"], Hardware("cuda", "NVIDIA H200", "bf16", "a test")
LEVELS = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
KINDS: dict[str, Callable[[], Any]] = {  # too wide in the middle, as the real ones are
    "kl": lambda: diffusers.AutoencoderKL(**LEVELS, block_out_channels=(32, 288)),
    "flux2": lambda: diffusers.AutoencoderKLFlux2(**LEVELS, block_out_channels=(32, 288)),
    "qwen": lambda: diffusers.AutoencoderKLQwenImage(
        base_dim=72, z_dim=4, dim_mult=[1, 4], num_res_blocks=1, temperal_downsample=[False]
    ),
}


class WideHeads(TorchDispatchMode):
    """Counts what torch's own attention is asked of heads that no fused kernel takes."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen += "scaled_dot_product" in str(function) and args[0].shape[-1] > autoencoders.WIDEST
        return function(*args, **(kwargs or {}))


@torch.no_grad()
def through(vae: Any) -> tuple[Any, Any, int]:
    """What `vae` encodes and decodes, and how many wide heads torch's own attention saw."""
    frames = (1,) * (type(vae).__name__ == "AutoencoderKLQwenImage")
    picture = torch.randn(1, 3, *frames, 32, 48, generator=torch.Generator().manual_seed(0))
    with WideHeads() as heads:
        latents = vae.encode(picture).latent_dist.mode()
        return latents, vae.decode(latents).sample, heads.seen


@pytest.mark.parametrize("kind", KINDS)
def test_no_wide_head_reaches_torchs_attention_on_a_gpu(kind: str) -> None:
    vae = KINDS[kind]().eval()
    tiny.enliven(vae)
    autoencoders.prepare(vae, "cpu")
    latents, picture, seen = through(vae)
    assert seen == 2  # as diffusers has it: the encoder's, the decoder's
    autoencoders.prepare(vae, "cuda")
    *found, seen = through(vae)
    assert seen == 0
    for own, plain in zip(found, (latents, picture), strict=True):
        assert torch.allclose(own, plain, atol=1e-3 * float(plain.std()), rtol=1e-4)


@pytest.mark.parametrize(("dtype", "apart"), [(torch.float32, 1e-5), (torch.bfloat16, 0.005)])
def test_attention_in_parts_is_torchs(dtype: Any, apart: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autoencoders, "SCORES", 4 * 200 * 64)  # 64 queries at once, of 200
    given = torch.randn(3, 2, 200, 384, generator=torch.Generator().manual_seed(0)).mul(2).to(dtype).split(1)
    exact = scaled_dot_product_attention(*(tensor.float() for tensor in given))
    found = autoencoders.attend_wide(*given)
    assert found.dtype is dtype
    assert (found - exact).norm() < apart * exact.norm()


def test_narrow_heads_stay_torchs() -> None:
    torch.manual_seed(0)  # of random weights some are further off
    vae = tiny.flux_vae().eval()
    plain = through(vae)[1]
    autoencoders.prepare(vae.to(memory_format=torch.channels_last), "cuda")
    assert torch.allclose(through(vae)[1], plain, atol=1e-5)


@pytest.mark.parametrize(
    ("model", "compiles"), [("flux-dev", True), ("flux2-dev", True), ("sdxl", False), ("qwen-image", False)]
)
def test_which_decoders_are_compiled(model: str, compiles: bool) -> None:
    """Not SDXL's, whose weights diffusers moves, nor one that keeps frames, nor a tiny autoencoder's; none on a CPU."""
    pipeline = tiny.build(MODELS[model])
    assert families.compilable(pipeline, "cuda") is (pipeline.vae.decoder if compiles else None)
    assert families.compilable(pipeline, "cpu") is None
    pipeline.vae = tiny.autoencoder("AutoencoderTiny", 4)
    assert families.compilable(pipeline, "cuda") is None


class Denoiser(nn.Module):
    _repeated_blocks = ("Block",)

    def __init__(self) -> None:
        super().__init__()
        self.block = Block(4, 4)


class Block(nn.Linear):
    pass


def test_a_compiled_decoder_decodes_every_size_number_and_tile(
    compiler: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vae = diffusers.AutoencoderKL(**LEVELS, block_out_channels=(4, 8), norm_num_groups=2, layers_per_block=0)
    tiny.enliven(vae.eval().requires_grad_(False))
    monkeypatch.setattr(autoencoders, "WIDEST", 4)  # so that the compiled code holds the operator
    autoencoders.prepare(vae, "cuda")
    denoiser, package, fits = Denoiser().requires_grad_(False), tmp_path / "blocks.pt2", []

    @torch.inference_mode()
    def decoded(number: int, height: int, width: int) -> Any:
        latents = torch.randn(number, 4, height, width, generator=torch.Generator().manual_seed(0))
        return vae.decode(latents.to(memory_format=torch.channels_last)).sample

    def draw() -> None:
        for number, height, width in ((2, 8, 16), (3, 4, 8)):
            denoiser.block(torch.zeros(number, height, 4))
            decoded(number, height, width)

    sizes = [(1, 8, 8), (1, 9, 14), (3, 6, 10), (1, 1, 5)]
    eager = [decoded(*size) for size in sizes]
    blocks.compile_blocks(denoiser, draw, package, vae.decoder)
    blocks.bind_blocks(denoiser, package, vae.decoder)
    fitting = blocks._fits
    monkeypatch.setattr(blocks, "_fits", lambda *given: fits.append(fitting(*given)) or fits[-1])
    for size, plain in zip(sizes, eager, strict=True):
        assert torch.allclose(decoded(*size), plain, atol=1e-4)
    assert fits == [True] * len(sizes)
    vae.use_tiling, vae.tile_latent_min_size, vae.tile_sample_min_size = True, 8, 16
    tiled = decoded(1, 9, 14)
    assert len(fits) == len(sizes) + 6
    assert all(fits)
    blocks.unbind_blocks(denoiser, vae.decoder)
    assert torch.allclose(tiled, decoded(1, 9, 14), atol=1e-4)
    assert len(fits) == len(sizes) + 6


def test_a_package_without_the_decoder_is_stale_for_one_who_wants_it(tmp_path: Path) -> None:
    decoder, package = tiny.flux_vae().decoder, tmp_path / "any"
    package.write_bytes(b"code")
    artifacts.publish(package, SPARK, GPU, tmp_path)
    wanted = artifacts.decoder_of(decoder)
    found = artifacts.look(SPARK, GPU, tmp_path, wanted)
    assert (found.outcome, found.reason) == (
        "STALE",
        f"compiled for another worker: decoder is {wanted}, was eager",
    )
    artifacts.publish(package, SPARK, GPU, tmp_path, decoder)
    for asked in (wanted, "eager", ""):  # the last one is doctor's, which loads no model
        assert artifacts.look(SPARK, GPU, tmp_path, asked).outcome == "HIT"


def test_a_decoder_that_computes_otherwise_is_another() -> None:
    """Weights alike in all: one normalises four channels at a time, another has ReLUs. So with KINDLING_VAE."""
    differing: list[Any] = [{}, {"norm_num_groups": 4}, {"act_fn": "relu"}]
    same = {**LEVELS, "block_out_channels": (8, 8), "norm_num_groups": 2}
    vaes = [diffusers.AutoencoderKL(**{**same, **each}) for each in differing]
    assert len({str(blocks._weights(vae.decoder).keys()) for vae in vaes}) == 1
    assert len({artifacts.decoder_of(vae.decoder) for vae in vaes}) == 3


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_sdxls_convolutions_are_channels_last_on_a_gpu(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = tiny.build(MODELS["sdxl"]).components
    monkeypatch.setattr(families, "load_components", lambda *_: parts)
    built = families.build(sdxl, None, Hardware(device, "a test", "fp32", "a test"))  # type: ignore[arg-type]
    weight = built.unet.mid_block.resnets[0].conv1.weight
    assert weight.is_contiguous(memory_format=torch.channels_last) is (device == "cuda")
    assert built.vae.decoder.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
