"""What a picture of ComfyUI's begins with, by the pipelines' own `prepare_latents`: they know shapes and packing.

All sums over latents go element by element, so it is no matter that some pipelines pack them.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch

from handler.core.recipe import Recipe
from handler.core.sampling import Sampling
from handler.model.families import edits
from handler.model.sampling import noise
from handler.model.sampling.scheduler import ComfyScheduler, Kept
from handler.model.sampling.solving import Solving


@contextmanager
def prepared(pipeline: Any, scheduler: ComfyScheduler, recipes: Sequence[Recipe]) -> Iterator[None]:
    """While this lasts, `pipeline`, one with `scheduler`, begins as ComfyUI begins `recipes`."""
    prepare = pipeline.prepare_latents

    def begun(*args: Any, **kwargs: Any) -> Any:
        asked = inspect.signature(prepare).bind(*args, **kwargs).arguments
        latents = _Latents(prepare, pipeline.vae, asked, scheduler)
        x = latents.begin(recipes).to(asked["dtype"])
        made = latents.prepared(asked)
        return (x, *made[1:]) if isinstance(made, tuple) else x

    pipeline.prepare_latents = begun
    try:
        yield
    finally:
        del pipeline.prepare_latents
        scheduler.end()


def _mode(encode: Callable[[Any], Any], vae: Any, device: Any, image: Any) -> Any:
    """The likeliest latents of `image`, not a sample of them."""
    found = encode(image.to(device, vae.dtype))
    return found.latents if hasattr(found, "latents") else found.latent_dist.mode()


def _once(latents_of: Callable[[Any], Any], known: dict[torch.device, Any]) -> Callable[..., Any]:
    """An encoder as diffusers has them, of one image however often it is asked; `known` is by where it is asked."""

    def encode(image: Any, **_: Any) -> Any:
        if image.device not in known:
            latents = next(iter(known.values())) if known else latents_of(image[:1])
            known[image.device] = latents.to(image.device)
        latents = known[image.device]
        return SimpleNamespace(latents=latents.expand(len(image), *latents.shape[1:]))

    return encode


class _Latents:
    """Of one run. `asked` is what the pipeline said to `prepare`."""

    def __init__(
        self, prepare: Callable[..., Any], vae: Any, asked: Mapping[str, Any], scheduler: ComfyScheduler
    ) -> None:
        self._prepare, self._vae, self._asked, self._scheduler = prepare, vae, asked, scheduler
        self._device = torch.device(asked["device"])
        self._from_image = "image" in asked
        self._known: dict[torch.device, Any] = {}
        self._encode = _once(partial(_mode, vae.encode, vae, self._device), self._known)

    def prepared(self, asked: Mapping[str, Any]) -> Any:
        """What the pipeline makes of `asked`, without a second look at its image and without drawing latents of it.

        The autoencoder keeps its type, which SDXL's changes to look, and leaves as the one asked for.
        """
        vae, own = self._vae, self._vae.dtype
        vae.encode = self._encode
        if self._known:
            vae.to = lambda *_, **__: vae
        try:
            return self._prepare(**asked)
        finally:
            del vae.encode
            vars(vae).pop("to", None)
            if vae.dtype != own:
                vae.to(own)

    def _made(self, batch: int, of: Callable[..., Any], generator: torch.Generator, device: torch.device) -> Any:
        """What the pipeline makes of image latents and noise by `of`, for `batch` pictures, in fp32."""
        known = {**self._asked, "batch_size": batch, "generator": generator, "dtype": torch.float32, "device": device}
        if "num_images_per_prompt" in known:
            known["num_images_per_prompt"] = 1
        if self._from_image:
            known["image"] = known["image"][:1].expand(batch, *known["image"].shape[1:])
        self._scheduler.add_noise = of
        made = self.prepared(known)
        return made[0] if isinstance(made, tuple) else made

    def _here(self, count: int, of: Callable[..., Any]) -> Any:
        return self._made(count, of, noise.seeded(0), self._device)

    def _drawn(self, sampling: Sampling, generator: torch.Generator) -> Any:
        """One picture's part of a draw for its batch, where the generator is."""
        drawn = self._made(sampling.batch, lambda _, drawn, *__: drawn, generator, generator.device)
        return drawn[sampling.index : sampling.index + 1]

    def _begun_with(self, recipes: Sequence[Recipe], after: int = 0) -> Any:
        """Noise of the CPU's generators, of each picture's seed and `after`."""
        seeds = [(recipe.seed + after, recipe.sampling) for recipe in recipes if recipe.sampling]
        return self._together([self._drawn(sampling, noise.seeded(seed)) for seed, sampling in seeds])

    def _together(self, drawn: Sequence[Any]) -> Any:
        return torch.cat(list(drawn)).to(self._device, non_blocking=True)

    def begin(self, recipes: Sequence[Recipe]) -> Any:
        """The first latents of all."""
        scheduler, sampling = self._scheduler, recipes[0].sampling
        assert sampling
        drawn = self._begun_with(recipes)
        if not sampling.add_noise:
            drawn = torch.zeros_like(drawn)
        picture = torch.zeros_like(drawn)
        if self._from_image:
            picture = self._here(len(recipes), lambda picture, *_: picture)
        x = scheduler.curve.noised(picture, drawn, scheduler.whole[0], first=True)
        solving = Solving(scheduler.curve, self._in_steps(recipes), sampling.eta, sampling.s_noise)
        return scheduler.begin(x, solving, self._kept(recipes, picture, drawn))

    def _in_steps(self, recipes: Sequence[Recipe]) -> noise.InSteps:
        sources = [self._source(recipe.seed, recipe.sampling) for recipe in recipes if recipe.sampling]
        return lambda sigma, following: self._together([source(sigma, following) for source in sources])

    def _source(self, seed: int, sampling: Sampling) -> noise.InSteps:
        draw, kind = partial(self._drawn, sampling), self._scheduler.sampler.noise
        if kind == "own":
            return noise.in_steps(draw, seed, self._device)
        device = self._device if kind == "tree on device" else torch.device("cpu")
        return noise.of_tree(draw, seed, device, self._scheduler.whole)

    def _kept(self, recipes: Sequence[Recipe], picture: Any, drawn: Any) -> Kept | None:
        [first, *_] = recipes
        if not (first.mask and first.sampling):
            return None
        height, width = self._asked["image"].shape[-2:]
        anew = 1 - torch.tensor(edits.kept_on(first, (width, height))).float()[None, None] / 255
        mask = self._here(len(recipes), partial(_fitted, anew))
        if first.sampling.sampler == "ddim":  # what stays has another noise then, whether any is added or not
            drawn = self._begun_with(recipes, after=1)
        return Kept(mask, picture, drawn)


def _fitted(mask: Any, picture: Any, *_: Any) -> Any:
    """`mask` (1, 1, height, width) in the shape of `picture`'s latents."""
    small = torch.nn.functional.interpolate(mask.to(picture.device), picture.shape[-2:], mode="bilinear")
    return small.reshape(1, *[1] * (picture.ndim - 3), *picture.shape[-2:]).expand_as(picture)
