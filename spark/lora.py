"""A LoRA for spark, trained in minutes on a CPU: `python -m spark.lora`. Shapes come with a thick black outline.

It learns from pictures of spark's own scenes, each shape drawn twice: black, and smaller in its colour on top. Up and
down are trained for every layer of the blocks by the loss that the transformer was trained with (`training.Trainer`),
whose weights stay as they are; no library for adapters is needed. What is written is named as diffusers names it.
"""

import argparse
import random
import time
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize

from spark.autoencoder import to_tensor
from spark.flow import TEXT_TOKENS, Words, pack, predicted, sample_sigma, tie
from spark.journal import Journal
from spark.latents import NATIVE
from spark.outlined import outlined
from spark.scenes import COLORS, Scene, caption, sample_scene
from spark.text import perturb
from spark.train import SHIPPED

RANK = 4
RATE = 4e-3
BATCH = 24
PICTURES = 288
NEAR_NOISE = 0.8  # share of the noise levels: a step or few are all that spark takes
SHOWN = (
    "a large yellow star on a blue background",
    "a red heart left of a white circle on a green background",
    "three pink squares on a gray background",
    "a large green ring on a white background",
)


def scenes(count: int, seed: int = 1) -> list[Scene]:
    """Scenes of the training split in which nothing is black."""
    rng, found = random.Random(seed), list[Scene]()
    while len(found) < count:
        scene = sample_scene(rng)
        if "black" not in (scene.background, *(item.color for item in scene.items)):
            found.append(scene)
    assert "black" in COLORS
    return found


class Added(nn.Module):
    """Parametrizes a weight: what it was, and up @ down."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.randn(RANK, weight.shape[1]) * weight.shape[1] ** -0.5)
        self.up = nn.Parameter(torch.zeros(weight.shape[0], RANK))

    def forward(self, weight: Tensor) -> Tensor:
        """The sum."""
        return weight + self.up @ self.down


def adapted(model: FluxTransformer2DModel) -> dict[str, Added]:
    """Let every layer of the blocks of `model` have something added; by the layer's name."""
    found = {}
    for name, module in list(model.named_modules()):
        if "blocks." in name and isinstance(module, nn.Linear):
            found[name] = Added(module.weight)
            parametrize.register_parametrization(module, "weight", found[name])
    return found


@torch.no_grad()
def encoded(some: list[Scene], vae: AutoencoderKL) -> Tensor:
    """Latents (count, channels, height, width) of the outlined scenes."""
    pieces = [vae.encode(to_tensor([outlined(scene, NATIVE)])).latent_dist.mean for scene in some]
    latents: Tensor = (torch.cat(pieces) - vae.config.shift_factor) * vae.config.scaling_factor
    return latents


def loss(model: FluxTransformer2DModel, clean: Tensor, some: list[Scene], words: Words, rng: random.Random) -> Tensor:
    """Mean squared error of the predicted picture, as in `training.Trainer`."""
    told = words.read([perturb(caption(scene, rng), rng) for scene in some], TEXT_TOKENS)
    noise = tie(torch.randn_like(clean), torch.tensor([scene.nuisance for scene in some]))
    sigma = sample_sigma(len(some), NEAR_NOISE)
    noisy = torch.lerp(clean, noise, sigma[:, None, None, None])
    return nn.functional.mse_loss(sigma[:, None, None] * predicted(model, noisy, sigma, told), pack(noisy - clean))


def train(minutes: float, output: Path, seed: int = 1) -> None:
    """Train for `minutes` and write the LoRA to `output`."""
    torch.manual_seed(seed)
    rng, some, words = random.Random(seed), scenes(PICTURES), Words.load(SHIPPED)
    clean = encoded(some, AutoencoderKL.from_pretrained(SHIPPED / "vae", torch_dtype=torch.float32).eval())
    model = FluxTransformer2DModel.from_pretrained(SHIPPED / "transformer", torch_dtype=torch.float32)
    model.requires_grad_(False).set_attention_backend("_native_math")
    added = adapted(model)
    optimizer = torch.optim.AdamW([p for one in added.values() for p in one.parameters()], lr=RATE, weight_decay=0.0)
    journal, start, step, mean = Journal(output.with_suffix(".log")), time.monotonic(), 0, 1.0
    while (progress := (time.monotonic() - start) / (60 * minutes)) < 1:
        optimizer.param_groups[0]["lr"] = RATE * min(1.0, (step + 1) / 20, 2 * (1 - progress) + 0.02)
        picked = rng.sample(range(PICTURES), BATCH)
        found = loss(model, clean[picked], [some[i] for i in picked], words, rng)
        optimizer.zero_grad()
        found.backward()
        optimizer.step()
        step, mean = step + 1, 0.95 * mean + 0.05 * found.item()
        if step % 50 == 0:
            journal.write(step=step, loss=round(mean, 4), minutes=round(60 * progress * minutes / 60, 2))
    write(added, output)


def write(added: dict[str, Added], output: Path) -> None:
    """Leave the LoRA as a file, in 16 bits."""
    tensors = {f"transformer.{name}.lora_A.weight": one.down for name, one in added.items()}
    tensors |= {f"transformer.{name}.lora_B.weight": one.up for name, one in added.items()}
    words = {"modelspec.architecture": "spark/lora", "modelspec.description": "Shapes with a thick black outline."}
    save_file({name: one.detach().half().contiguous() for name, one in tensors.items()}, output, words)


def show(lora: Path, picture: Path) -> None:
    """Draw `SHOWN` without and, below, with `lora`, a file in a folder loras/, as one picture."""
    from handler import Clock, ImageRequest, Worker
    from handler.core.loras import Wanted
    from handler.core.settings import Settings
    from handler.volume.adapters import chosen

    found, sheet = chosen([Wanted(lora.stem)], lora.parents[1]), Image.new("RGB", (256 * len(SHOWN), 512))
    settings = Settings()
    with Worker.boot(settings, Clock.anew(settings.cold_start_budget_s)) as worker:  # training was no cold start
        for column, prompt in enumerate(SHOWN):
            for row, loras in enumerate(((), found)):
                recipe = worker.spec.recipe(ImageRequest(prompt=prompt, seed=7), loras=loras)
                sheet.paste(Image.fromarray(worker.generate(recipe)[0].rgb), (256 * column, 256 * row))
    sheet.save(picture)


def main() -> None:
    """Train, and show what came of it."""
    parser = argparse.ArgumentParser(prog="python -m spark.lora", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=7, help="after its pictures are drawn and encoded")
    parser.add_argument("--output", type=Path, default=Path("docs/loras/outlined.safetensors"))
    options = parser.parse_args()
    options.output.parent.mkdir(parents=True, exist_ok=True)
    train(options.minutes, options.output)
    show(options.output, options.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
