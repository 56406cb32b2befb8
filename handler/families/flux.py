"""FLUX.1: FluxPipeline, for FLUX.1 [schnell], [dev] and the embedded spark."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers import FluxPipeline

from handler.errors import NumericalError
from handler.hardware import Hardware
from handler.reader import Reader
from handler.request import Recipe
from handler.weights import load_components

DENOISER = "transformer"


def build(reader: Reader, hardware: Hardware) -> Any:
    """The pipeline that `reader` brings, on the device."""
    pipeline: Any = FluxPipeline(**load_components(reader, hardware))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.inference_mode()
def encode(pipeline: Any, recipe: Recipe, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompt embeddings (1, tokens, width) and pooled (1, width)."""
    context, pooled, _ = pipeline.encode_prompt(recipe.prompt, prompt_2=None, max_sequence_length=tokens)
    return context, pooled


@torch.inference_mode()
def run(
    pipeline: Any,
    prompt: tuple[torch.Tensor, torch.Tensor],
    recipe: Recipe,
    multiple: int,
    on_step: Callable[[int], None],
    on_decode: Callable[[], None],
) -> Any:
    """Denoise, then decode. The noise is drawn on the CPU, so a seed means the same on every device."""

    def step_end(_: Any, step: int, __: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        on_step(step + 1)
        return tensors

    width, height = (-(-side // multiple) * multiple for side in recipe.size)
    latents = pipeline(
        prompt_embeds=prompt[0],
        pooled_prompt_embeds=prompt[1],
        width=width,
        height=height,
        num_inference_steps=recipe.steps,
        guidance_scale=recipe.guidance,
        generator=torch.Generator("cpu").manual_seed(recipe.seed),
        callback_on_step_end=step_end,
        output_type="latent",
    ).images
    on_decode()
    return _crop(_decode(pipeline, latents, width, height), recipe.size)


def _decode(pipeline: Any, latents: torch.Tensor, width: int, height: int) -> torch.Tensor:
    """Packed latents -> uint8 (height, width, 3) on the device."""
    vae = pipeline.vae
    unpacked = pipeline._unpack_latents(latents, height, width, pipeline.vae_scale_factor)
    unpacked = unpacked / vae.config.scaling_factor + vae.config.shift_factor
    image = vae.decode(unpacked, return_dict=False)[0][0]
    if not torch.isfinite(image).all():
        raise NumericalError("The model produced NaN or infinite values; no picture was made.")
    pixels = (image.float() * 127.5 + 127.5).round_().clamp_(0, 255).to(torch.uint8)
    if not pixels.any():
        raise NumericalError("The model produced an all-black picture.")
    picture: torch.Tensor = pixels.permute(1, 2, 0)
    return picture


def _crop(pixels: torch.Tensor, size: tuple[int, int]) -> Any:
    """The middle of `pixels`, exactly `size` (width, height), as a contiguous numpy array."""
    width, height = size
    top, left = (pixels.shape[0] - height) // 2, (pixels.shape[1] - width) // 2
    return pixels[top : top + height, left : left + width].contiguous().cpu().numpy()
