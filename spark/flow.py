"""The drawing: a small FLUX transformer trained by rectified flow on cached latents.

Noise and picture are not paired at random. Whatever a caption leaves open is decided by eight numbers (see
`scenes.compose`), and the same numbers are the mean of the first eight latent channels of the initial noise:
`tie`. Noise stays exactly standard normal, but now the seed decides the picture, the flow is almost a straight
line, and one step draws the whole picture. (Independent pairing gives the mean of all pictures at the first step,
and few-step samples blur.) Below `TIED_ABOVE` some pairs are independent, for image-to-image.

At the first step the network sees the noise alone and must return it: `_initialise` makes input and output
projections transposes of each other, so it starts out doing so.
"""

import itertools
import math
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5Tokenizer

from spark.autoencoder import DOWNSCALE, LATENT_CHANNELS, to_tensor
from spark.checker import ATTRIBUTES, check
from spark.journal import Journal
from spark.scenes import NUISANCES, Scene, caption, draw, held_out, sample_scene
from spark.text import CLIP_WIDTH, T5_WIDTH, perturb, tokenize

NATIVE = (256, 256)
# The scheduler's timestep shift, sigma = shift s / (1 + (shift - 1) s): every step stays next to pure noise, where the
# model is best. On 20 validation prompts at four steps: 70 % right at shift 3, 60 at 12, 95 at 40, 100 at 150.
SHIFT = 100.0
SPREAD = 3.0  # the same for the noise levels trained on, so that image-to-image has middle levels to start from
BATCH = 48  # at NATIVE with 20 text tokens; other shapes get about as many tokens a step
TEXT_TOKENS = 20
PEAK_RATE = 2.2e-3
EMA_DECAY = 0.999
TIED_ABOVE = 0.85
FINISHING = 0.85  # of the training: before, it learns what to draw; after, to draw it in steps and at every size
PAIR_SHARE = 0.25  # of the pairs offered: the hardest scenes, better learnt when single shapes are
PORTRAIT, LANDSCAPE, LARGE = (256, 384), (384, 256), (512, 512)
SHARDS: tuple[tuple[tuple[int, int], int], ...] = (  # picture size, pictures a shard; the producer cycles through
    (NATIVE, 256), (LANDSCAPE, 96), (LARGE, 64), (PORTRAIT, 96), (NATIVE, 256), ((128, 128), 96),
    (LARGE, 64), (LANDSCAPE, 96), ((192, 192), 64), (PORTRAIT, 96), (NATIVE, 256), ((512, 384), 32),
    (LARGE, 64), ((384, 384), 32), (NATIVE, 256), ((256, 512), 32), ((512, 320), 32), (LARGE, 64),
    (NATIVE, 256), ((768, 512), 16), (LANDSCAPE, 96), (PORTRAIT, 96), ((1024, 1024), 12),
)  # fmt: skip
OTHER_SIZES = [size for size, _ in SHARDS if size != NATIVE]  # each as often as it is drawn


def build() -> FluxTransformer2DModel:
    """A fresh transformer: 2 double and 4 single blocks, width 128, about 2.3 M parameters."""
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=4 * LATENT_CHANNELS,
        num_layers=2,
        num_single_layers=4,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=T5_WIDTH,
        pooled_projection_dim=CLIP_WIDTH,
        guidance_embeds=False,
        axes_dims_rope=(4, 14, 14),
    )


@torch.no_grad()
def _initialise(model: FluxTransformer2DModel) -> None:
    for name, module in model.named_modules():
        if name.endswith(("norm1.linear", "norm1_context.linear", "norm.linear", "norm_out.linear")):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
        if name.endswith(("to_q", "to_k", "add_q_proj", "add_k_proj")):
            nn.init.normal_(module.bias, 0, 0.5)  # content-free queries and keys: attention by place from the start
    width, channels = model.x_embedder.weight.shape
    nn.init.orthogonal_(model.x_embedder.weight)
    nn.init.zeros_(model.x_embedder.bias)
    model.proj_out.weight.copy_(model.x_embedder.weight.T * math.sqrt(channels / width))
    nn.init.zeros_(model.proj_out.bias)


# ---------------------------------------------------------------- data


def shard_scenes(seed: int, index: int, count: int) -> list[Scene]:
    """The scenes of one shard: a function of its name, so that only latents need storing."""
    rng = random.Random(f"{seed}/{index}")
    return [sample_scene(rng) for _ in range(count)]


@torch.no_grad()
def produce(folder: Path, seed: int, minutes: float) -> None:
    """Draw and encode pictures for `minutes`; shards go to `folder`/latents. Run several with different seeds."""
    torch.set_num_threads(1)
    vae = AutoencoderKL.from_pretrained(folder / "vae").eval().to(memory_format=torch.channels_last)
    shift, scale = vae.config.shift_factor, vae.config.scaling_factor
    (folder / "latents").mkdir(parents=True, exist_ok=True)
    start, index = time.monotonic(), 0
    while time.monotonic() - start < 60 * minutes:
        size, count = SHARDS[index % len(SHARDS)]
        path = folder / "latents" / f"{seed}_{index}_{size[0]}x{size[1]}.safetensors"
        if not path.exists():
            scenes = shard_scenes(seed, index, count)
            encoded = [vae.encode(to_tensor([draw(s, size, 3)])).latent_dist.mean for s in scenes]
            latents = ((torch.cat(encoded) - shift) * scale).half().contiguous()
            save_file({"latents": latents}, path.with_suffix(".part"))
            path.with_suffix(".part").rename(path)
        index += 1


@dataclass
class Latents:
    """Everything the producers have finished, by picture size."""

    folder: Path
    rng: random.Random
    pools: dict[tuple[int, int], list[tuple[Tensor, Scene]]] = field(default_factory=dict)
    seen: set[str] = field(default_factory=set)

    def refresh(self) -> int:
        """Read new shards; returns the number of pictures at hand."""
        for path in sorted(self.folder.glob("*.safetensors")):
            if path.name in self.seen:
                continue
            self.seen.add(path.name)
            seed, index, dims = path.stem.split("_")
            width, height = map(int, dims.split("x"))
            latents = load_file(path)["latents"]
            scenes = shard_scenes(int(seed), int(index), len(latents))
            self.pools.setdefault((width, height), []).extend(zip(latents, scenes, strict=True))
        return sum(map(len, self.pools.values()))

    def take(self, size: tuple[int, int], count: int) -> tuple[Tensor, list[Scene]]:
        """`count` random latents (count, 12, height / 16, width / 16) of one size, with their scenes."""
        picked: list[tuple[Tensor, Scene]] = []
        while len(picked) < count:
            candidate = self.rng.choice(self.pools[size])
            if candidate[1].kind != "pair" or self.rng.random() < PAIR_SHARE:
                picked.append(candidate)
        return torch.stack([latent for latent, _ in picked]).float(), [scene for _, scene in picked]


def tie(noise: Tensor, nuisance: Tensor) -> Tensor:
    """Set the scaled mean of `noise`'s first channels to `nuisance`; the result is standard normal if both are."""
    height, width = noise.shape[-2:]
    lead = noise[:, :NUISANCES]
    wanted = nuisance / math.sqrt(height * width)
    moved = lead - lead.mean((-2, -1), keepdim=True) + wanted[..., None, None]
    return torch.cat([moved, noise[:, NUISANCES:]], dim=1)


def sample_sigma(count: int, near_noise: float) -> Tensor:
    """Noise levels in (0, 1]: a share `near_noise` in [0.97, 1], the rest where one to eight steps go, few below."""
    uniform, kind = torch.rand(count), torch.rand(count)
    stepped = 0.11 + 0.89 * uniform  # eight steps end at s = 1/8, and 0.11 leaves a margin
    stepped = torch.where(kind < 0.05, uniform.clamp(min=0.01), stepped)
    shifted = SPREAD * stepped / (1 + (SPREAD - 1) * stepped)
    return torch.where(kind > 1 - near_noise, 1 - 0.03 * uniform, shifted)


def sampler_sigmas(steps: int) -> list[float]:
    """The noise levels FlowMatchEulerDiscreteScheduler visits with `SHIFT`, the final zero left out."""
    linear = [1 - i / steps for i in range(steps)]
    return [SHIFT * s / (1 + (SHIFT - 1) * s) for s in linear]


def pack(latents: Tensor) -> Tensor:
    """(batch, channels, h, w) -> (batch, h/2 * w/2, 4 * channels), FluxPipeline's own order."""
    batch, channels, height, width = latents.shape
    blocks = latents.view(batch, channels, height // 2, 2, width // 2, 2)
    return blocks.permute(0, 2, 4, 1, 3, 5).reshape(batch, height * width // 4, channels * 4)


def unpack(tokens: Tensor, rows: int, columns: int) -> Tensor:
    """The inverse of `pack`: (batch, rows * columns, 4 * channels) -> (batch, channels, 2 rows, 2 columns)."""
    batch, _, channels = tokens.shape
    blocks = tokens.view(batch, rows, columns, channels // 4, 2, 2)
    return blocks.permute(0, 3, 1, 4, 2, 5).reshape(batch, channels // 4, 2 * rows, 2 * columns)


def image_ids(height: int, width: int) -> Tensor:
    """Token places (height * width, 3) for RoPE: zero, row, column."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], -1).reshape(-1, 3).float()


# ---------------------------------------------------------------- training


@dataclass(frozen=True, slots=True)
class Schedule:
    """Shares of the training steps: at other sizes than native, from the sampler's own states, next to pure noise."""

    other_sizes: float
    rolled: float
    near_noise: float


LEARNING = Schedule(other_sizes=0.25, rolled=0.1, near_noise=0.85)
FINISH = Schedule(other_sizes=0.55, rolled=0.2, near_noise=0.8)


@dataclass
class Words:
    """The finished, frozen text side."""

    clip_words: CLIPTokenizer
    t5_words: T5Tokenizer
    clip: CLIPTextModel
    t5: T5EncoderModel

    @classmethod
    def load(cls, folder: Path) -> "Words":
        return cls(
            CLIPTokenizer.from_pretrained(folder / "tokenizer"),
            T5Tokenizer.from_pretrained(folder / "tokenizer_2"),
            CLIPTextModel.from_pretrained(folder / "text_encoder").eval(),
            T5EncoderModel.from_pretrained(folder / "text_encoder_2").eval(),
        )

    @torch.no_grad()
    def read(self, texts: list[str], length: int) -> tuple[Tensor, Tensor]:
        """Pooled (batch, 96) and per-token (batch, length, 96) embeddings."""
        clip_ids, t5_ids = tokenize(self.clip_words, self.t5_words, texts, length)
        return self.clip(clip_ids).pooler_output, self.t5(t5_ids)[0]


class Trainer:
    """Owns the model, its average and its optimisers; `state` is everything needed to go on after a stop."""

    def __init__(self, folder: Path, minutes: float, seed: int) -> None:
        torch.manual_seed(seed)
        self.folder, self.minutes, self.rng = folder, minutes, random.Random(seed)
        self.words, self.latents = Words.load(folder), Latents(folder / "latents", self.rng)
        self.model, self.average = build(), build()
        _initialise(self.model)
        self.model.set_attention_backend("_native_math")  # its backward pass is far faster on a CPU
        self.average.load_state_dict(self.model.state_dict())
        self.compiled = torch.compile(self.model, dynamic=False)
        self.optimizers = list(self._optimizers())
        self.step, self.samples, self.elapsed, self.adopted = 0, 0, 0.0, False

    def _optimizers(self) -> Iterator[torch.optim.Optimizer]:
        hidden, rest = [], []
        for name, parameter in self.model.named_parameters():
            inner = "blocks." in name and ".norm" not in name and parameter.ndim == 2
            (hidden if inner else rest).append(parameter)
        yield torch.optim.AdamW(rest, lr=PEAK_RATE, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
        yield torch.optim.Muon(hidden, lr=PEAK_RATE, weight_decay=0.01, ns_steps=3, adjust_lr_fn="match_rms_adamw")

    def save(self) -> None:
        state = {
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimizers": [o.state_dict() for o in self.optimizers],
            "counts": [self.step, self.samples, self.elapsed, self.adopted],
        }
        torch.save(state, self.folder / "flow.part")
        (self.folder / "flow.part").rename(self.folder / "flow.pt")

    def resume(self) -> None:
        if (self.folder / "flow.pt").exists():
            state = torch.load(self.folder / "flow.pt", weights_only=True)
            self.model.load_state_dict(state["model"])
            self.average.load_state_dict(state["average"])
            for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
            self.step, self.samples, self.elapsed, self.adopted = state["counts"]
        elif (self.folder / "transformer").exists():  # finished weights to go on from
            finished = FluxTransformer2DModel.from_pretrained(self.folder / "transformer").state_dict()
            self.model.load_state_dict(finished)
            self.average.load_state_dict(finished)
            self.adopted = True

    @property
    def progress(self) -> float:
        return self.elapsed / (60 * self.minutes)

    @property
    def schedule(self) -> Schedule:
        return FINISH if self.adopted or self.progress >= FINISHING else LEARNING

    def shape(self) -> tuple[tuple[int, int], int, int]:
        """Picture size, text tokens and batch of the next step."""
        if self.rng.random() < self.schedule.other_sizes:
            size = self.rng.choice([s for s in OTHER_SIZES if s in self.latents.pools] or [NATIVE])
            length = TEXT_TOKENS if self.rng.random() < 0.8 else self.rng.choice((32, 48, 64, 77))
        elif self.rng.random() < 0.12:
            size, length = NATIVE, self.rng.choice((16, 32, 32, 32, 48, 64, 77, 128, 256, 512))
        else:
            return NATIVE, TEXT_TOKENS, BATCH
        tokens = size[0] * size[1] // (2 * DOWNSCALE) ** 2 + length
        return size, length, max(2, BATCH * (64 + TEXT_TOKENS) // tokens)

    def loss(self) -> Tensor:
        """Mean squared error of the predicted picture, from drawn noise levels or from the model's own steps."""
        size, length, batch = self.shape()
        clean, scenes = self.latents.take(size, batch)
        words = self.words.read([perturb(caption(s, self.rng), self.rng) for s in scenes], length)
        noise = tie(torch.randn_like(clean), torch.tensor([s.nuisance for s in scenes]))
        if self.rng.random() < self.schedule.rolled:
            noisy, sigma = self._roll(noise, words)
        else:
            sigma = sample_sigma(batch, self.schedule.near_noise)
            loose = ((sigma < TIED_ABOVE) & (torch.rand(batch) < 0.3))[:, None, None, None]
            noise = torch.where(loose, torch.randn_like(clean), noise)
            noisy = torch.lerp(clean, noise, sigma[:, None, None, None])
        self.samples += batch
        velocity = self._velocity(noisy, sigma, words)
        return nn.functional.mse_loss(sigma[:, None, None] * velocity, pack(noisy - clean))

    @torch.no_grad()
    def _roll(self, noise: Tensor, words: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Where the sampler itself arrives after one to three of two to eight steps: (noisy, sigma)."""
        steps = self.rng.choice((2, 4, 4, 8))
        sigmas = torch.tensor(sampler_sigmas(steps))
        noisy, rows, columns = noise, noise.shape[2] // 2, noise.shape[3] // 2
        stop = self.rng.randint(1, min(3, steps - 1))
        for here, there in itertools.pairwise(sigmas[: stop + 1]):
            velocity = self._velocity(noisy, here.expand(len(noise)), words)
            noisy = noisy + (there - here) * unpack(velocity, rows, columns)
        return noisy, sigmas[stop].expand(len(noise))

    def _velocity(self, noisy: Tensor, sigma: Tensor, words: tuple[Tensor, Tensor]) -> Tensor:
        """The model's prediction, packed."""
        pooled, context = words
        native = (noisy.shape[2:], context.shape[1], len(noisy)) == ((16, 16), TEXT_TOKENS, BATCH)
        model = self.compiled if native else self.model
        with torch.autocast("cpu", torch.bfloat16, enabled=torch.cpu._is_avx512_bf16_supported()):
            velocity: Tensor = model(
                hidden_states=pack(noisy),
                encoder_hidden_states=context,
                pooled_projections=pooled,
                timestep=sigma,
                img_ids=image_ids(noisy.shape[2] // 2, noisy.shape[3] // 2),
                txt_ids=torch.zeros(context.shape[1], 3),
                return_dict=False,
            )[0]
        return velocity.float()

    def update(self, loss: Tensor) -> None:
        """One optimiser step and one step of the moving average."""
        rate = PEAK_RATE * min(1.0, (self.step + 1) / 100) * min(1.0, (1 - self.progress) / 0.5 + 0.01)
        for optimizer in self.optimizers:
            optimizer.param_groups[0]["lr"] = rate
            optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
        self.step += 1
        decay = min(EMA_DECAY, (1 + self.step) / (20 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.parameters()), list(self.model.parameters()), 1 - decay)


def train(folder: Path, minutes: float, check_every: float = 8.0, seed: int = 1) -> None:
    """Train to a total of `minutes`, going on from `folder`/flow.pt if there is one."""
    trainer, journal = Trainer(folder, minutes, seed), Journal(folder / "flow.log")
    trainer.resume()
    mean, next_check = 1.0, trainer.elapsed + 60 * check_every
    pictures, last = trainer.latents.refresh(), time.monotonic()
    while trainer.progress < 1:
        loss = trainer.loss()
        trainer.update(loss)
        mean = 0.99 * mean + 0.01 * loss.item()
        if trainer.step % 100 == 0:
            pictures = trainer.latents.refresh()
            journal.write(
                step=trainer.step, samples=trainer.samples, loss=round(mean, 4), minutes=trainer.elapsed / 60,
                pictures=pictures,
            )  # fmt: skip
        trainer.elapsed += time.monotonic() - last
        last = time.monotonic()
        if trainer.elapsed > next_check:
            trainer.save()
            journal.write(step=trainer.step, **validate(assemble(folder, trainer.average)))
            next_check, last = trainer.elapsed + 60 * check_every, time.monotonic()
    trainer.save()
    journal.write(step=trainer.step, **validate(assemble(folder, trainer.average)))


def finished(folder: Path) -> FluxPipeline:
    """The whole FluxPipeline with the averaged weights in `folder`/flow.pt."""
    transformer = build()
    transformer.load_state_dict(torch.load(folder / "flow.pt", weights_only=True)["average"])
    return assemble(folder, transformer)


def assemble(folder: Path, transformer: FluxTransformer2DModel) -> FluxPipeline:
    """The whole FluxPipeline around `transformer`."""
    words = Words.load(folder)
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
        vae=AutoencoderKL.from_pretrained(folder / "vae"),
        text_encoder=words.clip,
        tokenizer=words.clip_words,
        text_encoder_2=words.t5,
        tokenizer_2=words.t5_words,
        transformer=transformer.eval(),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def export(pipeline: FluxPipeline, folder: Path) -> None:
    """Save for shipping: transformer and autoencoder in bf16.

    The text encoders stay fp32: transformers loads a file's own dtype, diffusers fp32, and a plain
    `from_pretrained` must get one dtype throughout.
    """
    pipeline.transformer.to(torch.bfloat16)
    pipeline.vae.to(torch.bfloat16)
    for part in (pipeline.transformer, pipeline.vae):
        part.register_to_config(_name_or_path="")  # where it lay on this machine is nobody's business
    pipeline.save_pretrained(folder)


VALIDATED = (("one", NATIVE), ("many", NATIVE), ("pair", NATIVE), ("one", LARGE), ("one", LANDSCAPE), ("one", PORTRAIT))


def validate(pipeline: FluxPipeline, count: int = 24) -> dict[str, dict[str, float]]:
    """Accuracy on validation prompts at four steps, per kind and size: what steers the training."""
    report = {}
    for kind, (width, height) in VALIDATED:
        verdicts = []
        for i, (prompt, scene) in enumerate(held_out(count, "validation", kind, "everyday")):
            image = pipeline(
                prompt, height=height, width=width, num_inference_steps=4, guidance_scale=0.0, max_sequence_length=32,
                generator=torch.Generator().manual_seed(i),
            ).images[0]  # fmt: skip
            verdicts.append(check(image, scene))
        scores = {name: sum(getattr(v, name) for v in verdicts) / count for name in ATTRIBUTES}
        scores["right"] = sum(v.right for v in verdicts) / count
        report[f"{kind}_{width}x{height}"] = {name: round(share, 3) for name, share in scores.items()}
    return report
