"""What a picture of ComfyUI's begins with, by the pipelines' own `prepare_latents`: they know shapes and packing.

All sums over latents go element by element, so it is no matter that some pipelines pack them.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch

from handler.core.recipe import Recipe
from handler.core.sampling import Sampling
from handler.model.sampling import noise
from handler.model.sampling.scheduler import ComfyScheduler, Kept
from handler.model.sampling.solving import Solving


@contextmanager
def prepared(pipeline: Any, scheduler: ComfyScheduler, recipes: Sequence[Recipe]) -> Iterator[None]:
    """While this lasts, `pipeline`, one with `scheduler`, begins as ComfyUI begins `recipes`."""
    prepare, encode = pipeline.prepare_latents, pipeline.vae.encode
    signature = inspect.signature(prepare)

    def begun(*args: Any, **kwargs: Any) -> Any:
        asked = signature.bind(*args, **kwargs)
        pipeline.vae.encode = _once(partial(_mode, encode, pipeline.vae))
        try:
            x = _Latents(prepare, asked, scheduler).begin(recipes).to(asked.arguments["dtype"])
            made = prepare(*args, **kwargs)  # last, for SDXL's leaves its autoencoder in the type asked for
        finally:
            del pipeline.vae.encode
        return (x, *made[1:]) if isinstance(made, tuple) else x

    pipeline.prepare_latents = begun
    try:
        yield
    finally:
        del pipeline.prepare_latents


def _mode(encode: Callable[[Any], Any], vae: Any, image: Any) -> Any:
    """The likeliest latents of `image`, not a sample, in the shape of what diffusers' encoders return."""
    found = encode(image.to(vae.dtype))
    return SimpleNamespace(latents=found.latents if hasattr(found, "latents") else found.latent_dist.mode())


def _once(encode: Callable[[Any], Any]) -> Callable[..., Any]:
    """The same for every image but the first, for they are the same."""
    found: list[Any] = []

    def known(image: Any, **_: Any) -> Any:
        found[:] = found or [encode(image[:1])]
        [first] = found
        return SimpleNamespace(latents=first.latents.expand(len(image), *first.latents.shape[1:]))

    return known


class _Latents:
    """Of one run. `asked` is what the pipeline said to `prepare`."""

    def __init__(self, prepare: Callable[..., Any], asked: inspect.BoundArguments, scheduler: ComfyScheduler) -> None:
        self._prepare, self._asked, self._scheduler = prepare, asked, scheduler
        self._device = torch.device(asked.arguments["device"]).type
        self._from_image = "image" in asked.arguments

    def _made(self, batch: int, generator: Any, of: Callable[..., Any]) -> Any:
        """What the pipeline makes of image latents and noise by `of`, for `batch` pictures, in fp32."""
        known = self._asked.arguments | {"batch_size": batch, "dtype": torch.float32, "generator": generator}
        if "num_images_per_prompt" in known:
            known["num_images_per_prompt"] = 1
        if self._from_image:
            known["image"] = known["image"][:1].expand(batch, *known["image"].shape[1:])
        self._scheduler.add_noise = of
        made = self._prepare(**known)
        return made[0] if isinstance(made, tuple) else made

    def _draw(self, sampling: Sampling, generator: torch.Generator) -> Any:
        """The noise of one picture, of that for its batch."""
        drawn = self._made(sampling.batch, generator, lambda _, drawn, *__: drawn)
        return drawn[sampling.index : sampling.index + 1]

    def begin(self, recipes: Sequence[Recipe]) -> Any:
        """The first latents of all."""
        scheduler, sampling = self._scheduler, recipes[0].sampling
        assert sampling
        drawn = torch.cat([self._first(recipe) for recipe in recipes])
        picture = torch.zeros_like(drawn)
        if self._from_image:
            picture = self._made(len(recipes), noise.seeded(0), lambda picture, *_: picture)
        x = scheduler.curve.noised(picture, drawn, scheduler.whole[0], first=True)
        in_steps = [self._in_steps(recipe) for recipe in recipes]
        solving = Solving(
            scheduler.curve, lambda *at: torch.cat([each(*at) for each in in_steps]), sampling.eta, sampling.s_noise
        )
        return scheduler.begin(x, solving, self._kept(recipes, picture, drawn))

    def _first(self, recipe: Recipe) -> Any:
        assert recipe.sampling
        drawn = self._draw(recipe.sampling, noise.seeded(recipe.seed))
        return drawn if recipe.sampling.add_noise else drawn * 0

    def _in_steps(self, recipe: Recipe) -> Callable[[torch.Tensor, torch.Tensor], Any]:
        assert recipe.sampling
        draw = partial(self._draw, recipe.sampling)
        kind = self._scheduler.sampler.noise
        if kind == "own":
            return noise.in_steps(draw, recipe.seed, self._device)
        device = self._device if kind == "tree on device" else "cpu"
        return noise.of_tree(draw, recipe.seed, device, self._scheduler.whole)

    def _kept(self, recipes: Sequence[Recipe], picture: Any, drawn: Any) -> Kept | None:
        [first, *_] = recipes
        if not first.mask:
            return None
        assert first.sampling
        anew = 1 - torch.from_numpy(first.mask.kept).float()[None, None] / 255
        mask = self._made(len(recipes), noise.seeded(0), partial(_fitted, anew))
        if first.sampling.sampler == "ddim":  # whose noise there is another in ComfyUI
            drawn = torch.cat([self._draw(first.sampling, noise.seeded(recipe.seed + 1)) for recipe in recipes])
        return Kept(mask, picture, drawn)


def _fitted(mask: Any, picture: Any, *_: Any) -> Any:
    """`mask` (1, 1, height, width) in the shape of `picture`'s latents."""
    small = torch.nn.functional.interpolate(mask.to(picture.device), picture.shape[-2:], mode="bilinear")
    return small.reshape(1, *[1] * (picture.ndim - 3), *picture.shape[-2:]).expand_as(picture)
