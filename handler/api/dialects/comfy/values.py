"""What flows along a graph's links, as small frozen values: ComfyUI's types, where no node is executed."""

from dataclasses import dataclass, replace
from typing import Any, Self

from handler.api.dialects.comfy.plan import Before, Pixels
from handler.catalog.spec import ModelSpec
from handler.core.reading import Sizes, Words
from handler.core.request import ImageRequest

PLAIN = Words()
Loras = tuple[tuple[str, float], ...]  # names, as a request says them, with what each is multiplied by


@dataclass(frozen=True, slots=True)
class Model:
    """A MODEL: whose, what is added to its weights, and the shift of its flow where a node sets one."""

    spec: ModelSpec
    loras: Loras = ()
    shift: float | None = None
    shift_type: str = "linear"


@dataclass(frozen=True, slots=True)
class Clip:
    """A CLIP: the text encoders of `spec`; `skip` is the layer to stop at."""

    spec: ModelSpec
    loras: Loras = ()
    skip: int | None = None


@dataclass(frozen=True, slots=True)
class Vae:
    """A VAE, that of `spec`."""

    spec: ModelSpec


@dataclass(frozen=True, slots=True, eq=False)
class Conditioning:
    """A CONDITIONING: a text, how it is read, and what is to be seen beside it."""

    text: str
    clip: Clip
    words: Words = PLAIN
    guidance: float | None = None
    zeros: bool = False
    sizes: Sizes | None = None
    references: tuple[Any, ...] = ()  # uint8 (height, width, 3) each


@dataclass(frozen=True, slots=True, eq=False)
class Picture:
    """An IMAGE that is there: each frame is uint8 (height, width, 3)."""

    frames: tuple[Any, ...]

    @property
    def rgb(self) -> Any:
        return self.frames[0]

    @property
    def size(self) -> tuple[int, int]:
        """Width and height."""
        return self.rgb.shape[1], self.rgb.shape[0]


@dataclass(frozen=True, slots=True, eq=False)
class Mask:
    """A MASK: uint8 (height, width), 255 is ComfyUI's 1, where a picture is to be drawn anew."""

    grey: Any

    @property
    def size(self) -> tuple[int, int]:
        """Width and height."""
        return self.grey.shape[1], self.grey.shape[0]


@dataclass(frozen=True, slots=True, eq=False)
class Latent:
    """A LATENT before a sampler: `n` empty ones of a size in pixels, or a picture with, maybe, a mask on it.

    The picture is there, or `drawn` by another sampler.
    """

    width: int
    height: int
    n: int = 1
    picture: Any = None  # uint8 (height, width, 3)
    mask: Mask | None = None
    drawn: "Drawn | None" = None

    @property
    def empty(self) -> bool:
        """Whether there is no picture."""
        return self.picture is None and self.drawn is None


@dataclass(frozen=True, slots=True, eq=False)
class Drawn:
    """A LATENT after a sampler, and the IMAGE of it: what will be drawn, by which node, and what is done to it then."""

    request: ImageRequest
    sampler: str
    size: tuple[int, int]
    after: tuple[Pixels, ...] = ()
    before: Before | None = None

    @property
    def passes(self) -> int:
        """How many samplers led to it."""
        found, before = 1, self.before
        while before:
            found, before = found + 1, before.before
        return found

    def then(self, change: Pixels, size: tuple[int, int]) -> Self:
        """With one more change, that makes pictures of `size`."""
        return replace(self, after=(*self.after, change), size=size)


Image = Picture | Drawn


@dataclass(frozen=True, slots=True)
class Noise:
    """A NOISE; None is no noise."""

    seed: int | None


@dataclass(frozen=True, slots=True)
class Sampler:
    """A SAMPLER by name, and how much noise its steps add."""

    name: str
    eta: float = 1.0
    s_noise: float = 1.0


@dataclass(frozen=True, slots=True)
class Sigmas:
    """SIGMAS: a schedule by name, and which part of it; or themselves."""

    scheduler: str = "normal"
    steps: int = 0
    denoise: float = 1.0
    start: int = 0
    end: int | None = None
    exact: tuple[float, ...] = ()

    @property
    def count(self) -> int:
        """How many steps they are."""
        if self.exact:
            return len(self.exact) - 1
        return (self.steps if self.end is None else min(self.end, self.steps)) - self.start

    @property
    def leaves_noise(self) -> bool:
        """Whether they end above 0."""
        return self.exact[-1] > 0 if self.exact else self.end is not None

    @property
    def to_zero(self) -> "Sigmas":
        """The same, with 0 for the last where they are numbers; of a schedule's part its sampler is told that."""
        return replace(self, exact=(*self.exact[:-1], 0.0)) if self.exact else self


@dataclass(frozen=True, slots=True, eq=False)
class Guider:
    """A GUIDER: a model, what it is to draw, and what not."""

    model: Model
    positive: Conditioning
    negative: Conditioning | None = None
    cfg: float = 1.0
