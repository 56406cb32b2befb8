"""What a row of the catalogue says about a model, and what it makes of a request. The rows are in `models.py`."""

import math
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from handler.catalog.ceilings import FEWEST_TO_SKIP, check_steps
from handler.catalog.licenses import License
from handler.catalog.parts import Graft, Lexicon, Streams
from handler.core import quality
from handler.core.errors import OutOfRange, RequestError, SettingsError, Unsupported
from handler.core.recipe import Embedding, Lora, Mask, Recipe, Reference, worth
from handler.core.request import MAX_RANDOM_SEED, MAX_SIDE, ImageRequest, LongPrompts
from handler.core.stepcache import StepCache, StepCacheSetting

SEEN_PIXELS = 1024 * 1024  # of a reference image: FLUX.2 looks at no more


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """One model. Sizes are (width, height) in pixels; `multiple` is the pixel grid its latents stand on."""

    id: str
    repository: str
    family: str
    license: License
    parameters: int  # of what denoises, counted on diffusers' own classes
    steps: int
    revision: str = ""  # the hub's commit; empty: the one that the volume has, see `volume/revisions.py`
    max_steps: int = 50
    min_steps: int = 1
    guidance: float = 0.0  # 0: distilled without, and none can be asked for
    other_parameters: int = 0  # of the text encoders and the VAE
    streams: Streams = field(default_factory=Streams)
    work_gb: float = 3.0  # for activations and the libraries; an assumption, not yet measured on a GPU
    size: tuple[int, int] = (1024, 1024)
    multiple: int = 16
    text_tokens: int = 512
    lexicon: Lexicon | None = None  # of a model that knows some words alone
    schedulers: tuple[str, ...] = ("flow-match-euler",)  # the default first
    scheduler_config: Mapping[str, Any] = field(default_factory=dict)  # what differs from the repository's
    takes_negative_prompt: bool = False  # so it has classifier-free guidance, above a scale of 1
    strength: float = 0.6  # of an edit that says none, as diffusers has it for most; with a mask it is 1
    edit_scheduler_config: Mapping[str, Any] = field(default_factory=dict)  # the same, where an image is kept in part
    max_images: int = 0  # reference images an edit may have; 0: it draws one image anew instead, in part
    masked_pixels: int = MAX_SIDE**2  # most of an edit with a mask; 0: none has one
    step_cache: StepCache | None = None  # what "on" means; None where few steps or a U-Net leave nothing to skip
    step_cache_blocks: int = 0  # that Fn and Bn may come to: those of its shortest list
    fp8_source: str = ""  # who publishes it in FP8, with how alike it draws where they say so; empty: nobody known
    variant: str = ""  # of the weight files to fetch, such as "fp16" where the plain ones are fp32
    base: "ModelSpec | None" = None  # whose files these are, but for the grafts
    grafts: tuple[Graft, ...] = ()
    embedded: bool = False
    aliases: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """Every name a request may use for this model."""
        return (self.id, self.repository, *self.aliases)

    @property
    def reads_chunks(self) -> bool:
        """Whether CLIP alone reads its prompts, and so reads any number of tokens in chunks of its window."""
        return self.family.rpartition(".")[2] in ("sd15", "sdxl")

    @property
    def splits(self) -> bool:
        """Whether diffusers has a plan for several GPUs to draw one picture of it: its class's `_cp_plan`."""
        return self.family.rpartition(".")[2] in ("flux", "flux2", "flux2_klein", "flux2_tiny", "qwen_image")

    @property
    def takes_guidance(self) -> bool:
        """Whether a guidance scale changes anything."""
        return self.guidance > 0

    def recipe(
        self,
        request: ImageRequest,
        images: tuple[Reference, ...] = (),
        served: StepCacheSetting = "off",
        mask: Mask | None = None,
        loras: tuple[Lora, ...] = (),
        embeddings: tuple[Embedding, ...] = (),
    ) -> Recipe:
        """Fill what `request` leaves open; raise the error that names the first thing this model cannot do.

        `images`, `mask`, `loras`, `embeddings` are the request's, decoded and found; `served` is KINDLING_STEP_CACHE.
        """
        self.validate(request, served)
        size = self._size(request, images)
        if mask and math.prod(self.canvas(size)) > self.masked_pixels:
            most, got = self.masked_pixels, "x".join(map(str, size))
            raise OutOfRange(f"size: with a mask {self.id} draws at most {most} pixels, not {got}.", "size")
        return Recipe(
            model=self.id,
            revision=self.revision,
            prompt=request.prompt,
            size=size,
            steps=self._steps(request),
            guidance=self._guidance(request),
            scheduler=request.sampling.name if request.sampling else request.scheduler or self.schedulers[0],
            seed=secrets.randbelow(MAX_RANDOM_SEED + 1) if request.seed is None else request.seed,
            negative_prompt=self._negative_prompt(request),
            images=images,
            step_cache=self._cache(request, served),
            strength=self._strength(request),
            mask=mask,
            mask_form=request.mask_form if mask else None,
            long_prompts=self._long_prompts(request),
            loras=loras,
            sampling=request.sampling,
            reading=request.reading,
            embeddings=embeddings,
        )

    def canvas(self, size: tuple[int, int]) -> tuple[int, int]:
        """What is drawn for a picture of `size`: that, up to the grid."""
        width, height = (-(-side // self.multiple) * self.multiple for side in size)
        return width, height

    def looks_at(self, request: ImageRequest) -> int:
        """How many pixels of the first image of `request` matter."""
        return SEEN_PIXELS if self._strength(request) is None else MAX_SIDE**2

    @property
    def edit_schedulers(self) -> tuple[str, ...]:
        """Those that can start from an image: along a flow, diffusers' DPM++ cannot."""
        flows = "flow-match-euler" in self.schedulers
        return tuple(name for name in self.schedulers if not (flows and name == "dpm++"))

    def _strength(self, request: ImageRequest) -> float | None:
        """How much of the request's first image is drawn anew; None where there is none, or all are references."""
        if not request.images or (self.max_images and request.mask is None):
            return None
        if request.sampling:
            return request.sampling.denoise
        return request.strength or (self.strength if request.mask is None else 1.0)

    def _steps(self, request: ImageRequest) -> int:
        """As asked; else the model's, or more if an edit would not take one of them."""
        if request.sampling:
            return request.sampling.taken
        usual = quality.steps(request.quality, self.steps, self.min_steps, self.max_steps)
        return request.num_inference_steps or max(usual, self._fewest(self._strength(request) or 1.0))

    def _fewest(self, strength: float) -> int:
        """How few steps there may be, that this strength is worth one of them; all there may be if it never is."""
        return next((steps for steps in range(1, self.max_steps) if worth(steps, strength)), self.max_steps)

    def _size(self, request: ImageRequest, images: tuple[Reference, ...]) -> tuple[int, int]:
        """As asked; else the first image's shape, at most at the model's area; else the model's size.

        An image that is drawn anew in part keeps its own size if it can, a reference image comes to the grid.
        """
        if request.width is not None and request.height is not None:
            return request.width, request.height
        if not images:
            return self.size
        height, width = images[0].rgb.shape[:2]
        scale = min(1.0, (self.size[0] * self.size[1] / (width * height)) ** 0.5, MAX_SIDE / max(width, height))
        return self._rounded(width * scale, height * scale, self._strength(request) is None)

    def _rounded(self, width: float, height: float, to_grid: bool) -> tuple[int, int]:
        grid = self.multiple
        if to_grid:
            return round(width / grid) * grid, round(height / grid) * grid
        size = round(width), round(height)
        fits = math.prod(self.canvas(size)) <= self.masked_pixels
        return size if fits else (int(width / grid) * grid, int(height / grid) * grid)

    def _guidance(self, request: ImageRequest) -> float:
        """As asked, else the model's. A scale of 1 guides nowhere, and so is 0 to a model without guidance."""
        asked = request.guidance_scale
        return self.guidance if asked is None or (asked == 1 and not self.takes_guidance) else asked

    def _negative_prompt(self, request: ImageRequest) -> str | None:
        """As asked, if there is guidance for it to work through; an empty one is not the same as none."""
        if request.sampling:
            return request.negative_prompt if request.sampling.cfg > 1 else None
        return request.negative_prompt if self.takes_negative_prompt and self._guidance(request) > 1 else None

    def _long_prompts(self, request: ImageRequest) -> LongPrompts:
        """As asked; a `Reading` has chunks of its own."""
        asked = request.long_prompts or "cut"
        return "cut" if request.reading and asked == "chunked" else asked

    def _cache(self, request: ImageRequest, served: StepCacheSetting) -> StepCache | None:
        off = request.sampling or quality.whole(request.quality)
        return self.caching(request.step_cache or ("off" if off else served))

    def caching(self, asked: StepCacheSetting) -> StepCache | None:
        """The step cache that `asked` means for this model, or the error that says why it cannot be."""
        if asked == "off":
            return None
        if self.step_cache is None:
            few = self.max_steps < FEWEST_TO_SKIP
            why = f"at most {self.max_steps} steps are too few to skip any" if few else "it works on transformers only"
            raise Unsupported(f"{self.id} cannot have a step cache: {why}.", "step_cache")
        cache = self.step_cache if asked == "on" else asked
        if cache.Fn + cache.Bn > self.step_cache_blocks:
            most, got = self.step_cache_blocks, cache.Fn + cache.Bn
            raise OutOfRange(f"step_cache: Fn and Bn of {self.id} may add up to {most}, got {got}.", "step_cache")
        return cache

    def served_caching(self, asked: StepCacheSetting) -> StepCache | None:
        """What requests get that say nothing; SettingsError if this model cannot have it."""
        try:
            return self.caching(asked)
        except RequestError as error:
            raise SettingsError(f"KINDLING_STEP_CACHE: {error.message}", "KINDLING_STEP_CACHE") from None

    def validate(self, request: ImageRequest, served: StepCacheSetting = "off") -> None:
        """Raise the error that names the first thing this model cannot do; needs no decoded images."""
        steps, guidance = self._steps(request), self._guidance(request)
        check_steps(self, request, steps)
        if guidance and not self.takes_guidance:
            raise OutOfRange(
                f"{self.id} is distilled without guidance: leave guidance_scale out, or send 0 or 1.", "guidance_scale"
            )
        if request.scheduler and request.scheduler not in self.schedulers:
            raise OutOfRange(
                f"{self.id} cannot use scheduler '{request.scheduler}'; it takes {', '.join(self.schedulers)}.",
                "scheduler",
            )
        if request.negative_prompt and not (self.takes_negative_prompt or request.sampling):
            raise Unsupported(f"{self.id} cannot honour a negative prompt; leave it out.", "negative_prompt")
        if request.negative_prompt and guidance <= 1 and not request.sampling:
            raise Unsupported(
                "A negative prompt works through guidance: send guidance_scale above 1.", "negative_prompt"
            )
        if request.long_prompts == "chunked" and not self.reads_chunks:
            raise Unsupported(f"{self.id} cannot read prompts in chunks; send 'cut' or 'refuse'.", "long_prompts")
        if self._cache(request, served) and served == "off":
            raise Unsupported("This worker skips no steps; start it with KINDLING_STEP_CACHE=on.", "step_cache")
        if request.images:
            self._check_edit(request)

    def _check_edit(self, request: ImageRequest) -> None:
        most, got, strength = self.max_images or 1, len(request.images), self._strength(request)
        if got > most:
            takes = f"takes at most {most} images" if most > 1 else "edits one image"
            raise OutOfRange(f"images: {self.id} {takes}, got {got}.", "images")
        if request.mask is not None and not self.masked_pixels:
            raise Unsupported(f"{self.id} works from whole images; leave mask out.", "mask")
        if strength is None:
            if request.strength is not None:
                needs = " without a mask" if self.masked_pixels else ""
                raise Unsupported(f"{self.id} works from whole images{needs}; leave strength out.", "strength")
            return
        if request.sampling:
            if self.max_images:
                raise Unsupported(f"With sampling {self.id} takes images to look at, but no mask.", "mask")
            return
        if request.scheduler and request.scheduler not in self.edit_schedulers:
            takes = ", ".join(self.edit_schedulers)
            raise OutOfRange(f"An edit cannot use scheduler '{request.scheduler}'; it takes {takes}.", "scheduler")
