"""The values that travel: what a caller asks (`ImageRequest`), what will be drawn (`Recipe`), what came out.

Frozen and checked at birth; after `ImageRequest.parse` no code sees a dict. Model-specific limits are not known
here: `catalog.ModelSpec.recipe` applies them.
"""

import base64
from dataclasses import asdict, dataclass, field, replace
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from handler import errors
from handler.stepcache import Choice, StepCache

MAX_SEED = 2**31 - 1
MIN_SIDE, MAX_SIDE = 64, 2048
MAX_PROMPT = 32_000
MAX_IMAGES = 4
MAX_REFERENCES = 16

Format = Literal["png", "jpeg", "webp"]
Scheduler = Literal["flow-match-euler", "dpm++", "euler", "euler-a", "heun", "ddim"]

_ERROR_OF_TYPE = {  # pydantic's error type -> ours; a name not listed is a range
    "missing": errors.MissingParameter,
    "extra_forbidden": errors.UnknownParameter,
    "value_error": errors.InvalidValue,
}


def _files(value: object) -> tuple[bytes, ...]:
    """The bytes of each image file of a list; counted before any is decoded."""
    if not isinstance(value, list | tuple):
        raise PydanticCustomError("list_type", "Input should be a list of images")
    if len(value) > MAX_REFERENCES:
        most = {"most": MAX_REFERENCES, "got": len(value)}
        raise PydanticCustomError("too_long", "Input should have at most {most} images, got {got}", most)
    return tuple(_file(item, f"image {i}") for i, item in enumerate(value, 1))


def _mask(value: object) -> bytes:
    return _file(value, "the file")


def _file(value: object, name: str) -> bytes:
    """From a data URL or bare base64. Nothing is ever fetched."""
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str):
        raise PydanticCustomError("string_type", "{name} should be a string", {"name": name})
    if value.startswith(("http:", "https:")):
        raise ValueError(f"{name} is a URL, which is never fetched; send a data URL or base64")
    head, comma, body = value.partition(",")
    if comma and not (head.startswith("data:image/") and head.endswith(";base64")):
        raise ValueError(f"{name} should begin with data:image/...;base64, if it is a data URL")
    try:
        return base64.b64decode(body if comma else value, validate=True)
    except ValueError:
        raise ValueError(f"{name} is not valid base64") from None


class ImageRequest(BaseModel):
    """What a caller asks for. None means: the model's default. Sizes in pixels."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    prompt: str = Field(min_length=1, max_length=MAX_PROMPT, description="What the picture should show.")
    model: str | None = Field(None, max_length=200, description="A model id or alias; None is the one being served.")
    n: int = Field(1, ge=1, le=MAX_IMAGES, description="How many pictures.")
    width: int | None = Field(None, ge=MIN_SIDE, le=MAX_SIDE)
    height: int | None = Field(None, ge=MIN_SIDE, le=MAX_SIDE)
    num_inference_steps: int | None = Field(None, ge=1, le=50)
    guidance_scale: float | None = Field(None, ge=0, le=20)
    scheduler: Scheduler | None = None
    seed: int | None = Field(None, ge=0, le=MAX_SEED, description="None draws one at random; the answer names it.")
    negative_prompt: str | None = Field(None, max_length=2000, description="What to avoid; None is the model's way.")
    step_cache: Choice | None = Field(None, description="off, on, or the step cache's values; None is the worker's.")
    images: Annotated[
        tuple[bytes, ...],
        BeforeValidator(_files),
        Field(repr=False, description="PNG, JPEG or WebP files to work from: data URLs or base64."),
    ] = ()
    mask: Annotated[bytes, BeforeValidator(_mask)] | None = Field(
        None, repr=False, description="A PNG, transparent where the first image is to be drawn anew; else it stays."
    )
    strength: float | None = Field(None, gt=0, le=1, description="How much of an image is drawn anew.")
    stream: bool = Field(False, description="Answer as events, where the transport can.")
    partial_images: int = Field(0, ge=0, le=3, description="Small pictures of what is coming, where answers stream.")
    response_format: Literal["b64_json", "url"] = Field("b64_json", description="url needs an object store.")
    output_format: Format = "png"
    output_compression: int = Field(100, ge=0, le=100, description="JPEG and WebP quality in percent.")

    @model_validator(mode="after")
    def _whole_sizes(self) -> Self:
        if (self.width is None) != (self.height is None):
            raise ValueError("width and height must be given together")
        if self.output_format == "png" and self.output_compression != 100:
            raise ValueError("output_compression below 100 needs output_format jpeg or webp; PNG is lossless")
        if self.partial_images and self.n > 1:
            raise ValueError("partial_images are of one picture; send n 1")
        if self.mask is not None and not self.images:
            raise ValueError("mask says where an image is drawn anew; send the image too")
        if self.strength is not None and not self.images:
            raise ValueError("strength says how much of an image is drawn anew; send the image too")
        return self

    @classmethod
    def parse(cls, fields: dict[str, Any]) -> Self:
        """Check `fields`; None counts as not given. Raises the `RequestError` that names the first bad field."""
        try:
            return cls.model_validate({name: value for name, value in fields.items() if value is not None})
        except ValidationError as error:
            raise translate(error) from None


def translate(error: ValidationError) -> errors.RequestError:
    """pydantic's first complaint as one of our errors, with a sentence and the field's name."""
    first = error.errors(include_url=False, include_input=False)[0]
    param = str(first["loc"][0])[:80] if first["loc"] else None
    message = first["msg"].removeprefix("Value error, ")
    if param is None:
        several = ("output_compression", "partial_images", "width", "mask", "strength")
        param = next((name for name in several if name in message), None)
    kind = _ERROR_OF_TYPE.get(first["type"])
    if kind is None:
        kind = errors.InvalidType if first["type"].endswith(("_type", "_parsing")) else errors.OutOfRange
    if kind is errors.UnknownParameter:
        message = f"Unknown parameter: '{param}'."
    elif kind is errors.MissingParameter:
        message = f"Missing required parameter: '{param}'."
    else:
        message = f"{message}." if message.startswith(f"{param} ") else f"{param}: {message}."
    return kind(message, param)


@dataclass(frozen=True, slots=True, eq=False)
class Reference:
    """An image to work from: `rgb` is uint8 (height, width, 3), `sha256` that of the file it came in."""

    rgb: Any
    sha256: str


@dataclass(frozen=True, slots=True, eq=False)
class Mask:
    """Where an image stays: `kept` is uint8 (height, width), 255 where it does, 0 where it is drawn anew."""

    kept: Any
    sha256: str


@dataclass(frozen=True, slots=True)
class Recipe:
    """All of a picture that a caller can choose, with nothing left open. `size` is (width, height) in pixels.

    `strength` is how much of the first image is drawn anew; None where there is none, or all are references.
    """

    model: str
    revision: str
    prompt: str
    size: tuple[int, int]
    steps: int
    guidance: float
    scheduler: str
    seed: int
    negative_prompt: str | None = None  # an empty one is not none: SDXL and Qwen-Image draw other pictures of it
    images: tuple[Reference, ...] = ()
    step_cache: StepCache | None = None
    strength: float | None = None
    mask: Mask | None = None

    @property
    def taken(self) -> int:
        """How many of the steps are taken."""
        return self.steps if self.strength is None else steps_taken(self.steps, self.strength)

    def described(self) -> dict[str, Any]:
        """The recipe as JSON takes it: of each image, and of the mask, its SHA-256."""
        hashes = {"images": [image.sha256 for image in self.images], "mask": self.mask and self.mask.sha256}
        return asdict(replace(self, images=(), mask=None)) | hashes


def steps_taken(steps: int, strength: float) -> int:
    """An edit's share of the steps, which are the last ones; rounded down, but 0.7 of 10 are 7."""
    return int(steps * strength + 1e-6)


@dataclass(frozen=True, slots=True)
class Pixels:
    """One finished picture before encoding: `rgb` is uint8 (height, width, 3), C-contiguous.

    `batch` is how many pictures were drawn at once.
    """

    rgb: Any
    recipe: Recipe
    batch: int = 1


Drawn = tuple[Pixels, dict[str, float]]  # a picture, and the seconds of each stage


@dataclass(frozen=True, slots=True)
class Picture:
    """One encoded picture and how it was made; `stages` are seconds per stage, `plan` is COMPILED or EAGER and why.

    `url` is where an object store has it too; `undelivered` says why it has not, though that was wanted.
    """

    data: bytes
    format: Format
    recipe: Recipe
    plan: str = ""
    stages: dict[str, float] = field(default_factory=dict)
    url: str = field(default="", repr=False)
    undelivered: str = ""
