"""The last stage: the decoder learns from what the transformer draws, not only from what the encoder encodes.

Noise and picture are tied (see `flow`), so the picture that a drawn latent should become is known to the pixel. The
encoder stays as it is, and half of the batches come from it, so that image-to-image keeps working.
"""

import itertools
import random
import time
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from torch import Tensor

from spark import autoencoder, flow
from spark.journal import Journal
from spark.scenes import Scene, caption, draw, sample_scene

PEAK_RATE = 4e-4
DRAWN = 48  # pictures of NATIVE size drawn at a time, fewer of larger ones
SIZES = (flow.NATIVE, flow.NATIVE, flow.LARGE, flow.LANDSCAPE, flow.PORTRAIT)
STEPS = (1, 4, 4)
EMA_DECAY = 0.995


def polish(folder: Path, minutes: float) -> None:
    """Train the decoder in `folder`/vae for `minutes`; the transformer is that of `folder`/flow.pt."""
    torch.manual_seed(2)
    rng, journal = random.Random(2), Journal(folder / "vae.log")
    vae = AutoencoderKL.from_pretrained(folder / "vae").to(memory_format=torch.channels_last)
    vae.encoder.requires_grad_(False)
    optimizer = torch.optim.AdamW(vae.decoder.parameters(), lr=PEAK_RATE, betas=(0.9, 0.99), weight_decay=0.0)
    average = {name: value.clone() for name, value in vae.state_dict().items()}
    artist, start, step, progress = Artist(folder), time.monotonic(), 0, 0.0
    while progress < 1:
        size = rng.choice(SIZES)
        latents, scenes = artist.draw(size, max(4, DRAWN * 65536 // (size[0] * size[1])), rng)
        for latent, scene in zip(latents, scenes, strict=True):
            pixels = autoencoder.to_tensor([draw(scene, size, 3)])
            optimizer.param_groups[0]["lr"] = PEAK_RATE * min(1, (step + 1) / 100) * autoencoder.cosine(progress)
            loss = _loss(vae, latent[None] if rng.random() < 0.5 else None, pixels)
            step += 1
            autoencoder.advance(vae, optimizer, loss, average, min(EMA_DECAY, step / (step + 20)))
            if step % 100 == 0:
                journal.write(polish=step, loss=round(loss.item(), 4), progress=round(progress, 3))
            progress = (time.monotonic() - start) / (60 * minutes)
    vae.load_state_dict(average)
    autoencoder.save(vae, folder)
    journal.write(**autoencoder.measure(folder))


def _loss(vae: AutoencoderKL, drawn: Tensor | None, pixels: Tensor) -> Tensor:
    """`autoencoder.loss_of` on one picture, from a drawn latent or from its own."""
    if drawn is None:
        return autoencoder.loss_of(vae, pixels)[0]
    return autoencoder.distance(vae.decode(drawn).sample, pixels)


class Artist:
    """The trained transformer, drawing latents for scenes whose pictures are known."""

    def __init__(self, folder: Path) -> None:
        self.words = flow.Words.load(folder)
        self.model: FluxTransformer2DModel = flow.build()
        self.model.load_state_dict(torch.load(folder / "flow.pt", weights_only=True)["average"])
        self.model.eval()
        vae = AutoencoderKL.load_config(folder / "vae")
        self.scale, self.shift = vae["scaling_factor"], vae["shift_factor"]

    @torch.no_grad()
    def draw(self, size: tuple[int, int], count: int, rng: random.Random) -> tuple[Tensor, list[Scene]]:
        """`count` unscaled latents (count, 12, height / 16, width / 16) and the scenes they should show."""
        scenes = [sample_scene(rng) for _ in range(count)]
        pooled, context = self.words.read([caption(scene, rng) for scene in scenes], flow.TEXT_TOKENS)
        height, width = size[1] // autoencoder.DOWNSCALE, size[0] // autoencoder.DOWNSCALE
        noise = torch.randn(count, autoencoder.LATENT_CHANNELS, height, width)
        latents = flow.tie(noise, torch.tensor([scene.nuisance for scene in scenes]))
        sigmas = [*flow.sampler_sigmas(rng.choice(STEPS)), 0.0]
        for here, there in itertools.pairwise(sigmas):
            velocity = self.model(
                hidden_states=flow.pack(latents),
                encoder_hidden_states=context,
                pooled_projections=pooled,
                timestep=torch.full((count,), here),
                img_ids=flow.image_ids(height // 2, width // 2),
                txt_ids=torch.zeros(flow.TEXT_TOKENS, 3),
                return_dict=False,
            )[0]
            latents = latents + (there - here) * flow.unpack(velocity, height // 2, width // 2)
        return latents / self.scale + self.shift, scenes
