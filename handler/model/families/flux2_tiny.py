"""FLUX.2's tiny autoencoder, as fal/FLUX.2-Tiny-AutoEncoder has its weights: 2.9 M parameters instead of 84 M.

The repository carries Python code for it, which is never run: this is that architecture (module names are the keys of
its weights) behind what diffusers' FLUX.2 pipelines expect of an autoencoder.
"""

from typing import Any

import torch
from diffusers import AutoencoderTiny
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTinyOutput
from diffusers.models.autoencoders.vae import AutoencoderMixin, DecoderOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

PATCH = 2  # the pipelines unfold each latent of its `latent_channels` into so many squared


class Flux2TinyAutoEncoder(ModelMixin, AutoencoderMixin, ConfigMixin):  # type: ignore[misc]
    """Pictures (batch, 3, height, width) from -1 to 1; latents (batch, latent_channels / 4, height / 8, width / 8)."""

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        latent_channels: int = 128,
        encoder_block_out_channels: tuple[int, ...] = (64, 64, 64, 64),
        decoder_block_out_channels: tuple[int, ...] = (64, 64, 64, 64),
        act_fn: str = "silu",
        upsampling_scaling_factor: int = 2,
        num_encoder_blocks: tuple[int, ...] = (1, 3, 3, 3),
        num_decoder_blocks: tuple[int, ...] = (3, 3, 3, 1),
        latent_magnitude: float = 3.0,
        latent_shift: float = 0.5,
        force_upcast: bool = False,
        scaling_factor: float = 0.13025,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        inner = latent_channels // PATCH**2
        self.tiny_vae: Any = AutoencoderTiny(
            in_channels=in_channels,
            out_channels=out_channels,
            encoder_block_out_channels=encoder_block_out_channels,
            decoder_block_out_channels=decoder_block_out_channels,
            act_fn=act_fn,
            latent_channels=inner,
            upsampling_scaling_factor=upsampling_scaling_factor,
            num_encoder_blocks=num_encoder_blocks,
            num_decoder_blocks=num_decoder_blocks,
            latent_magnitude=latent_magnitude,
            latent_shift=latent_shift,
            force_upcast=force_upcast,
            scaling_factor=scaling_factor,
        )
        self.extra_encoder = nn.Conv2d(inner, latent_channels, 4, stride=2, padding=1)
        self.extra_decoder = nn.ConvTranspose2d(latent_channels, inner, 4, stride=2, padding=1)
        self.residual_encoder, self.residual_decoder = _residual(latent_channels), _residual(inner)
        self.bn = _NoNorm(latent_channels)
        seen = {"z_dim": inner, "block_out_channels": decoder_block_out_channels, "batch_norm_eps": 0.0}
        self.register_to_config(**seen)  # type: ignore[no-untyped-call]

    def encode(self, x: torch.Tensor, return_dict: bool = True) -> Any:
        """Pictures to latents."""
        coded = self.extra_encoder(self.tiny_vae.encode(x).latents)
        latents = pixel_shuffle(coded + self.residual_encoder(coded), PATCH)
        return AutoencoderTinyOutput(latents=latents) if return_dict else (latents,)

    def decode(self, z: torch.Tensor, return_dict: bool = True) -> Any:
        """Latents to pictures."""
        coded = self.extra_decoder(pixel_unshuffle(z, PATCH))
        sample = self.tiny_vae.decode(coded + self.residual_decoder(coded)).sample
        return DecoderOutput(sample=sample) if return_dict else (sample,)


def _residual(channels: int) -> nn.Sequential:
    ends = [nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2)]
    return nn.Sequential(ends[0], nn.GroupNorm(8, channels), nn.SiLU(), ends[1])


class _NoNorm(nn.Module):
    """What the pipelines undo: FLUX.2's own autoencoder normalises its latents, this one's are normal as they are."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(channels), persistent=False)
        self.register_buffer("running_var", torch.ones(channels), persistent=False)
