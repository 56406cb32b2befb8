"""A recipe's two prompts, told to a family's encoders: what every family's `encode` is made of."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from handler.core.errors import OutOfRange, Unsupported
from handler.core.reading import Reading, Words
from handler.core.recipe import Recipe
from handler.model.text.embeddings import vectors
from handler.model.text.encoders import Encoder
from handler.model.text.pieces import Piece, pieces, plain

LONGEST = 20_000  # tokens of two prompts that were brought to one length: 259 chunks
Told = tuple[Any, ...]  # hidden states (1, tokens, width), and pooled (1, width) where there are
Encode = Callable[[Words], Told]


def sides(recipe: Recipe, guided: bool, encode: Encode, unsaid: str = "") -> tuple[Told, Told]:
    """What `encode` makes of the words for every encoder: the prompt's, and the negative one's, None if not `guided`.

    `unsaid` is the negative prompt where there is none. Zeros, as of ConditioningZeroOut, are as long as the prompt's.
    """
    reading = recipe.reading or Reading()
    told = encode(_filled(recipe.prompt, reading.prompts))
    if not guided:
        return told, (None,) * len(told)
    if reading.zeros:
        return told, tuple(part if part is None else torch.zeros_like(part) for part in told)
    negative = unsaid if recipe.negative_prompt is None else recipe.negative_prompt
    return told, encode(_filled(negative, reading.negative_prompts))


def _filled(prompt: str, words: Words) -> Words:
    return Words(**{name: prompt if own is None else own for name, own in words})


def spoken(recipe: Recipe, words: Words) -> str:
    """What a language model is told, which knows no weights. Unsupported where it should stop at another layer."""
    if not recipe.reading:
        return words.l or ""
    if recipe.reading.clip_skip is not None:
        raise Unsupported(f"{recipe.model} has no CLIP whose last layer could be set; leave clip_skip out.", "reading")
    return plain(words.l or "")


def unguided(recipe: Recipe) -> None:
    """Unsupported if `recipe` wants classifier-free guidance, of a model whose pipeline has none."""
    if recipe.sampling and recipe.sampling.cfg > 1:
        told = f"{recipe.model} is distilled, and its pipeline has no classifier-free guidance; send cfg 1"
        raise Unsupported(f"sampling: {told}.", "sampling")


def encoded(encoders: Sequence[Encoder], prompts: Sequence[str | None], recipe: Recipe) -> list[Told]:
    """Hidden states and pooled output of each encoder for its own prompt; of all with a window in as many chunks.

    InvalidValue names an embedding that fits none of them.
    """
    known = vectors(recipe.embeddings, encoders)
    apart = _whole if recipe.long_prompts == "chunked" else pieces
    each = [
        encoder.vocabulary.chunks(apart(prompt or ""), vectors_)
        for encoder, prompt, vectors_ in zip(encoders, prompts, known, strict=True)
    ]
    most = max(len(chunks) for chunks in each)
    found, skip = list[Told](), recipe.reading.clip_skip if recipe.reading else None
    for encoder, chunks in zip(encoders, each, strict=True):
        if encoder.vocabulary.window:
            chunks += encoder.vocabulary.chunks([], {}) * (most - len(chunks))
        found.append(encoder.encode(chunks, skip))
    return found


def _whole(prompt: str) -> list[Piece]:
    """A prompt whose parentheses and colons are text."""
    return [Piece(prompt)]


def of_one_length(read: Callable[[int], tuple[Told, Told]], least: int) -> tuple[Told, Told]:
    """What `read` gives for that many tokens at least; for as many as the longer side has, if one is longer.

    ComfyUI draws sides of different length one by one, and diffusers cannot.
    """
    found = read(least)
    lengths = {side[0].shape[1] for side in found if side[0] is not None}
    return found if len(lengths) == 1 else read(max(lengths))


def repeated(one: torch.Tensor, other: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Hidden states (1, tokens, width) of one length, the least that both divide, by repeating each.

    For cross-attention that changes nothing. OutOfRange if it is more than `LONGEST`.
    """
    if other is None:
        return one, None
    length = math.lcm(one.shape[1], other.shape[1])
    if length > LONGEST:
        tokens = f"{one.shape[1]} and {other.shape[1]} tokens"
        raise OutOfRange(f"prompt: it and the negative prompt, of {tokens}, are too long together.", "prompt")
    return one.repeat(1, length // one.shape[1], 1), other.repeat(1, length // other.shape[1], 1)
