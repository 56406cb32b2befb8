"""What will be drawn, with nothing left open, and what came out. What a caller asks is in `request.py`."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from handler.core.reading import Reading
from handler.core.request import Format, LongPrompts, MaskForm
from handler.core.sampling import Sampling
from handler.core.stepcache import StepCache

Preview = Callable[[], Any]  # makes a uint8 (height, width, 3) array, on the thread of the engine alone
OnStep = Callable[[int, Preview], None]  # gets how many steps are done; may raise to stop


MOST = 8
OPTIONAL = ("mask_form", "long_prompts", "loras", "sampling", "reading", "embeddings", "caller")


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
class Lora:
    """What is added to the model's weights for a picture, `weight` times: a file by name and SHA-256, and its path.

    To text encoders' weights it is added `clip_weight` times, where that is said.
    """

    name: str
    weight: float
    sha256: str
    path: Path = field(default=Path(), compare=False, repr=False)
    clip_weight: float | None = None

    def described(self) -> dict[str, Any]:
        """As JSON takes it; where the file lies is nobody's business."""
        apart = {} if self.clip_weight is None else {"clip_weight": self.clip_weight}
        return {"name": self.name, "weight": self.weight, **apart, "sha256": self.sha256}


@dataclass(frozen=True, slots=True)
class Embedding:
    """What a prompt means by `embedding:NAME`: a file of vectors by name and SHA-256, and its path."""

    name: str
    sha256: str
    path: Path = field(default=Path(), compare=False, repr=False)

    def described(self) -> dict[str, Any]:
        """As JSON takes it."""
        return {"name": self.name, "sha256": self.sha256}


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
    mask_form: MaskForm | None = None
    long_prompts: LongPrompts = "cut"
    loras: tuple[Lora, ...] = ()
    sampling: Sampling | None = None
    reading: Reading | None = None
    embeddings: tuple[Embedding, ...] = ()
    caller: bytes = field(default=b"", compare=False, repr=False)  # whose it is, where there are several

    @property
    def cfg(self) -> float:
        """The scale of classifier-free guidance, of models that have it; above 1 there is some."""
        return self.sampling.cfg if self.sampling else self.guidance

    @property
    def taken(self) -> int:
        """How many of the steps are taken."""
        if self.sampling:
            return self.sampling.taken
        return self.steps if self.strength is None else steps_taken(self.steps, self.strength)

    def described(self) -> dict[str, Any]:
        """The recipe as JSON takes it: of each image, and of the mask, a `mark`; `OPTIONAL` only where there are."""
        hashes = {"images": [mark(image.sha256) for image in self.images], "mask": self.mask and mark(self.mask.sha256)}
        plain = replace(self, images=(), mask=None, loras=(), sampling=None, reading=None, embeddings=())
        found = asdict(plain) | hashes
        optional = {
            "mask_form": self.mask_form,
            "long_prompts": self.long_prompts if self.long_prompts == "chunked" else None,
            "loras": [lora.described() for lora in self.loras],
            "sampling": self.sampling and self.sampling.model_dump(mode="json"),
            "reading": self.reading and self.reading.model_dump(mode="json"),
            "embeddings": [embedding.described() for embedding in self.embeddings],
        }
        kept = {name: value for name, value in optional.items() if value}
        return {name: value for name, value in found.items() if name not in OPTIONAL} | kept


def mark(sha256: str) -> str:
    """What is told of a caller's own file: most others differ in it, and no list of files leads from it to this one."""
    return sha256[:2]


def steps_taken(steps: int, strength: float) -> int:
    """An edit's share of the steps, which are the last ones; rounded down, but 0.7 of 10 are 7, and one at least."""
    return max(1, worth(steps, strength))


def worth(steps: int, strength: float) -> int:
    """How many whole steps there are in that share."""
    return int(steps * strength + 1e-6)


@dataclass(frozen=True, slots=True)
class Tokens:
    """How many a recipe's prompts are to the model's tokenizer, and how many of them it reads.

    `unknown` are words of the prompt that the model does not know, where its row has a lexicon: those that come first.
    """

    given: int = 0
    read: int = 0
    unknown: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Pixels:
    """One finished picture before encoding: `rgb` is uint8 (height, width, 3), C-contiguous.

    `batch` is how many pictures were drawn at once, `tokens` are the prompts'. Of several workers, `worker` drew it.
    """

    rgb: Any
    recipe: Recipe
    batch: int = 1
    tokens: Tokens = Tokens()
    worker: Any = None


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
    tokens: Tokens = Tokens()
    peak_bytes: int = 0  # of memory, that this process has needed so far: the GPU's where there is one
