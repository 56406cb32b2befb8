"""What a model family is: a module with one function and a few names, itself named by string in the catalogue.

    PIPELINE                            diffusers' own pipeline class
    IMAGE_TO_IMAGE, INPAINT             its classes for edits, where it has them and images are no references
    WITHOUT                             what its constructor is told of components that are never loaded, if it asks
    MASK_CELL                           with INPAINT: how many latents, along each side, a mask keeps or not as one
    DENOISER                            the pipeline's component whose repeated blocks are compiled
    SCHEDULERS                          which table of `schedulers.py` its models can use
    encode(pipeline, recipe, tokens)    the arguments that tell the pipeline what to draw; made once for n pictures
    room(pipeline, tokens)              how many of a prompt's tokens are read of so many, where a language model reads

What all families share is here: `build`, `run`. They call diffusers' pipelines and never rewrite their denoising
loops. Reached late: importing this imports torch and diffusers.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import nn

from handler.model.imports import lean

with lean():  # whoever imports a family first, be it a worker or a snapshot that has none yet
    import diffusers.utils.logging
    import transformers.models
    import transformers.utils.logging
    from transformers.utils.import_utils import is_torchao_available

    is_torchao_available()  # it remembers what it saw

from handler.catalog.spec import ModelSpec
from handler.core.errors import SettingsError
from handler.core.recipe import Preview, Recipe
from handler.model import offload, stepcache
from handler.model.compiling import modulation
from handler.model.families import constants, edits, finished, schedulers
from handler.model.families.autoencoders import compilable as compilable
from handler.model.families.autoencoders import prepare
from handler.model.families.borrowed import Components as Components
from handler.model.hardware import Hardware
from handler.model.loading.weights import load_components
from handler.model.preview import Projection, watched
from handler.model.sampling.latents import prepared
from handler.model.sampling.scheduler import scheduler_of
from handler.model.tensor_parallel import WHOLE, Shard
from handler.volume.listing import json_of
from handler.volume.reader import Reader

PADDED = 32  # tokens: what Z-Image's prompts are filled up to a multiple of, its transformer's SEQ_MULTI_OF


def quiet() -> None:
    """Silence the libraries' progress bars and advice; errors still show. Called before a family is imported."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="diffusers")  # its own use of what it deprecates
    for library in (transformers.utils.logging, diffusers.utils.logging):
        library.set_verbosity_error()
        library.disable_progress_bar()


def build(
    family: ModuleType,
    reader: Reader,
    hardware: Hardware,
    vae: Reader | None = None,
    mode: str = "resident",
    shard: Shard = WHOLE,
) -> Any:
    """The pipeline that `reader` brings, on the device; with another autoencoder if `vae` brings one.

    `mode`, one of `worker/memory.py`'s, says which of its models wait in host memory instead, `shard` which part of its
    text encoders is here.
    """
    waiting = offload.WAITING[mode]
    components = load_components(reader, hardware, waiting, shard)
    if vae:
        [components["vae"]] = load_components(vae, hardware).values()
        _check_latents(components["vae"], reader)
    prepare(components["vae"], hardware.device)
    if "unet" in components and hardware.device != "cpu":
        components["unet"].to(memory_format=torch.channels_last)  # as a GPU's convolutions want it
    pipeline = family.PIPELINE(**components | getattr(family, "WITHOUT", {}))
    pipeline.set_progress_bar_config(disable=True)
    models = [part for name, part in components.items() if name.startswith(waiting) and isinstance(part, nn.Module)]
    offload.stream(models, hardware.device)
    constants.settle(pipeline)
    return pipeline


@contextmanager
def tiled(pipeline: Any, tiles: bool) -> Iterator[None]:
    """Let the VAE decode in tiles for a while, where it can: less memory, and pixels that differ slightly."""
    before = getattr(pipeline.vae, "use_tiling", None)
    if before is None:
        yield
        return
    pipeline.vae.use_tiling = tiles
    try:
        yield
    finally:
        pipeline.vae.use_tiling = before


def _check_latents(vae: Any, reader: Reader) -> None:
    """SettingsError if `vae` cannot decode the latents that the model's own autoencoder decodes."""
    own = json_of(reader.source, "vae/config.json")
    wanted, found = (config.get("z_dim", config.get("latent_channels")) for config in (own, vae.config))
    if wanted != found:
        raise SettingsError(
            f"KINDLING_VAE: this autoencoder has {found} latent channels, the model draws {wanted}.", "KINDLING_VAE"
        )
    wanted, found = (_downscale(config) for config in (own, vae.config))
    if wanted != found and None not in (wanted, found):
        told = f"this autoencoder makes a latent of {found}x{found} pixels, the model's own of {wanted}x{wanted}."
        raise SettingsError(f"KINDLING_VAE: {told}", "KINDLING_VAE")


def _downscale(config: Mapping[str, Any]) -> int | None:
    """Pixels a side that become one latent, as diffusers' pipelines reckon it; None where `config` does not say."""
    if levels := config.get("block_out_channels"):
        return 1 << len(levels) - 1
    return 1 << len(halvings) if (halvings := config.get("temperal_downsample")) else None


@torch.inference_mode()
def encode(family: ModuleType, pipeline: Any, recipe: Recipe, spec: ModelSpec) -> dict[str, Any]:
    """The arguments that tell `pipeline` what to draw."""
    arguments: dict[str, Any] = family.encode(pipeline, recipe, spec.text_tokens)
    return arguments


def fitting(arguments: Mapping[int, Mapping[str, Any]]) -> list[int]:
    """Which pictures one run can draw, by the arguments of each: the first, and those whose prompts are as long."""
    first = next(iter(arguments.values()), {})
    return [i for i, each in arguments.items() if _shapes(each) == _shapes(first)]


def joined(arguments: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The arguments of pictures that fit together as those of one run."""
    first = arguments[0]
    if len(arguments) == 1:
        return dict(first)
    return {name: _together([each[name] for each in arguments]) for name in first}


def _shapes(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The shapes of tensors, and the other values: those are what alike pictures share."""
    return {name: _shape(value) for name, value in arguments.items()}


def _shape(value: Any) -> Any:
    """Of a list only how long its tensors are, filled up as Z-Image does: with another length it needs a mask, which
    some kernels of attention refuse, and compiled blocks do not know."""
    if isinstance(value, list):
        return [-(-len(each) // PADDED) for each in value if isinstance(each, torch.Tensor)]
    return list(value.shape) if isinstance(value, torch.Tensor) else value


def _together(values: list[Any]) -> Any:
    """Tensors as a batch, lists (of a tensor for each picture) as one list, anything else as it is."""
    if isinstance(values[0], torch.Tensor):
        return torch.cat(values)
    return [item for value in values for item in value] if isinstance(values[0], list) else values[0]


@torch.inference_mode()
def run(
    family: ModuleType,
    pipeline: Any,
    arguments: Mapping[str, Any],
    recipes: Sequence[Recipe],
    spec: ModelSpec,
    on_step: Callable[[int, Sequence[Preview]], None],
    projection: Projection,
    wait: Callable[[], None],
) -> list[Any]:
    """Draw alike pictures at once: uint8 (height, width, 3) arrays of their exact size, NumericalErrors for broken.

    Calls `on_step(done, previews)` when the device was told each step; an exception raised there ends the run. `wait`,
    called once, returns when it has done all. `projection` makes the previews and learns from the pictures.
    """
    recipe, pipeline = recipes[0], edits.pipeline_for(recipes[0], family, pipeline)
    width, height = spec.canvas(recipe.size)

    def step_end(_: Any, step: int, __: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        done = -(-(step + 1) * recipe.taken // pipeline.num_timesteps)  # some schedulers take two turns a step
        preview = partial(finished.preview, heading, projection, (width, height), recipe.size)
        on_step(done, [partial(preview, i) for i in range(len(recipes))])
        return tensors

    with (
        _scheduler(pipeline, family, recipes, spec) as heading,
        stepcache.caching(pipeline, recipe.step_cache, recipe.guidance > 1),
        modulation.ahead(pipeline),
    ):
        pictures = pipeline(
            **arguments,
            **edits.arguments(recipe, (width, height), edits.cell(recipe, family, pipeline)),
            width=width,  # SDXL's image-to-image takes the image's, whatever is said here
            height=height,
            num_inference_steps=len(pipeline.scheduler) if recipe.sampling else recipe.steps,
            generator=_noise(recipes),
            callback_on_step_end=step_end,
            output_type="pt",
        ).images
    return finished.finished(pictures, heading(), recipe, projection, wait)


def _noise(recipes: Sequence[Recipe]) -> Any:
    """Where each picture's noise comes from, as if it were alone: the CPU, so a seed means the same on every device."""
    generators = [torch.Generator("cpu").manual_seed(recipe.seed) for recipe in recipes]
    return generators if len(recipes) > 1 else generators[0]


@contextmanager
def _scheduler(
    pipeline: Any, family: ModuleType, recipes: Sequence[Recipe], spec: ModelSpec
) -> Iterator[Callable[[], Any]]:
    """Put the scheduler that `recipes` name into `pipeline` for one run; gives what `watched` gives."""
    loaded, recipe = pipeline.scheduler, recipes[0]
    kept_in_part = recipe.strength is not None and recipe.strength < 1 and not recipe.sampling
    differing = {**spec.scheduler_config, **(spec.edit_scheduler_config if kept_in_part else {})}
    beginning: AbstractContextManager[None] = nullcontext()
    if recipe.sampling:
        lent = scheduler_of(pipeline, {**loaded.config, **differing}, recipe.sampling)
        beginning = prepared(pipeline, lent, recipes)
    else:
        lent = schedulers.make(family.SCHEDULERS, recipe.scheduler, loaded, differing)
    vars(pipeline)["scheduler"] = lent  # a pipeline's own way notes its class too, for each picture anew
    try:
        with watched(lent) as heading, beginning:
            yield heading
    finally:
        vars(pipeline)["scheduler"] = loaded
