"""The last stage: the decoder learns from what the transformer draws, not only from what the encoder encodes.

Most of its lessons are drawn latents, with the scenes that they come nearest to (`drawings`): so it draws sharp what
came to it unsure. The encoder stays as it is, and the rest comes from it, half of that in colours that spark does not
know, or outlined, so that image-to-image and LoRAs keep working.
"""

import random
from collections.abc import Iterator
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from spark import autoencoder
from spark.drawings import Drawings
from spark.journal import Journal
from spark.latents import LARGE, LARGEST, NATIVE, Latents, Size
from spark.outlined import outlined
from spark.progress import Average, Progress, rates
from spark.scenes import draw, sample_scene

PEAK_RATE = 1e-3
EMA_DECAY = 0.998
LESSONS = {"drawn": 60, "own": 20, "strange": 20}  # percent
DRAWN_NOISE = 0.02  # added to drawn latents, so that they are not learnt by heart
OUTLINED = 0.33  # of the strange pictures
A_STEP = 2 * 256 * 256  # pixels, or one picture of more
PLAN: dict[Size, float] = {  # of the steps, percent
    (128, 128): 20, NATIVE: 22, (384, 256): 4, (256, 384): 4, LARGE: 16, (768, 512): 6, (512, 768): 6, (672, 384): 5,
    (384, 672): 5, (640, 640): 1, LARGEST: 9, (1024, 576): 1, (576, 1024): 1,
}  # fmt: skip
NEAR = 5.0  # how many times more a pixel near an edge counts than another
STEEPNESS = 1.75  # how much gradients count, which are at edges alone
REACH, STEEP = 5, 0.05  # pixels on either side of an edge, and how much a colour, of [-1, 1], changes there

Lesson = tuple[Tensor, list[Image.Image]]  # latents as they come to the decoder, and what it should make of them


class Polisher:
    """Owns the decoder, its average and its optimisers; `progress` keeps everything needed to go on after a stop."""

    def __init__(self, folder: Path, minutes: float) -> None:
        torch.manual_seed(2)
        self.rng = random.Random(2)
        self.vae = autoencoder.decoding(folder)
        self.drawings, self.latents = Drawings(folder / "drawings", self.rng), Latents(folder / "latents", self.rng)
        self.drawings.refresh()
        self.latents.refresh()
        self.average, self.optimizers = Average(self.vae), list(optimizers(self.vae.decoder))
        kept = {"vae": self.vae, "average": self.average, "optimizers": self.optimizers}
        self.progress = Progress(folder / "polish.pt", minutes, self.rng, kept)
        self.lessons = {"drawn": self._drawn, "own": self._own, "strange": self._strange}

    def loss(self) -> Tensor:
        """Of a few pictures of one size."""
        [lesson] = self.rng.choices(list(LESSONS), list(LESSONS.values()))
        drawn = {size for size, pool in self.drawings.pools.items() if pool}
        if not drawn:  # a transformer that has learnt next to nothing comes near to no scene
            lesson = "own" if lesson == "drawn" else lesson
        sizes = [size for size in PLAN if size in (drawn if lesson == "drawn" else self.latents.pools)]
        [size] = self.rng.choices(sizes, [PLAN[size] for size in sizes])
        latents, images = self.lessons[lesson](size, max(1, A_STEP // (size[0] * size[1])))
        return distance(self._decoded(latents), autoencoder.to_tensor(images))

    def _drawn(self, size: Size, count: int) -> Lesson:
        """The transformer's."""
        latents, scenes = self.drawings.take(size, count)
        return self._noised(self._unscaled(latents), DRAWN_NOISE), [draw(scene, size, 3) for scene in scenes]

    def _own(self, size: Size, count: int) -> Lesson:
        """The encoder's."""
        latents, scenes = self.latents.take(size, count)
        latents = self._unscaled(latents)
        return self._noised(latents, autoencoder.LATENT_NOISE), [draw(scene, size, 3) for scene in scenes]

    def _strange(self, size: Size, count: int) -> Lesson:
        """The encoder's, of pictures that the transformer does not draw."""
        scenes = [autoencoder.recolored(sample_scene(self.rng), self.rng) for _ in range(count)]
        images = [outlined(s, size) if self.rng.random() < OUTLINED else draw(s, size, 3) for s in scenes]
        with torch.no_grad(), self._rounded():
            latents = self.vae.encode(autoencoder.to_tensor(images)).latent_dist.mean.float()
        return self._noised(latents, autoencoder.LATENT_NOISE), images

    def _unscaled(self, latents: Tensor) -> Tensor:
        return latents / self.vae.config.scaling_factor + self.vae.config.shift_factor

    def _noised(self, latents: Tensor, noise: float) -> Tensor:
        return latents + noise * torch.randn_like(latents)

    def _rounded(self) -> torch.autocast:
        """In bf16 where that is fast."""
        return torch.autocast("cpu", torch.bfloat16, enabled=torch.cpu._is_avx512_bf16_supported())

    def _decoded(self, latents: Tensor) -> Tensor:
        with self._rounded():
            decoded: Tensor = self.vae.decode(latents.contiguous(memory_format=torch.channels_last)).sample
        return decoded.float()

    def update(self, loss: Tensor) -> None:
        """One optimiser step and one step of the moving average."""
        warm = min(1.0, (self.progress.step + 1) / 100)
        rates(self.optimizers, PEAK_RATE * warm * autoencoder.cosine(self.progress.share))
        self.vae.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.vae.decoder.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
        self.average.follow(self.vae, min(EMA_DECAY, (1 + self.progress.step) / (21 + self.progress.step)))
        self.progress.tick()


class Kernels(torch.optim.Muon):
    """Muon for convolutions' weights, each as a matrix with a row for each of its outputs."""

    def __init__(self, kernels: list[Tensor]) -> None:
        self.kernels = [(kernel, nn.Parameter(_matrix(kernel.detach()))) for kernel in kernels]
        shared = [matrix for _, matrix in self.kernels]
        super().__init__(shared, lr=PEAK_RATE, weight_decay=0.0, ns_steps=4, adjust_lr_fn="match_rms_adamw")

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step down the gradients that the weights have."""
        for kernel, matrix in self.kernels:
            matrix.grad = _matrix(kernel.grad) if kernel.grad is not None else None
        super().step(closure)


def _matrix(kernel: Tensor) -> Tensor:
    """(outputs, inputs, height, width) -> (outputs, height * width * inputs); no copy of weights that lie so."""
    return kernel.permute(0, 2, 3, 1).flatten(1)


def optimizers(decoder: nn.Module) -> Iterator[torch.optim.Optimizer]:
    """Muon for the convolutions between the first and the last, AdamW for the rest."""
    inner, rest = list[Tensor](), list[Tensor]()
    for name, parameter in decoder.named_parameters():
        (inner if parameter.ndim == 4 and not name.startswith("conv_") else rest).append(parameter)
    yield torch.optim.AdamW(rest, lr=PEAK_RATE, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    yield Kernels(inner)


def distance(decoded: Tensor, pixels: Tensor) -> Tensor:
    """L1, L2 and the L1 of gradients, as `autoencoder.distance` has it, but edges count more."""
    error = decoded - pixels
    across, down = error.diff(dim=-1).abs().mean(), error.diff(dim=-2).abs().mean()
    apart = error.abs() + 2 * error.square()
    return (apart * (1 + NEAR * near_edges(pixels))).mean() + STEEPNESS * (across + down)


def near_edges(pixels: Tensor) -> Tensor:
    """1 in the `REACH` pixels on either side of an edge, else 0: (count, 1, height, width)."""
    across, down = (pixels.diff(dim=dim).abs().amax(1, keepdim=True) for dim in (-1, -2))
    pad = nn.functional.pad
    sides = pad(across, (0, 1)), pad(across, (1, 0)), pad(down, (0, 0, 0, 1)), pad(down, (0, 0, 1, 0))
    steep = torch.stack(sides).amax(0) > STEEP
    return nn.functional.max_pool2d(steep.float(), 2 * REACH - 1, 1, REACH - 1)


def polish(folder: Path, minutes: float) -> None:
    """Train the decoder in `folder`/vae for `minutes`, on `folder`/drawings and `folder`/latents."""
    polisher, journal = Polisher(folder, minutes), Journal(folder / "vae.log")
    progress = polisher.progress
    progress.resume()
    while progress.share < 1:
        loss = polisher.loss()
        polisher.update(loss)
        if progress.step % 100 == 0:
            journal.write(polish=progress.step, loss=round(loss.item(), 4), progress=round(progress.share, 3))
    polisher.vae.load_state_dict(polisher.average.weights)
    autoencoder.save(polisher.vae, folder)
    journal.write(**autoencoder.measure(folder))
