"""On a GPU: wide heads against torch's own attention, and what a decode of FLUX.1's size takes, eager and compiled."""

import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from test_autoencoders import Denoiser
from torch.nn.functional import scaled_dot_product_attention

from handler.model.compiling import package
from handler.model.families import autoencoders

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
LATENTS, ROUNDS = (1, 16, 128, 128), 7  # of 1024x1024


def milliseconds(run: Callable[[], object]) -> float:
    """The median of `ROUNDS`, by events, after one that is not counted."""
    run()
    marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(ROUNDS)]
    for start, stop in marks:
        start.record()
        run()
        stop.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(stop) for start, stop in marks)


def test_wide_heads_attend_as_torchs_own_do() -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    given = torch.randn(3, 1, 1, 16384, 512, device="cuda", dtype=torch.bfloat16, generator=generator).unbind()
    plain = scaled_dot_product_attention(*given)
    assert (autoencoders.attend_wide(*given) - plain).norm() < 0.01 * plain.norm()
    ways: list[Callable[..., Any]] = [scaled_dot_product_attention, autoencoders.attend_wide]
    took = [milliseconds(partial(way, *given)) for way in ways]
    print("\ntorch's {:.2f} ms, by products {:.2f} ms".format(*took))


@torch.inference_mode()
def test_a_decode_of_fluxs_size(tmp_path: Path) -> None:
    with torch.device("cuda"):
        vae: Any = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=16,
            use_quant_conv=False, use_post_quant_conv=False,
        ).to(torch.bfloat16).eval().requires_grad_(False)  # fmt: skip
        denoiser, latents = Denoiser().requires_grad_(False), torch.randn(LATENTS, dtype=torch.bfloat16)
        pictures, took = {}, {}

        def decode(name: str) -> None:
            pictures[name] = vae.decode(latents).sample.float()
            took[name] = milliseconds(lambda: vae.decode(latents))

        def draw() -> None:
            for number, height, width in ((2, 64, 128), (3, 32, 64)):
                denoiser.block(torch.zeros(number, height, 4))
                vae.decode(torch.randn(number, 16, height, width, dtype=torch.bfloat16))

        decode("diffusers")
        autoencoders.prepare(vae, "cuda")
        decode("channels last, wide heads by products")
        seconds = package.compile_blocks(denoiser, draw, tmp_path / "blocks.pt2", vae.decoder)
        package.bind_blocks(denoiser, tmp_path / "blocks.pt2", vae.decoder)
        decode("and compiled")
    print(f"\ncompiling {seconds:.0f} s; ms:", {name: round(ms, 2) for name, ms in took.items()})
    plain = pictures["diffusers"]
    for picture in pictures.values():
        assert (picture - plain).norm() < 0.02 * plain.norm()
