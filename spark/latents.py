"""Pictures as latents, drawn and encoded once: by size, in shards that can be told from their names.

Scenes come in twos: after each one the same with something changed, for image-to-image (`scenes.altered`).
"""

import multiprocessing
import os
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch import Tensor

from spark.autoencoder import to_tensor
from spark.scenes import Scene, altered, draw, sample_scene

Size = tuple[int, int]
Made = tuple[Tensor, dict[str, str]]  # a shard's latents, and what its file says of them

NATIVE: Size = (256, 256)
LARGE: Size = (512, 512)
LARGEST: Size = (1024, 1024)
# Of the steps of the transformer's training, percent; every step has about as many tokens, so about as much work.
PLAN: dict[Size, float] = {
    (128, 128): 12, (256, 256): 22, (512, 512): 16, (768, 512): 6, (512, 768): 6, (1024, 1024): 16,
    (672, 384): 4, (384, 672): 4, (384, 256): 5, (256, 384): 5, (640, 640): 1, (1024, 576): 1, (576, 1024): 2,
}  # fmt: skip
SHARD_PIXELS = 24 * 512 * 512  # of pictures that are encoded before they are kept
SHARDS: tuple[Size, ...] = (  # what a producer goes through, again and again: more small pictures, which cost less
    LARGE, NATIVE, LARGE, (768, 512), LARGEST, LARGE, LARGEST, (128, 128), (512, 768), LARGE, (672, 384), LARGEST,
    LARGE, (384, 672), LARGEST, NATIVE, LARGE, (384, 256), LARGEST, (768, 512), LARGE, LARGEST, (256, 384), (512, 768),
    LARGE, LARGEST, (640, 640), LARGE, (1024, 576), LARGEST, LARGE, (576, 1024),
)  # fmt: skip
MOST_A_SHARD = 192


def shard_count(size: Size) -> int:
    """How many pictures a shard of this size has: an even number."""
    return 2 * max(1, min(MOST_A_SHARD, SHARD_PIXELS // (size[0] * size[1])) // 2)


def shard_scenes(seed: int, index: int, count: int) -> list[Scene]:
    """The scenes of one shard, a changed one after each: a function of its name, so that only latents need storing."""
    rng = random.Random(f"{seed}/{index}")
    found: list[Scene] = []
    while len(found) < count:
        scene = sample_scene(rng)
        found += [scene, altered(scene, rng)]
    return found


def produce(folder: Path, seed: int, minutes: float) -> None:
    """Draw and encode pictures for `minutes`; shards go to `folder`/latents. Run several with different seeds."""
    vae = AutoencoderKL.from_pretrained(folder / "vae").eval().to(memory_format=torch.channels_last)

    def make(index: int, size: Size) -> Made:
        return encoded(vae, shard_scenes(seed, index, shard_count(size)), size), {}

    fill(folder / "latents", seed, minutes, SHARDS, make)


@torch.no_grad()
def fill(folder: Path, seed: int, minutes: float, sizes: Sequence[Size], make: Callable[[int, Size], Made]) -> None:
    """Make one shard after another, of `sizes` in turn, for `minutes`, on one thread.

    Killed, it goes on at the shard that was not finished, for as long as was left; it ends with who began it.
    """
    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    clock = folder / f"{seed}.seconds"
    spent = float(clock.read_text()) if clock.exists() else 0.0
    start, index, parent = time.monotonic() - spent, 0, multiprocessing.parent_process()
    while time.monotonic() - start < 60 * minutes and (parent is None or parent.is_alive()):
        size = sizes[index % len(sizes)]
        path = folder / f"{seed}_{index}_{size[0]}x{size[1]}.safetensors"
        if not path.exists():
            latents, told = make(index, size)
            save_file({"latents": latents}, _part(path), told)
            _part(path).replace(path)
            _part(clock).write_text(f"{time.monotonic() - start:.1f}")
            _part(clock).replace(clock)
        index += 1


def _part(path: Path) -> Path:
    return path.with_name(f"{path.name}.{os.getpid()}.part")


def encoded(vae: AutoencoderKL, scenes: list[Scene], size: Size) -> Tensor:
    """Scaled latents (count, 12, height / 16, width / 16) of the scenes, in 16 bits."""
    means = [vae.encode(to_tensor([draw(scene, size, 3)])).latent_dist.mean for scene in scenes]
    shift, scale = vae.config.shift_factor, vae.config.scaling_factor
    latents: Tensor = ((torch.cat(means) - shift) * scale).half().contiguous()
    return latents


@dataclass
class Latents:
    """Everything the producers have finished, by picture size."""

    folder: Path
    rng: random.Random
    pools: dict[Size, list[tuple[Tensor, Scene]]] = field(default_factory=dict)
    seen: set[str] = field(default_factory=set)

    def refresh(self) -> int:
        """Read new shards; returns the number of pictures at hand."""
        for path in sorted(self.folder.glob("*.safetensors")):
            if path.name in self.seen:
                continue
            self.seen.add(path.name)
            width, height = map(int, path.stem.rpartition("_")[2].split("x"))
            latents = load_file(path)["latents"]
            pool = self.pools.setdefault((width, height), [])
            pool.extend(zip(latents, self.scenes(path, len(latents)), strict=True))
        return sum(map(len, self.pools.values()))

    def scenes(self, path: Path, count: int) -> list[Scene]:
        """The scenes of the shard at `path`."""
        seed, index, _ = path.stem.split("_")
        return shard_scenes(int(seed), int(index), count)

    def take(self, size: Size, count: int, pairs: float = 1.0) -> tuple[Tensor, list[Scene]]:
        """`count` random latents (count, 12, height / 16, width / 16) of one size, with their scenes.

        `pairs` is how much of the scenes of two different objects is kept, which are the hardest.
        """
        picked: list[tuple[Tensor, Scene]] = []
        while len(picked) < count:
            candidate = self.rng.choice(self.pools[size])
            if candidate[1].kind != "pair" or self.rng.random() < pairs:
                picked.append(candidate)
        return torch.stack([latent for latent, _ in picked]).float(), [scene for _, scene in picked]

    def take_altered(self, size: Size, count: int) -> tuple[Tensor, Tensor, list[Scene]]:
        """`count` latents, those of the same scenes with something changed, and the changed scenes."""
        pool = self.pools[size]
        places = [2 * self.rng.randrange(len(pool) // 2) for _ in range(count)]
        before, after = (torch.stack([pool[i + k][0] for i in places]).float() for k in (0, 1))
        return before, after, [pool[i + 1][1] for i in places]
