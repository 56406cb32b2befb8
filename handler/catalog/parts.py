"""What a row says of a model's parts: files grafted onto another's, sizes of what comes one by one, its few words."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Graft:
    """A file of the model's own repository, and its place among the files of the base: other weights, or a LoRA."""

    file: str
    path: str


@dataclass(frozen=True, slots=True)
class Streams:
    """Parameters of the text encoders; of the largest part of theirs, and of the denoiser's, that comes as one.

    `shared` are those of the text encoders that several GPUs can share; 0: transformers has no plan for that.
    """

    encoders: int = 0
    layer: int = 0
    block: int = 0
    shared: int = 0


@dataclass(frozen=True, slots=True)
class Lexicon:
    """Of a model whose tokenizer has a token for each word that it was taught: what those words are about.

    `untaught` has tokens too, but stands in none of the captions that the model was trained with.
    """

    about: str
    untaught: tuple[str, ...] = ()
