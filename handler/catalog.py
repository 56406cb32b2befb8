"""The models: one frozen row each, stating only what differs, and the modes that pick a row for you.

Rows name their family's code by string, so this table needs no torch. A new variant of a known family is one
row here. Values for the FLUX rows are RunInfra's published table; revisions are the hub's commits.
"""

import secrets
from dataclasses import dataclass

from handler.errors import ModelNotFound, OutOfRange, Unsupported
from handler.request import MAX_SEED, ImageRequest, Recipe


@dataclass(frozen=True, slots=True)
class License:
    """What using a model obliges you to. `gated`: the hub wants the licence accepted before a download."""

    id: str
    name: str
    commercial: bool
    obligation: str
    gated: bool = False


APACHE = License(
    "apache-2.0", "Apache License 2.0", commercial=True, obligation="Keep the licence text; commercial use is fine."
)
APACHE_GATED = License(APACHE.id, APACHE.name, commercial=True, obligation=APACHE.obligation, gated=True)
FLUX_DEV = License(
    "flux-1-dev-non-commercial",
    "FLUX.1 [dev] Non-Commercial License 1.0.1",
    commercial=False,
    obligation="Non-commercial use only: running it in a business needs a licence from Black Forest Labs.",
    gated=True,
)


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """One model. Sizes are (width, height) in pixels; `multiple` is the pixel grid its latents stand on."""

    id: str
    repository: str
    revision: str
    family: str
    license: License
    parameters: int
    vram_gb: float  # at FP16, weights resident
    steps: int
    max_steps: int
    guidance: float
    takes_guidance: bool
    size: tuple[int, int] = (1024, 1024)
    native_size: tuple[int, int] = (1024, 1024)
    multiple: int = 16
    text_tokens: int = 512
    schedulers: tuple[str, ...] = ("flow-match-euler",)
    takes_negative_prompt: bool = False
    embedded: bool = False
    aliases: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """Every name a request may use for this model."""
        return (self.id, self.repository, *self.aliases)

    def recipe(self, request: ImageRequest) -> Recipe:
        """Fill what `request` leaves open; raise the error that names the first thing this model cannot do."""
        self._check(request)
        given = (request.width, request.height)
        return Recipe(
            model=self.id,
            revision=self.revision,
            prompt=request.prompt,
            size=self.size if given[0] is None or given[1] is None else (given[0], given[1]),
            steps=request.num_inference_steps or self.steps,
            guidance=self.guidance if request.guidance_scale is None else request.guidance_scale,
            scheduler=request.scheduler or self.schedulers[0],
            seed=secrets.randbelow(MAX_SEED + 1) if request.seed is None else request.seed,
            negative_prompt=request.negative_prompt or "",
        )

    def _check(self, request: ImageRequest) -> None:
        if request.num_inference_steps and request.num_inference_steps > self.max_steps:
            raise OutOfRange(
                f"num_inference_steps: {self.id} takes at most {self.max_steps}, got {request.num_inference_steps}.",
                "num_inference_steps",
            )
        if request.guidance_scale and not self.takes_guidance:
            raise OutOfRange(
                f"{self.id} is distilled without guidance: leave guidance_scale out or send 0.", "guidance_scale"
            )
        if request.scheduler and request.scheduler not in self.schedulers:
            raise OutOfRange(
                f"{self.id} cannot use scheduler '{request.scheduler}'; it takes {', '.join(self.schedulers)}.",
                "scheduler",
            )
        if request.negative_prompt and not self.takes_negative_prompt:
            raise Unsupported(f"{self.id} cannot honour a negative prompt; leave it out.", "negative_prompt")


@dataclass(frozen=True, slots=True)
class Mode:
    """A choice of model and settings under a plain word."""

    id: str
    model: str
    promise: str


SPARK = ModelSpec(
    id="spark",
    repository="kindling/spark",
    revision="embedded",
    family="handler.families.flux",
    license=License("mit", "MIT License", commercial=True, obligation="None: made by and shipped with Kindling."),
    parameters=3_800_000,
    vram_gb=0.1,
    steps=4,
    max_steps=8,
    guidance=0.0,
    takes_guidance=False,
    size=(256, 256),
    native_size=(256, 256),
    multiple=32,
    text_tokens=32,
    embedded=True,
)
SCHNELL = ModelSpec(
    id="flux-schnell",
    repository="black-forest-labs/FLUX.1-schnell",
    revision="741f7c3ce8b383c54771c7003378a50191e9efe9",
    family="handler.families.flux",
    license=APACHE_GATED,
    parameters=12_000_000_000,
    vram_gb=24,
    steps=4,
    max_steps=4,
    guidance=0.0,
    takes_guidance=False,
    text_tokens=256,
    aliases=("flux.1-schnell",),
)
DEV = ModelSpec(
    id="flux-dev",
    repository="black-forest-labs/FLUX.1-dev",
    revision="3de623fc3c33e44ffbe2bad470d0f45bccf2eb21",
    family="handler.families.flux",
    license=FLUX_DEV,
    parameters=12_000_000_000,
    vram_gb=24,
    steps=28,
    max_steps=50,
    guidance=3.5,
    takes_guidance=True,
    aliases=("flux.1-dev",),
)
MODELS = {spec.id: spec for spec in (SPARK, SCHNELL, DEV)}
MODES = {
    mode.id: mode
    for mode in (
        Mode("realtime", "flux-schnell", "under 1.5 s on an L40S: 4 steps, distilled"),
        Mode("quality", "flux-dev", "3 to 5 s on an L40S: full step count and guidance"),
    )
}


def find(name: str) -> ModelSpec:
    """The row for a model id, alias, repository or mode, ignoring case; ModelNotFound otherwise."""
    wanted = MODES[name.lower()].model if name.lower() in MODES else name
    for spec in MODELS.values():
        if wanted.lower() in (known.lower() for known in spec.names):
            return spec
    raise ModelNotFound(f"There is no model '{name}'. Known: {', '.join([*MODELS, *MODES])}.", "model")
