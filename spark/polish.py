"""The last stage: the decoder learns from what the transformer draws, not only from what the encoder encodes.

Noise and picture are tied (see `flow`), so the picture that a drawn latent should become is known to the pixel. The
encoder stays as it is, and half of the batches come from it, so that image-to-image keeps working.
"""

import random
from functools import partial
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from spark import autoencoder, flow, validation
from spark.journal import Journal
from spark.latents import LARGE, NATIVE, Size
from spark.progress import Average, Progress, rates
from spark.scenes import Scene, caption, draw, sample_scene

PEAK_RATE = 4e-4
DRAWN = 48  # pictures of NATIVE size drawn at a time, fewer of larger ones
SIZES: tuple[Size, ...] = ((128, 128), NATIVE, NATIVE, LARGE, LARGE, (768, 512), (512, 768), (1024, 1024))
STEPS = (1, 4, 4)
EMA_DECAY = 0.995


def polish(folder: Path, minutes: float) -> None:
    """Train the decoder in `folder`/vae for `minutes`; the transformer is that of `folder`/flow.pt."""
    torch.manual_seed(2)
    rng, journal = random.Random(2), Journal(folder / "vae.log")
    vae = autoencoder.decoding(folder)
    optimizer = torch.optim.AdamW(vae.decoder.parameters(), lr=PEAK_RATE, betas=(0.9, 0.99), weight_decay=0.0)
    average = Average(vae)
    progress = Progress(folder / "polish.pt", minutes, rng, {"vae": vae, "average": average, "optimizer": optimizer})
    progress.resume()
    artist = Artist(folder)
    while progress.share < 1:
        size = rng.choice(SIZES)
        latents, scenes = artist.draw(size, max(2, min(DRAWN, DRAWN * 65536 // (size[0] * size[1]))), rng)
        for latent, scene in zip(latents, scenes, strict=True):
            pixels = autoencoder.to_tensor([draw(scene, size, 3)])
            warm = min(1, (progress.step + 1) / 100)
            rates([optimizer], PEAK_RATE * warm * autoencoder.cosine(progress.share))
            loss = _loss(vae, latent[None] if rng.random() < 0.5 else None, pixels)
            autoencoder.advance(vae, optimizer, loss)
            average.follow(vae, min(EMA_DECAY, (1 + progress.step) / (21 + progress.step)))
            progress.tick()
            if progress.step % 100 == 0:
                journal.write(polish=progress.step, loss=round(loss.item(), 4), progress=round(progress.share, 3))
    vae.load_state_dict(average.weights)
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
        self.velocity = partial(flow.predicted, validation.averaged(validation.trained(folder)).eval())
        vae = AutoencoderKL.load_config(folder / "vae")
        self.scale, self.offset = vae["scaling_factor"], vae["shift_factor"]

    @torch.no_grad()
    def draw(self, size: Size, count: int, rng: random.Random) -> tuple[Tensor, list[Scene]]:
        """`count` unscaled latents (count, 12, height / 16, width / 16) and the scenes they should show."""
        scenes = [sample_scene(rng) for _ in range(count)]
        words = self.words.read([caption(scene, rng) for scene in scenes], flow.TEXT_TOKENS)
        height, width = size[1] // autoencoder.DOWNSCALE, size[0] // autoencoder.DOWNSCALE
        noise = torch.randn(count, autoencoder.LATENT_CHANNELS, height, width)
        noise = flow.tie(noise, torch.tensor([scene.nuisance for scene in scenes]))
        sigmas = [*flow.sampler_sigmas(rng.choice(STEPS), flow.SHIFT), 0.0]
        return flow.follow(self.velocity, noise, sigmas, words) / self.scale + self.offset, scenes
