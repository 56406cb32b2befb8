"""What the transformer draws, as latents, and the scene that each comes nearest to: what the decoder should make of it.

A step's answer is never exact: where an edge should be it is unsure, and decoded it is soft. The picture that was
wanted teaches a decoder little of that, for it has its edges elsewhere, on either side. The nearest scene has them
where they were drawn, and sharp (`measures.nearest`).
"""

import json
import random
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor

from spark import autoencoder, flow, validation
from spark.latents import LARGE, LARGEST, NATIVE, Latents, Made, Size, fill
from spark.measures import nearest
from spark.scenes import Item, Scene, caption, sample_scene

SHARDS: dict[Size, int] = {  # what a producer goes through, again and again, and how many pictures a shard has
    (128, 128): 32, NATIVE: 24, (384, 256): 5, (256, 384): 5, LARGE: 10, (768, 512): 4, (512, 768): 4, (672, 384): 4,
    (384, 672): 4, (640, 640): 1, LARGEST: 3, (1024, 576): 1, (576, 1024): 1,
}  # fmt: skip
STEPS = (1, 2, 4, 4, 4, 4, 8)


class Artist:
    """The trained transformer, drawing latents for scenes whose pictures are known."""

    def __init__(self, folder: Path) -> None:
        self.words = flow.Words.load(folder)
        self.velocity = partial(flow.predicted, validation.averaged(validation.trained(folder)).eval())
        self.vae = autoencoder.decoding(folder).eval()
        self.scale, self.offset = self.vae.config.scaling_factor, self.vae.config.shift_factor

    @torch.no_grad()
    def draw(self, size: Size, count: int, rng: random.Random) -> tuple[Tensor, list[Scene]]:
        """`count` scaled latents (count, 12, height / 16, width / 16) and the scenes they should show."""
        scenes = [sample_scene(rng) for _ in range(count)]
        words = self.words.read([caption(scene, rng) for scene in scenes], flow.TEXT_TOKENS)
        height, width = size[1] // autoencoder.DOWNSCALE, size[0] // autoencoder.DOWNSCALE
        noise = torch.randn(count, autoencoder.LATENT_CHANNELS, height, width)
        noise = flow.tie(noise, torch.tensor([scene.nuisance for scene in scenes]))
        sigmas = [*flow.sampler_sigmas(rng.choice(STEPS), flow.SHIFT), 0.0]
        return flow.follow(self.velocity, noise, sigmas, words), scenes

    @torch.no_grad()
    def decoded(self, latent: Tensor) -> Image.Image:
        """One latent (12, height / 16, width / 16) as a picture."""
        return autoencoder.to_image(self.vae.decode(latent[None] / self.scale + self.offset).sample[0])


def produce(folder: Path, seed: int, minutes: float) -> None:
    """Draw for `minutes`; shards go to `folder`/drawings. Run several with different seeds."""
    artist = Artist(folder)

    def make(index: int, size: Size) -> Made:
        torch.manual_seed(1_000_000 * seed + index)
        latents, scenes = artist.draw(size, SHARDS[size], random.Random(f"{seed}/{index}"))
        near = [nearest(artist.decoded(latent), scene) for latent, scene in zip(latents, scenes, strict=True)]
        told = json.dumps([asdict(scene) for scene in near if scene])
        return latents[[scene is not None for scene in near]].half(), {"scenes": told}

    fill(folder / "drawings", seed, minutes, tuple(SHARDS), make)


class Drawings(Latents):
    """Everything that was drawn and could be told what it is, by picture size."""

    def scenes(self, path: Path, count: int) -> list[Scene]:
        with safe_open(path, "pt") as file:
            return [_scene(told) for told in json.loads(file.metadata()["scenes"])]


def _scene(told: dict[str, object]) -> Scene:
    """A scene from its JSON."""
    items = tuple(Item(**{**item, "rgb": tuple(item["rgb"])}) for item in told["items"])  # type: ignore[attr-defined]
    lists = {name: tuple(told[name]) for name in ("rgb", "nuisance", "sizes")}  # type: ignore[arg-type]
    return Scene(**{**told, **lists, "items": items})  # type: ignore[arg-type]
