"""How noise becomes a picture in ComfyUI's words: `Sampling`, which a request may have in place of our own scheduler.

The numbers behind the names are in `model/sampling/`.
"""

from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator

Sampler = Literal[
    "euler",
    "euler_ancestral",
    "heun",
    "dpmpp_2m",
    "dpmpp_sde",
    "dpmpp_2m_sde",
    "ddim",
    "lcm",
    "res_multistep",
    "res_multistep_ancestral",
    "uni_pc",
    "uni_pc_bh2",
    "dpm_2",
    "dpm_2_ancestral",
    "dpmpp_2s_ancestral",
    "dpmpp_sde_gpu",
    "dpmpp_2m_sde_gpu",
    "dpmpp_2m_sde_heun",
    "dpmpp_2m_sde_heun_gpu",
    "dpmpp_3m_sde",
    "dpmpp_3m_sde_gpu",
    "ddpm",
    "ipndm",
    "gradient_estimation",
]
Schedule = Literal[
    "normal",
    "karras",
    "exponential",
    "sgm_uniform",
    "simple",
    "ddim_uniform",
    "beta",
    "linear_quadratic",
    "kl_optimal",
]
SAMPLERS: tuple[str, ...] = get_args(Sampler)
SCHEDULES: tuple[str, ...] = get_args(Schedule)
MAX_STEPS = 1000
MAX_OF_DENOISE = 10_000  # steps that a small `denoise` may make of those; ComfyUI's own most


class Sampling(BaseModel):
    """What ComfyUI's KSampler is told, beside model, prompts and seed.

    `denoise` d of n `steps` takes n steps, the last of int(n / d). Of the sigmas that come so, `start` and `end` say
    from which to which are used; `sigmas` gives them outright instead. A picture is the one at `index` of `batch` whose
    noise is drawn at once.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    sampler: Sampler = "euler"
    scheduler: Schedule = "normal"
    steps: int = Field(20, ge=1, le=MAX_STEPS)
    cfg: float = Field(1.0, ge=1, le=100, description="Classifier-free guidance; 1 is none.")
    denoise: float = Field(1.0, gt=0, le=1)
    start: int = Field(0, ge=0, le=MAX_STEPS, description="The step to begin with.")
    end: int | None = Field(None, ge=1, le=MAX_STEPS, description="The step to end before; None is the last.")
    sigmas: tuple[Annotated[float, Field(ge=0, le=1e6)], ...] = Field((), max_length=MAX_STEPS + 1)
    shift: float | None = Field(None, gt=0, le=100, description="Of a flow; None is ComfyUI's for the model.")
    shift_type: Literal["linear", "exponential"] = Field(
        "linear", description="Of ModelSamplingSD3 and AuraFlow, or of ModelSamplingFlux."
    )
    custom: bool = Field(
        False, description="As SamplerCustom takes the sigmas, with the last but one of every sampler."
    )
    eta: float = Field(1.0, ge=0, le=100, description="How much of the noise is drawn anew, where a sampler does.")
    s_noise: float = Field(1.0, ge=0, le=100, description="A factor on that noise.")
    add_noise: bool = Field(True, description="Whether noise is added before the first step.")
    leftover_noise: bool = Field(False, description="Whether the noise that is left at `end` stays.")
    batch: int = Field(1, ge=1, le=16, description="How many pictures' noise is drawn at once.")
    index: int = Field(0, ge=0, le=15, description="Which of them this is.")

    @model_validator(mode="before")
    @classmethod
    def _sigmas(cls, value: Any) -> Any:
        """JSON has lists, not tuples."""
        if isinstance(value, dict) and isinstance(value.get("sigmas"), list):
            return {**value, "sigmas": tuple(value["sigmas"])}
        return value

    @model_validator(mode="after")
    def _steps_left(self) -> Self:
        if self.taken < 1:
            raise ValueError("start and end leave no step to take")
        if self.sigmas and sorted(self.sigmas, reverse=True) != list(self.sigmas):
            raise ValueError("sigmas should fall")
        if 0 in self.sigmas[:-1]:
            raise ValueError("of sigmas only the last may be 0, where no noise is left")
        if self.steps / self.denoise >= MAX_OF_DENOISE + 1:
            raise ValueError("denoise is too small for so many steps")
        if self.index >= self.batch:
            raise ValueError("index should be below batch")
        return self

    @property
    def taken(self) -> int:
        """How many steps are taken, as asked; some schedules have one more or less."""
        last = len(self.sigmas) - 1 if self.sigmas else self.steps
        return min(last, self.end or last) - self.start

    @property
    def name(self) -> str:
        """Sampler and schedule in one word, as people write them."""
        return f"{self.sampler}/{'sigmas' if self.sigmas else self.scheduler}"
