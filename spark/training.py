"""The transformer's training: rectified flow on cached latents, in lessons, most of them from its own states.

A sampler that takes few steps meets states that no noised picture is: what the model itself has drawn until there. So
a third of its training, later half, begins where a sampler arrives, and the answer is the picture that was wanted.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from torch import Tensor, nn

from spark import flow
from spark.autoencoder import DOWNSCALE, distance, to_tensor
from spark.journal import Journal
from spark.latents import NATIVE, PLAN, Latents, Size
from spark.progress import Average, Progress, rates
from spark.scenes import Scene, caption, draw
from spark.text import perturb
from spark.validation import validate

BATCH = 48  # at NATIVE with flow.TEXT_TOKENS text tokens; other shapes get about as many tokens a step
PEAK_RATE = 1.5e-3
EMA_DECAY = 0.999
LONG_TEXTS = (16, 32, 32, 32, 48, 64, 77)  # in a tenth of the steps, and at NATIVE more
TIED_ABOVE = 0.85  # below, some noise has nothing to do with the picture, as in image-to-image
OBEYED_ABOVE = 0.45  # an edit that begins at less noise keeps the picture, whatever the words say
FINISHING = 0.5  # of the training: before, it learns what to draw; after, to draw it in steps
PIXELS_FROM, PIXEL_WEIGHT, PIXELS = 0.5, 0.3, 768 * 512  # when the loss is taken in pixels too, and of how many
SHADES = (3, 6)  # the numbers that decide the background's shade
HOLE = 0.75  # of an object's diameter, from its middle to the edge of the hole that it is painted into
COMPILED = tuple(size for size, share in PLAN.items() if share > 2)  # a step takes half as long, and a minute once

State = tuple[Tensor, Tensor, Tensor]  # noisy latents, their noise levels (batch,), and the picture to answer with


@dataclass(frozen=True, slots=True)
class Schedule:
    """How often each lesson is given, in percent, and how much of the hardest scenes is kept."""

    lessons: dict[str, float]
    pairs: float


LEARNING = Schedule({"near": 55, "levels": 15, "rolled": 15, "held": 5, "edited": 10}, pairs=0.4)
FINISH = Schedule({"near": 42, "levels": 8, "rolled": 29, "held": 10, "edited": 11}, pairs=1.0)


class Trainer:
    """Owns the model, its average and its optimisers; `progress` keeps everything needed to go on after a stop."""

    def __init__(self, folder: Path, minutes: float, seed: int) -> None:
        torch.manual_seed(seed)
        self.rng = random.Random(seed)
        self.words, self.latents = flow.Words.load(folder), Latents(folder / "latents", self.rng)
        self.vae = AutoencoderKL.from_pretrained(folder / "vae").requires_grad_(False)
        self.model = begun(folder)
        self.model.set_attention_backend("_native_math")  # its backward pass is far faster on a CPU
        torch._dynamo.config.recompile_limit = 4 * len(COMPILED)  # by shape, and whether gradients are wanted
        self.compiled = torch.compile(self.model, dynamic=False)
        self.average, self.optimizers = Average(self.model), list(optimizers(self.model))
        kept = {"model": self.model, "average": self.average, "optimizers": self.optimizers}
        self.progress = Progress(folder / "flow.pt", minutes, self.rng, kept)
        self.lessons: dict[str, Callable[[Size, int, int], tuple[State, flow.Told, list[Scene]]]] = {
            "near": self._near, "levels": self._levels, "rolled": self._rolled, "held": self._held,
            "edited": self._edited,
        }  # fmt: skip

    @property
    def schedule(self) -> Schedule:
        return FINISH if self.progress.share >= FINISHING else LEARNING

    def shape(self) -> tuple[Size, int, int]:
        """Picture size, text tokens and batch of the next step."""
        sizes = [size for size in PLAN if size in self.latents.pools]
        [size] = self.rng.choices(sizes, [PLAN[size] for size in sizes])
        length = self.rng.choice(LONG_TEXTS) if self.rng.random() < 0.1 else flow.TEXT_TOKENS
        if size == NATIVE and self.rng.random() < 0.03:
            length = self.rng.choice((128, 256, 512))
        return size, length, batch_of(size, length)

    def loss(self) -> tuple[Tensor, str, int]:
        """Mean squared error of the predicted picture; also the lesson's name with the size, and how many pictures."""
        size, length, batch = self.shape()
        [lesson] = self.rng.choices(list(self.schedule.lessons), list(self.schedule.lessons.values()))
        (noisy, sigma, answer), words, scenes = self.lessons[lesson](size, length, batch)
        levels = sigma[:, None, None, None]
        velocity = flow.unpack(self._velocity(noisy, sigma, words), noisy.shape[2] // 2, noisy.shape[3] // 2)
        loss = nn.functional.mse_loss(levels * velocity, noisy - answer)
        if lesson == "rolled" and self.progress.share >= PIXELS_FROM and size[0] * size[1] <= PIXELS:
            loss = loss + PIXEL_WEIGHT * self._pixels(noisy - levels * velocity, scenes, size)
        return loss, f"{lesson}_{size[0]}x{size[1]}", batch

    def _pixels(self, latents: Tensor, scenes: list[Scene], size: Size) -> Tensor:
        """How far the first pictures, decoded, are from the true ones."""
        count = max(1, PIXELS // (size[0] * size[1]))
        latents = latents[:count] / self.vae.config.scaling_factor + self.vae.config.shift_factor
        truth = to_tensor([draw(scene, size, 3) for scene in scenes[:count]])
        return distance(self.vae.decode(latents.contiguous(memory_format=torch.channels_last)).sample, truth)

    # ------------------------------------------------------------ lessons

    def _told(self, scenes: list[Scene], length: int) -> flow.Told:
        return self.words.read([perturb(caption(s, self.rng), self.rng) for s in scenes], length)

    def _tied(self, size: Size, length: int, batch: int) -> tuple[Tensor, Tensor, flow.Told, list[Scene]]:
        """Pictures and the noise that decides them."""
        clean, scenes = self.latents.take(size, batch, self.schedule.pairs)
        noise = flow.tie(torch.randn_like(clean), torch.tensor([s.nuisance for s in scenes]))
        return clean, noise, self._told(scenes, length), scenes

    def _near(self, size: Size, length: int, batch: int) -> tuple[State, flow.Told, list[Scene]]:
        """Next to pure noise: what to draw."""
        clean, noise, words, scenes = self._tied(size, length, batch)
        sigma = flow.sample_sigma(batch, 1.0)
        return (torch.lerp(clean, noise, sigma[:, None, None, None]), sigma, clean), words, scenes

    def _levels(self, size: Size, length: int, batch: int) -> tuple[State, flow.Told, list[Scene]]:
        """All noise levels, some with noise that decides nothing."""
        clean, noise, words, scenes = self._tied(size, length, batch)
        sigma = flow.sample_sigma(batch, 0.0)
        loose = ((sigma < TIED_ABOVE) & (torch.rand(batch) < 0.3))[:, None, None, None]
        noise = torch.where(loose, torch.randn_like(clean), noise)
        return (torch.lerp(clean, noise, sigma[:, None, None, None]), sigma, clean), words, scenes

    def _rolled(self, size: Size, length: int, batch: int) -> tuple[State, flow.Told, list[Scene]]:
        """Where the sampler itself arrives on its way."""
        clean, noise, words, scenes = self._tied(size, length, batch)
        sigmas = flow.sampler_sigmas(self.rng.choice((2, 4, 4, 4, 8)), flow.SHIFT)
        sigmas = sigmas[: self.rng.randint(2, len(sigmas))]
        noisy = flow.follow(self._velocity, noise, sigmas, words)
        return (noisy, torch.full((batch,), sigmas[-1]), clean), words, scenes

    def _held(self, size: Size, length: int, batch: int) -> tuple[State, flow.Told, list[Scene]]:
        """Inpainting's own states: into a hole, in the background's shade, whatever the seed says of either.

        Half of the seeds agree with what is in the hole and decide what can be seen nowhere.
        """
        clean, scenes = self.latents.take(size, batch, self.schedule.pairs)
        nuisance = torch.tensor([s.nuisance for s in scenes])
        nuisance[:, SHADES] = torch.randn(batch, len(SHADES))
        loose = (torch.rand(batch) < 0.5)[:, None, None, None]
        noise = torch.where(loose, torch.randn_like(clean), flow.tie(torch.randn_like(clean), nuisance))
        drawn = torch.stack([hole(scene, clean.shape[2:], size, self.rng) for scene in scenes])
        sigmas = flow.sampler_sigmas(self.rng.choice((4, 4, 8)), self.rng.choice(flow.EDIT_SHIFTS))
        sigmas = sigmas[: self.rng.randint(2, len(sigmas))]
        words = self._told(scenes, length)
        noisy = flow.follow(self._velocity, noise, sigmas, words, flow.Held(clean, noise, drawn))
        return (noisy, torch.full((batch,), sigmas[-1]), clean), words, scenes

    def _edited(self, size: Size, length: int, batch: int) -> tuple[State, flow.Told, list[Scene]]:
        """Image-to-image's own states: a picture under noise that decides nothing, and words for another."""
        before, after, scenes = self.latents.take_altered(size, batch)
        words, noise = self._told(scenes, length), torch.randn_like(before)
        sigmas = flow.sampler_sigmas(self.rng.choice((4, 4, 8)), self.rng.choice(flow.EDIT_SHIFTS))
        start = self.rng.randrange(1, len(sigmas))
        end = self.rng.randrange(start, len(sigmas))
        noisy = torch.lerp(before, noise, sigmas[start])
        noisy = flow.follow(self._velocity, noisy, sigmas[start : end + 1], words)
        answer = after if sigmas[start] > OBEYED_ABOVE else before
        return (noisy, torch.full((batch,), sigmas[end]), answer), words, scenes

    # ------------------------------------------------------------ steps

    def _velocity(self, noisy: Tensor, sigma: Tensor, words: flow.Told) -> Tensor:
        """The model's prediction, packed; compiled for the shapes that most steps have."""
        size, length = (noisy.shape[3] * DOWNSCALE, noisy.shape[2] * DOWNSCALE), words[1].shape[1]
        usual = size in COMPILED and length == flow.TEXT_TOKENS
        with torch.autocast("cpu", torch.bfloat16, enabled=torch.cpu._is_avx512_bf16_supported()):
            return flow.predicted(self.compiled if usual else self.model, noisy, sigma, words)

    def update(self, loss: Tensor, pictures: int) -> None:
        """One optimiser step and one step of the moving average."""
        share, step = self.progress.share, self.progress.step
        rates(self.optimizers, PEAK_RATE * min(1.0, (step + 1) / 100) * max(0.01, min(1.0, (1 - share) / 0.65 + 0.01)))
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
        self.average.follow(self.model, min(EMA_DECAY, (2 + step) / (21 + step)))
        self.progress.tick(pictures)


def begun(folder: Path) -> FluxTransformer2DModel:
    """A fresh model, or the finished one in `folder` to go on from; blocks that it lacks do nothing at first."""
    model = flow.build()
    flow.initialise(model)
    if (folder / "transformer").exists():
        kept = FluxTransformer2DModel.from_pretrained(folder / "transformer").state_dict()
        if unknown := model.load_state_dict(kept, strict=False).unexpected_keys:
            raise ValueError(f"{folder}/transformer has more than this recipe builds: {unknown[0]}")
    return model


def optimizers(model: nn.Module) -> Iterator[torch.optim.Optimizer]:
    """Muon for the matrices inside blocks, AdamW for the rest."""
    hidden, rest = [], []
    for name, parameter in model.named_parameters():
        inner = "blocks." in name and ".norm" not in name and parameter.ndim == 2
        (hidden if inner else rest).append(parameter)
    yield torch.optim.AdamW(rest, lr=PEAK_RATE, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    yield torch.optim.Muon(hidden, lr=PEAK_RATE, weight_decay=0.01, ns_steps=3, adjust_lr_fn="match_rms_adamw")


def batch_of(size: Size, length: int) -> int:
    """So many pictures that a step has about as many tokens as `BATCH` at `NATIVE`."""
    native = (NATIVE[0] // (2 * DOWNSCALE)) ** 2 + flow.TEXT_TOKENS
    return max(2, BATCH * native // (size[0] * size[1] // (2 * DOWNSCALE) ** 2 + length))


def hole(scene: Scene, latents: torch.Size, size: Size, rng: random.Random) -> Tensor:
    """Where to draw anew (1, height, width): mostly around one of the objects, else a half that has it, or anywhere."""
    drawn, (height, width) = torch.zeros(1, *latents, dtype=torch.bool), latents
    item, kind = rng.choice(scene.items), rng.random()
    x, y, half = item.x * width, item.y * height, HOLE * item.diameter * min(size) / DOWNSCALE
    if kind < 0.15:
        x, y, half = rng.random() * width, rng.random() * height, rng.uniform(0.1, 0.4) * min(width, height)
    left, right, top, bottom = x - half, x + half, y - half, y + half
    if kind > 0.8:
        left, right, top, bottom = (0, width / 2, 0, height) if item.x < 0.5 else (width / 2, width, 0, height)
    rows, columns = (slice(max(0, round(low)), max(0, round(high))) for low, high in ((top, bottom), (left, right)))
    drawn[:, rows, columns] = True
    return drawn


def train(folder: Path, minutes: float, check_every: float = 15.0, seed: int = 1) -> None:
    """Train to a total of `minutes`, going on from `folder`/flow.pt if there is one."""
    trainer, journal = Trainer(folder, minutes, seed), Journal(folder / "flow.log")
    progress, losses = trainer.progress, dict[str, float]()
    if progress.resume():
        journal.write(resumed=progress.step, minutes=progress.elapsed / 60)
    checked, pictures = progress.elapsed, trainer.latents.refresh()
    progress.pause()
    while progress.share < 1:
        loss, lesson, batch = trainer.loss()
        trainer.update(loss, batch)
        losses[lesson] = 0.95 * losses.get(lesson, loss.item()) + 0.05 * loss.item()
        if progress.step % 100 == 0:
            told = {name: round(value, 4) for name, value in sorted(losses.items())}
            journal.write(
                step=progress.step, samples=progress.samples, minutes=progress.elapsed / 60, pictures=pictures, **told
            )
        if progress.elapsed > checked + 60 * check_every:
            validate(folder, trainer.average.weights, progress.step)
            checked = progress.elapsed
            progress.pause()
    progress.save()
