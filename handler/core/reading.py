"""How ComfyUI reads prompts: `Reading`. Without one they are read as diffusers reads them.

Words may have weights, `(word:1.2)`, and name embeddings on the volume, `embedding:name`; what is longer than a text
encoder's window comes in chunks. What that means is in `model/text/`.
"""

from pydantic import BaseModel, ConfigDict, Field

Side = Field(ge=0, le=16384)


class Sizes(BaseModel):
    """What Stable Diffusion XL is told of the picture that its own may be a part of, in pixels."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    width: int = Side
    height: int = Side
    crop_w: int = Side
    crop_h: int = Side
    target_width: int = Side
    target_height: int = Side


class Words(BaseModel):
    """The prompts of single text encoders, where they differ from the request's: CLIP-L, CLIP-G and T5."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    l: str | None = None  # noqa: E741
    g: str | None = None
    t5: str | None = None


class Reading(BaseModel):
    """How the prompts of one request are read."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    clip_skip: int | None = Field(None, ge=-24, le=-1, description="The layer of CLIP to stop at; -1 is the last.")
    prompts: Words = Words()
    negative_prompts: Words = Words()
    zeros: bool = Field(False, description="Whether the negative prompt is zeros, as of ConditioningZeroOut.")
    sizes: Sizes | None = None
    negative_sizes: Sizes | None = None
