"""The drawing: a small FLUX transformer, the noise it starts from, and the steps in which it draws.

Noise and picture are not paired at random. Whatever a caption leaves open is decided by eight numbers (see
`scenes.compose`), and the same numbers are carried by the initial noise: `tie`. Noise stays exactly standard normal,
but now the seed decides the picture, the flow is almost a straight line, and one step draws the whole picture.
(Independent pairing gives the mean of all pictures at the first step, and few-step samples blur.)

The numbers are carried by some tokens at the first corner, about as many whatever the size: `window`. As the mean of
the whole noise, which the first weights read, a number is 1/16 of a standard deviation in each value at 256x256 and
1/64 at 1024x1024, and was read at half its strength there.

At the first step the network sees the noise alone and must return it: `initialise` makes input and output
projections transposes of each other, so it starts out doing so.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5Tokenizer

from spark.autoencoder import LATENT_CHANNELS
from spark.scenes import NUISANCES
from spark.text import CLIP_WIDTH, T5_WIDTH, tokenize

# The scheduler's timestep shift, sigma = shift s / (1 + (shift - 1) s). So every step stays next to pure noise, and
# draws the whole picture anew: those at less noise see what the first have drawn, but draw it worse (log/trials.md).
SHIFT = 100.0
EDIT_SHIFTS = (1.0, 3.0)  # of edits: at strength 0.75 noise is 0.75 or 0.9 of what is seen
SPREAD = 1.5  # the same for the noise levels trained on beside the sampler's
TEXT_TOKENS = 20
AXES = (4, 14, 14)  # of an attention head's numbers, for RoPE: nothing, the row, the column
SHARP, TURNS = 2.0, (1, 2)  # of `window`: how steep, and which of an axis's frequencies


def build() -> FluxTransformer2DModel:
    """A fresh transformer: 2 double and 8 single blocks, width 128, about 3.3 M parameters."""
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=4 * LATENT_CHANNELS,
        num_layers=2,
        num_single_layers=8,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=T5_WIDTH,
        pooled_projection_dim=CLIP_WIDTH,
        guidance_embeds=False,
        axes_dims_rope=AXES,
    )


@torch.no_grad()
def initialise(model: FluxTransformer2DModel) -> None:
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


@cache
def window(height: int, width: int) -> Tensor:
    """How much of what the seed decides is in each latent (height, width); the sum of squares is 1.

    It is what one attention head sees from the words' place, the first corner, if its queries and keys know nothing
    but RoPE: a head with the same two frequencies reads the numbers to the last digit.
    """
    rope = torch.tensor([10000 ** (-2 * turn / AXES[1]) for turn in TURNS])
    rows, columns = ((SHARP * (torch.arange(n)[:, None] // 2 * rope).cos() - SHARP).sum(-1) for n in (height, width))
    seen = torch.exp(rows[:, None] + columns)
    return seen / seen.norm()


def tie(noise: Tensor, nuisance: Tensor) -> Tensor:
    """Let the first channels of `noise` carry `nuisance`; the result is standard normal if both are."""
    through, lead = window(*noise.shape[-2:]), noise[:, :NUISANCES]
    missing = nuisance - (lead * through).sum((-2, -1))
    return torch.cat([lead + missing[..., None, None] * through, noise[:, NUISANCES:]], dim=1)


def sample_sigma(count: int, near_noise: float) -> Tensor:
    """Noise levels in (0, 1]: a share `near_noise` in [0.97, 1], the rest everywhere."""
    uniform, kind = torch.rand(count), torch.rand(count)
    stepped = uniform.clamp(min=0.01)
    shifted = SPREAD * stepped / (1 + (SPREAD - 1) * stepped)
    return torch.where(kind > 1 - near_noise, 1 - 0.03 * uniform, shifted)


def sampler_sigmas(steps: int, shift: float) -> list[float]:
    """The noise levels that FlowMatchEulerDiscreteScheduler visits with `shift`, the final zero left out."""
    linear = [1 - i / steps for i in range(steps)]
    return [shift * s / (1 + (shift - 1) * s) for s in linear]


Velocity = Callable[[Tensor, Tensor, "Told"], Tensor]


@torch.no_grad()
def follow(velocity: Velocity, noisy: Tensor, sigmas: list[float], words: "Told", held: "Held | None" = None) -> Tensor:
    """Where the sampler arrives at the last of `sigmas`, from `noisy` at the first.

    With `held`, everything outside the mask is that picture, at each step under as much noise: inpainting.
    """
    rows, columns = noisy.shape[2] // 2, noisy.shape[3] // 2
    for here, there in itertools.pairwise(sigmas):
        packed = velocity(noisy, torch.full((len(noisy),), here), words)
        noisy = noisy + (there - here) * unpack(packed, rows, columns)
        if held:
            noisy = torch.where(held.drawn, noisy, torch.lerp(held.clean, held.noise, there))
    return noisy


@dataclass(frozen=True, slots=True)
class Held:
    """A picture to be kept: `clean` latents, the `noise` over them, and where it is `drawn` anew (batch, 1, h, w)."""

    clean: Tensor
    noise: Tensor
    drawn: Tensor


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


Told = tuple[Tensor, Tensor]  # pooled (batch, 96) and per-token (batch, length, 96) embeddings


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
    def read(self, texts: list[str], length: int) -> Told:
        """Pooled (batch, 96) and per-token (batch, length, 96) embeddings."""
        clip_ids, t5_ids = tokenize(self.clip_words, self.t5_words, texts, length)
        return self.clip(clip_ids).pooler_output, self.t5(t5_ids)[0]


def predicted(model: Callable[..., tuple[Tensor]], noisy: Tensor, sigma: Tensor, words: Told) -> Tensor:
    """The model's velocity, packed: noise minus picture."""
    pooled, context = words
    velocity = model(
        hidden_states=pack(noisy),
        encoder_hidden_states=context,
        pooled_projections=pooled,
        timestep=sigma,
        img_ids=image_ids(noisy.shape[2] // 2, noisy.shape[3] // 2),
        txt_ids=torch.zeros(context.shape[1], 3),
        return_dict=False,
    )[0]
    return velocity.float()


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
