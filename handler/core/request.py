"""What a caller asks: `ImageRequest`, frozen and checked at birth. What will be drawn of it is in `core/recipe.py`.

After `ImageRequest.parse` no code sees a dict. Model-specific limits are not known
here: `catalog.ModelSpec.recipe` applies them.
"""

from collections.abc import Iterable
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    field_validator,
    model_validator,
)

from handler.core import errors
from handler.core.attachments import Images, Mask
from handler.core.loras import Loras
from handler.core.quality import Quality
from handler.core.reading import Reading
from handler.core.sampling import Sampling
from handler.core.stepcache import StepCacheSetting

MAX_SEED = 2**64 - 1
MAX_RANDOM_SEED = 2**31 - 1  # JSON's readers keep 53 bits
MIN_SIDE, MAX_SIDE = 64, 2048
MAX_PROMPT = 32_000
MAX_VALUES = 2048  # of a list, or fields of an object: more than any has, and each may be one more fault to tell
MAX_IMAGES = 10  # OpenAI's; as many as its KINDLING_MAX_N says a worker draws, and refuses more by itself

Format = Literal["png", "jpeg", "webp"]
MaskForm = Literal["alpha", "white", "black"]
LongPrompts = Literal["cut", "refuse", "chunked"]
Scheduler = Literal["flow-match-euler", "dpm++", "euler", "euler-a", "heun", "ddim"]

_ERROR_OF_TYPE = {  # pydantic's error type -> ours; a name not listed is a range
    "missing": errors.MissingParameter,
    "extra_forbidden": errors.UnknownParameter,
    "value_error": errors.InvalidValue,
}


def _format(value: object) -> object:
    """A format by its usual ending too."""
    return "jpeg" if value == "jpg" else value


class ImageRequest(BaseModel):
    """What a caller asks for. None means: the model's default. Sizes in pixels."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    prompt: str = Field(max_length=MAX_PROMPT, description="What the picture should show; it may be empty.")
    model: str | None = Field(None, max_length=200, description="A name of the served model; none means it.")
    n: int = Field(1, ge=1, description="How many pictures.")
    width: int | None = Field(None, ge=MIN_SIDE, le=MAX_SIDE)
    height: int | None = Field(None, ge=MIN_SIDE, le=MAX_SIDE)
    num_inference_steps: int | None = Field(None, ge=1, le=50)
    quality: Quality | None = Field(None, description="How many steps, where num_inference_steps does not say.")
    guidance_scale: float | None = Field(None, ge=0, le=20)
    scheduler: Scheduler | None = None
    seed: int | None = Field(
        None, ge=-1, le=MAX_SEED, description="None or -1 draws one at random; the answer names it."
    )
    negative_prompt: str | None = Field(
        None, max_length=MAX_PROMPT, description="What to avoid; None is the model's way."
    )
    sampling: Sampling | None = Field(
        None, description="ComfyUI's way of sampling, instead of scheduler, num_inference_steps and strength."
    )
    reading: Reading | None = Field(None, description="ComfyUI's way of reading prompts; without it diffusers'.")
    long_prompts: LongPrompts | None = Field(
        None,
        description="Where they are longer than the model reads: cut, refuse, or read in chunks. None: the worker's.",
    )
    step_cache: StepCacheSetting | None = Field(
        None, description="off, on, or the step cache's values; None is the worker's."
    )
    loras: Loras = Field((), description="LoRAs on the worker's volume by name, each with a weight: up to four.")
    images: Images = Field((), repr=False, description="Image files to work from: data URLs or base64.")
    mask: Mask | None = Field(
        None, repr=False, description="An image that says where the first of images is drawn anew; else that stays."
    )
    mask_form: MaskForm | None = Field(
        None,
        description="Drawn anew is what is transparent (alpha), white or black; None: alpha if any is, else white.",
    )
    strength: float | None = Field(None, gt=0, le=1, description="How much of an image is drawn anew.")
    stream: bool = Field(False, description="Answer as events, where the transport can.")
    partial_images: int = Field(0, ge=0, le=3, description="Small pictures of what is coming, where answers stream.")
    progress: bool = Field(False, description="An event for each step, where answers stream.")
    response_format: Literal["b64_json", "url"] = Field("b64_json", description="url: where it can be had.")
    output_format: Annotated[Format, BeforeValidator(_format)] = "png"
    output_compression: int = Field(100, ge=0, le=100, description="JPEG and WebP quality in percent.")
    _notes: tuple[str, ...] = PrivateAttr(())

    @field_validator("seed")
    @classmethod
    def _random(cls, seed: int | None) -> int | None:
        return None if seed == -1 else seed

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
        if self.sampling and (self.num_inference_steps, self.scheduler, self.strength) != (None, None, None):
            raise ValueError("sampling says all of scheduler, num_inference_steps and strength; send none of those")
        if self.strength is not None and not self.images:
            raise ValueError("strength says how much of an image is drawn anew; send the image too")
        return self

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences on what was sent and changes nothing here."""
        return self._notes

    def noting(self, notes: Iterable[str]) -> Self:
        """The same request with these notes."""
        same = self.model_copy()
        same._notes = tuple(notes)
        return same

    @classmethod
    def parse(cls, fields: dict[str, Any]) -> Self:
        """Check `fields`; None counts as not given. Raises the `RequestError` that names the first bad field."""
        given = {name: value for name, value in fields.items() if value is not None}
        if strange := next((name for name in given if name not in cls.model_fields), None):
            given = {name: value for name, value in given.items() if name in cls.model_fields} | {strange: None}
        for name, value in given.items():
            _require_few(value, name)
        try:
            return cls.model_validate(given)
        except ValidationError as error:
            raise translate(error) from None


def _require_few(value: object, name: str) -> None:
    """OutOfRange if a field has more values than any takes: to find fault with each of a million takes seconds."""
    if not isinstance(value, list | tuple | dict):
        return
    if len(value) > MAX_VALUES:
        raise errors.OutOfRange(f"{name}: Input should have at most {MAX_VALUES} values.", name)
    for inner in value.values() if isinstance(value, dict) else ():
        _require_few(inner, name)


def translate(error: ValidationError) -> errors.RequestError:
    """pydantic's first complaint as one of our errors, with a sentence and the field's name."""
    first = error.errors(include_url=False, include_input=False)[0]
    param = str(first["loc"][0])[:80] if first["loc"] else None
    message = first["msg"].removeprefix("Value error, ")
    if param is None:
        several = ("output_compression", "partial_images", "width", "mask", "sampling", "strength")
        param = next((name for name in several if name in message), None)
    place = ".".join(map(str, first["loc"]))[:80] if param in ("reading", "sampling") else param
    kind = _ERROR_OF_TYPE.get(first["type"])
    if kind is None:
        kind = errors.InvalidType if first["type"].endswith(("_type", "_parsing")) else errors.OutOfRange
    if kind is errors.UnknownParameter:
        message = f"Unknown parameter: '{place}'."
    elif kind is errors.MissingParameter:
        message = f"Missing required parameter: '{place}'."
    else:
        message = f"{message}." if message.startswith(f"{param} ") else f"{place}: {message}."
    return kind(message, param)
