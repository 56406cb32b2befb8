"""The picture codec: a 16x AutoencoderKL trained on drawn pictures.

16x instead of FLUX.1's 8x makes a 256x256 picture 64 transformer tokens, a quarter of the work.

What made it learn, in order of effect: starting as average pooling and nearest-neighbour upsampling, so that
plain colour passes from the first step; two norm groups; crops that grow from 32 pixels to whole pictures.
"""

import math
import random
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor, nn

from spark.journal import Journal
from spark.progress import Average, Progress, rates
from spark.scenes import Scene, draw, sample_scene

LATENT_CHANNELS = 12
DOWNSCALE = 16
PEAK_RATE = 1.2e-3
REFINE_RATE = 8e-4
MEASURED = 24  # pictures a size, of the largest fewer
POOL = 1600  # drawn pictures to take crops from
EMA_DECAY = 0.998
WHOLE_PIXELS = 256 * 256
LATENT_NOISE = 0.05  # added before decoding, for the transformer's latents are never exact
CROPS = {32: 32, 64: 16, 128: 5}  # crop side in pixels -> batch size
WHOLE: tuple[tuple[int, int], ...] = ((256, 256), (256, 256), (384, 256), (256, 384), (128, 128), (512, 512))
# For the decoder alone, whose sums over a picture know its size: at 128x128 it is the weakest, and costs least.
REFINED = (*[(128, 128)] * 4, (256, 256), (256, 256), (384, 256), (256, 384), (512, 512), (768, 512))


def build() -> AutoencoderKL:
    """A fresh autoencoder; latents are (batch, 12, height / 16, width / 16)."""
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 5,
        up_block_types=("UpDecoderBlock2D",) * 5,
        block_out_channels=(16, 16, 32, 64, 64),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=2,
        sample_size=256,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
        scaling_factor=1.0,
        shift_factor=0.0,
    )
    for name, module in vae.named_modules():
        if isinstance(module, nn.Conv2d):
            _initialise(name, module)
    with torch.no_grad():
        vae.encoder.conv_out.weight[LATENT_CHANNELS:].zero_()
        vae.encoder.conv_out.bias[LATENT_CHANNELS:] = -5.0
    return vae.to(memory_format=torch.channels_last)


@torch.no_grad()
def _initialise(name: str, conv: nn.Conv2d) -> None:
    if name.endswith("conv2"):  # residual branches start silent
        nn.init.zeros_(conv.weight)
        nn.init.zeros_(conv.bias)
        return
    nn.init.normal_(conv.weight, 0, conv.weight[0].numel() ** -0.5)
    nn.init.normal_(conv.bias, 0, 0.1)
    if "samplers" in name:
        conv.weight.zero_()
        for channel in range(conv.weight.shape[0]):
            if "down" in name:
                conv.weight[channel, channel, 0:2, 0:2] = 0.25
            else:
                conv.weight[channel, channel, 1, 1] = 1.0


def to_tensor(images: list[Image.Image]) -> Tensor:
    """RGB pictures of one size -> (batch, 3, height, width) in [-1, 1]."""
    pixels = np.stack([np.asarray(image) for image in images])
    return (torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1).contiguous(
        memory_format=torch.channels_last
    )


@torch.no_grad()
def round_trip(vae: AutoencoderKL, image: Image.Image) -> Image.Image:
    """What is left of a picture that is encoded and decoded."""
    return to_image(vae.decode(vae.encode(to_tensor([image])).latent_dist.mean).sample[0])


def to_image(pixels: Tensor) -> Image.Image:
    """(3, height, width) in [-1, 1], and beyond cut off -> an RGB picture."""
    return Image.fromarray(((pixels.clamp(-1, 1).permute(1, 2, 0) + 1) * 127.5).round().byte().numpy())


def recolored(scene: Scene, rng: random.Random) -> Scene:
    """The scene in arbitrary colours."""
    behind, *wild = [(rng.randrange(256), rng.randrange(256), rng.randrange(256)) for _ in range(1 + len(scene.items))]
    items = tuple(replace(item, rgb=rgb) for item, rgb in zip(scene.items, wild, strict=True))
    return replace(scene, rgb=behind, items=items)


class Pictures:
    """A pool of drawn pictures to take training crops from; a quarter has arbitrary colours."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng

    @cached_property
    def pool(self) -> list[Tensor]:
        """The same for every beginning and every going on."""
        other = Pictures(random.Random(0))
        sizes = [(256, 256)] * 6 + [(512, 512)] * 2 + [(128, 128)] + [(384, 256)]
        return [to_tensor([draw(other._scene(), other.rng.choice(sizes), 3)])[0] for _ in range(POOL)]

    def _scene(self) -> Scene:
        scene = sample_scene(self.rng)
        return recolored(scene, self.rng) if self.rng.random() <= 0.25 else scene

    def crops(self, side: int) -> Tensor:
        """(batch, 3, side, side), the batch size by `CROPS`."""
        picked = []
        while len(picked) < CROPS[side]:
            picture = self.rng.choice(self.pool)
            top = self.rng.randrange(picture.shape[1] - side + 1)
            left = self.rng.randrange(picture.shape[2] - side + 1)
            crop = picture[:, top : top + side, left : left + side]
            if crop.std(dim=(1, 2)).max() > 0 or self.rng.random() < 0.2:  # plain crops teach little
                picked.append(crop)
        return torch.stack(picked).contiguous(memory_format=torch.channels_last)

    def whole(self, sizes: Sequence[tuple[int, int]]) -> Tensor:
        """Whole pictures of one of `sizes`; of small ones several, for about as much work."""
        size = self.rng.choice(sizes)
        count = max(1, WHOLE_PIXELS // (size[0] * size[1]))
        return to_tensor([draw(self._scene(), size, 3) for _ in range(count)])


BatchOf = Callable[[Pictures, int, float], Tensor]


def _growing(pictures: Pictures, step: int, progress: float) -> Tensor:
    """Crops that grow to whole pictures as training goes on."""
    if progress < 0.2:
        return pictures.crops(32)
    if progress < 0.45:
        return pictures.crops(64 if step % 4 else 128)
    return _mixed(pictures, step, progress)


def _mixed(pictures: Pictures, step: int, progress: float) -> Tensor:
    """One whole picture for three batches of crops, which hold more edges for their size."""
    return pictures.crops((64, 128, 64)[step % 4]) if step % 4 < 3 else pictures.whole(WHOLE)


def _whole(pictures: Pictures, step: int, progress: float) -> Tensor:
    """Whole pictures, as they will be decoded."""
    return pictures.whole(REFINED)


def loss_of(vae: AutoencoderKL, pixels: Tensor) -> tuple[Tensor, float]:
    """Reconstruction (L1, L2, gradients) plus a faint KL; also the PSNR in dB."""
    posterior = vae.encode(pixels).latent_dist
    latents = posterior.mean + LATENT_NOISE * torch.randn_like(posterior.mean)
    decoded = vae.decode(latents).sample
    kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
    return distance(decoded, pixels) + 3e-4 * kl, -10 * math.log10((decoded - pixels).square().mean().item() / 4)


def distance(decoded: Tensor, pixels: Tensor) -> Tensor:
    """L1, L2 and the L1 of gradients, which keeps edges sharp."""
    error = decoded - pixels
    across, down = error.diff(dim=-1).abs().mean(), error.diff(dim=-2).abs().mean()
    return error.abs().mean() + 2 * error.square().mean() + 0.5 * (across + down)


def train(folder: Path, minutes: float) -> None:
    """Train for `minutes` and save the averaged weights in `folder`/vae, with the latent scale measured."""
    torch.manual_seed(0)
    vae = build()
    _optimise(vae, vae.parameters(), folder / "vae.pt", minutes, _growing, PEAK_RATE)
    _measure_scale(vae.eval())
    save(vae, folder)
    Journal(folder / "vae.log").write(**measure(folder))


def refine(folder: Path, minutes: float) -> None:
    """Go on with all of it, on whole pictures; latents that were made before are no longer valid."""
    torch.manual_seed(1)
    vae = AutoencoderKL.from_pretrained(_kept(folder)).to(memory_format=torch.channels_last)
    _optimise(vae, vae.parameters(), folder / "refine.pt", minutes, _whole, REFINE_RATE)
    _measure_scale(vae.eval())
    save(vae, folder)
    Journal(folder / "vae.log").write(**measure(folder))


def decoding(folder: Path) -> AutoencoderKL:
    """The autoencoder in `folder`/vae, of which the decoder alone can be trained."""
    vae: AutoencoderKL = AutoencoderKL.from_pretrained(_kept(folder)).to(memory_format=torch.channels_last)
    vae.encoder.requires_grad_(False)
    return vae


def save(vae: AutoencoderKL, folder: Path) -> None:
    """Leave `vae` in `folder`/vae, whole: interrupted, the one that was there before stays."""
    part, old = folder / "vae.part", folder / "vae.old"
    for left in (part, old):
        shutil.rmtree(left, ignore_errors=True)
    vae.save_pretrained(part)
    if (folder / "vae").exists():
        (folder / "vae").rename(old)
    part.rename(folder / "vae")
    shutil.rmtree(old, ignore_errors=True)


def _kept(folder: Path) -> Path:
    """`folder`/vae; where a kill came between two moves of `save`, the one that was there before."""
    if not (folder / "vae").exists() and (folder / "vae.old").exists():
        (folder / "vae.old").rename(folder / "vae")
    return folder / "vae"


def _optimise(
    vae: AutoencoderKL, parameters: Iterable[nn.Parameter], path: Path, minutes: float, batch_of: BatchOf, peak: float
) -> None:
    """AdamW under a cosine schedule for `minutes`; `vae` then has the moving average of its weights."""
    rng, journal = random.Random(0), Journal(path.with_name("vae.log"))
    pictures, average = Pictures(rng), Average(vae)
    optimizer = torch.optim.AdamW(parameters, lr=peak, betas=(0.9, 0.995), weight_decay=0.0, fused=True)
    progress = Progress(path, minutes, rng, {"vae": vae, "average": average, "optimizer": optimizer})
    progress.resume()
    while progress.share < 1:
        rates([optimizer], peak * min(1, (progress.step + 1) / 50) * cosine(progress.share))
        loss, psnr = loss_of(vae, batch_of(pictures, progress.step, progress.share))
        advance(vae, optimizer, loss)
        average.follow(vae, min(EMA_DECAY, (1 + progress.step) / (21 + progress.step)))
        progress.tick()
        if progress.step % 100 == 0:
            told = {"loss": round(loss.item(), 4), "psnr": round(psnr, 2), "progress": round(progress.share, 3)}
            journal.write(step=progress.step, **told)
    vae.load_state_dict(average.weights)


def cosine(progress: float) -> float:
    """The share of the peak rate after `progress` of the time: from 1 down to 0.02."""
    return 0.49 * (1 + math.cos(math.pi * min(1.0, progress))) + 0.02


def advance(vae: AutoencoderKL, optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    """One step down `loss`."""
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
    optimizer.step()


@torch.no_grad()
def _measure_scale(vae: AutoencoderKL) -> None:
    """Set the factors that make latents of drawn pictures zero-mean and unit-variance."""
    rng = random.Random(1)
    latents = [vae.encode(to_tensor([draw(sample_scene(rng), (256, 256))])).latent_dist.mean for _ in range(48)]
    sample = torch.cat(latents)
    vae.register_to_config(shift_factor=sample.mean().item(), scaling_factor=1 / sample.std().item())


@torch.no_grad()
def measure(folder: Path) -> dict[str, float]:
    """PSNR in dB of whole drawn pictures through the saved autoencoder, per size."""
    vae, rng = AutoencoderKL.from_pretrained(folder / "vae").eval(), random.Random(2)
    found = {}
    for size in ((128, 128), (256, 256), (384, 256), (512, 512), (1024, 1024)):
        errors = []
        for _ in range(-(-MEASURED * 512 * 512 // max(size[0] * size[1], 512 * 512))):
            pixels = to_tensor([draw(sample_scene(rng, "validation"), size)])
            again = vae.decode(vae.encode(pixels).latent_dist.mean).sample.clamp(-1, 1)
            errors.append(-10 * math.log10((again - pixels).square().mean().item() / 4))
        found[f"psnr_{size[0]}x{size[1]}"] = round(float(np.mean(errors)), 2)
    return found
