"""What a model family is: a module with one function and three names, itself named by string in the catalogue.

    PIPELINE                            diffusers' own pipeline class
    DENOISER                            the pipeline's component whose repeated blocks are compiled
    SCHEDULERS                          which table of `schedulers.py` its models can use
    encode(pipeline, recipe, tokens)    the arguments that tell the pipeline what to draw; made once for n pictures

What all families share is here: `build`, `run`. They call diffusers' pipelines and never rewrite their denoising
loops. Reached late: importing this imports torch and diffusers.
"""

import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import diffusers.utils.logging
import torch
import transformers.utils.logging
from PIL import Image
from torch import nn

from handler import offload, stepcache
from handler.errors import NumericalError, SettingsError
from handler.families import schedulers
from handler.hardware import Hardware
from handler.preview import SHRINK, Preview, Projection, watched
from handler.reader import Reader
from handler.request import Recipe
from handler.spec import ModelSpec
from handler.weights import load_components


def quiet() -> None:
    """Silence the libraries' progress bars and advice; errors still show. Called before a family is imported."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="diffusers")  # its own use of what it deprecates
    for library in (transformers.utils.logging, diffusers.utils.logging):
        library.set_verbosity_error()
        library.disable_progress_bar()


def build(
    family: ModuleType, reader: Reader, hardware: Hardware, vae: Reader | None = None, mode: str = "resident"
) -> Any:
    """The pipeline that `reader` brings, on the device; with another autoencoder if `vae` brings one.

    `mode`, one of `fit.py`'s, says which of its models wait in host memory instead.
    """
    waiting = offload.WAITING[mode]
    components = load_components(reader, hardware, waiting)
    if vae:
        [components["vae"]] = load_components(vae, hardware).values()
        _check_latents(components["vae"], reader)
    _lay_out(components["vae"])
    pipeline = family.PIPELINE(**components)
    pipeline.set_progress_bar_config(disable=True)
    models = [part for name, part in components.items() if name.startswith(waiting) and isinstance(part, nn.Module)]
    offload.stream(models, hardware.device)
    return pipeline


def tile(pipeline: Any, tiles: bool) -> None:
    """Whether the VAE decodes in tiles, where it can: less memory, and pixels that differ slightly."""
    if hasattr(pipeline.vae, "use_tiling"):
        pipeline.vae.use_tiling = tiles


def _lay_out(vae: Any) -> None:
    """Channels last, as convolutions are fastest: a decode takes 0.6 to 0.8 of the time on a CPU. 3D ones stay."""
    if all(parameter.ndim < 5 for parameter in vae.parameters()):
        vae.to(memory_format=torch.channels_last)


def _check_latents(vae: Any, reader: Reader) -> None:
    """SettingsError if `vae` cannot decode the latents that the model's own autoencoder decodes."""
    own = json.loads((reader.source.folder / "vae" / "config.json").read_bytes())
    wanted, found = (config.get("z_dim", config.get("latent_channels")) for config in (own, vae.config))
    if wanted != found:
        raise SettingsError(
            f"KINDLING_VAE: this autoencoder has {found} latent channels, the model draws {wanted}.", "KINDLING_VAE"
        )


@torch.inference_mode()
def encode(family: ModuleType, pipeline: Any, recipe: Recipe, spec: ModelSpec) -> dict[str, Any]:
    """The arguments that tell `pipeline` what to draw."""
    arguments: dict[str, Any] = family.encode(pipeline, recipe, spec.text_tokens)
    return arguments


@torch.inference_mode()
def run(
    family: ModuleType,
    pipeline: Any,
    arguments: Mapping[str, Any],
    recipe: Recipe,
    spec: ModelSpec,
    on_step: Callable[[int, Preview], None],
    projection: Projection,
) -> Any:
    """Draw: a uint8 (height, width, 3) array of exactly `recipe.size`; NumericalError rather than a broken picture.

    Calls `on_step(done, preview)` after each step; an exception raised there ends the run. `projection` makes the
    previews and learns from the picture. The noise is drawn on the CPU, so a seed means the same on every device.
    """
    width, height = (-(-side // spec.multiple) * spec.multiple for side in recipe.size)
    small = -(-recipe.size[0] // SHRINK), -(-recipe.size[1] // SHRINK)

    def step_end(_: Any, step: int, __: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        done = -(-(step + 1) * recipe.steps // pipeline.num_timesteps)  # some schedulers take two turns a step
        on_step(done, lambda: _crop(projection.draw(heading(), (width, height)), small))
        return tensors

    images = {"image": [Image.fromarray(image.rgb) for image in recipe.images]} if recipe.images else {}
    with (
        _scheduler(pipeline, family, recipe, spec) as heading,
        stepcache.caching(pipeline, recipe.step_cache, recipe.guidance > 1),
    ):
        picture = pipeline(
            **arguments,
            **images,
            width=width,
            height=height,
            num_inference_steps=recipe.steps,
            generator=torch.Generator("cpu").manual_seed(recipe.seed),
            callback_on_step_end=step_end,
            output_type="pt",
        ).images[0]
    pixels = _pixels(picture)
    projection.learn(heading(), picture)
    return _crop(pixels, recipe.size)


@contextmanager
def _scheduler(pipeline: Any, family: ModuleType, recipe: Recipe, spec: ModelSpec) -> Iterator[Callable[[], Any]]:
    """Put the scheduler that `recipe` names into `pipeline` for one run; gives what `watched` gives."""
    loaded = pipeline.scheduler
    pipeline.scheduler = schedulers.make(family.SCHEDULERS, recipe.scheduler, loaded, spec.scheduler_config)
    try:
        with watched(pipeline.scheduler) as heading:
            yield heading
    finally:
        pipeline.scheduler = loaded


def _pixels(picture: torch.Tensor) -> torch.Tensor:
    """(3, height, width) from 0 to 1 -> uint8 (height, width, 3) on the device."""
    if not torch.isfinite(picture).all():
        raise NumericalError("The model produced NaN or infinite values; no picture was made.")
    pixels = (picture.float() * 255).round_().to(torch.uint8)
    if not pixels.any():
        raise NumericalError("The model produced an all-black picture.")
    return pixels.permute(1, 2, 0)


def _crop(pixels: torch.Tensor, size: tuple[int, int]) -> Any:
    """The middle of `pixels`, exactly `size` (width, height), as a contiguous numpy array."""
    width, height = size
    top, left = (pixels.shape[0] - height) // 2, (pixels.shape[1] - width) // 2
    return pixels[top : top + height, left : left + width].contiguous().cpu().numpy()
