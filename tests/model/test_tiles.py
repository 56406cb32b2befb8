"""Ranks that share a VAE's tiles, here a group of one."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from diffusers import AutoencoderKL, AutoencoderTiny

from handler.model import tiles
from handler.model.compiling.package import _calls


@pytest.fixture
def group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def autoencoder() -> Any:
    down, up = ("DownEncoderBlock2D",) * 2, ("UpDecoderBlock2D",) * 2
    vae = AutoencoderKL(block_out_channels=(32, 32), down_block_types=down, up_block_types=up, sample_size=32)
    vae.enable_tiling()
    return vae.eval()


@torch.inference_mode()
def test_a_picture_is_what_diffusers_makes_of_its_tiles(group: None) -> None:
    vae, latents = autoencoder(), torch.randn(2, 4, 24, 20)
    alone = vae.decode(latents).sample
    tiles.share(vae)
    assert torch.equal(vae.decode(latents).sample, alone)


@torch.inference_mode()
def test_compiling_sees_what_a_decoder_of_tiles_takes_by_its_own_names(group: None) -> None:
    vae = autoencoder()
    draw = lambda: vae.decode(torch.randn(2, 4, 24, 24))  # noqa: E731
    alone = {*_calls({"decoder": vae.decoder}, draw)["decoder"][0]}
    tiles.share(vae)
    assert [{*call} for call in _calls({"decoder": vae.decoder}, draw)["decoder"]] == 8 * [alone]


def test_an_autoencoder_without_tiles_that_can_be_joined_decodes_by_itself(group: None) -> None:
    vae: Any = AutoencoderTiny()
    tiles.share(vae)
    assert vae.decode(torch.randn(1, 4, 8, 8)).sample.shape == (1, 3, 64, 64)
