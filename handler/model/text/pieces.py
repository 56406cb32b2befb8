"""A prompt taken apart as ComfyUI takes it: words with weights, and names of embeddings. Pure: no torch.

(word)            1.1 times, once more for each pair of parentheses around it
(word:1.3)        1.3, whatever is around it
\\( and \\)         parentheses of the text; square brackets always are
embedding:name    vectors instead of words, after a space, a newline or at the beginning of a piece
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

from handler.catalog.spec import ModelSpec
from handler.core.errors import InvalidValue
from handler.core.request import ImageRequest

HEAVIER = 1.1  # times, for parentheses without a number
DEEPEST = 32  # pairs of parentheses within each other; 1.1 ** 32 is 21
EMBEDDING = "embedding:"
WEIGHING = ("chroma", "flux", "sd15", "sd3", "sdxl")  # families whose encoders know weights and embeddings
ESCAPES = {"\\)": "\0\1", "\\(": "\0\2"}  # while parentheses are looked for


@dataclass(frozen=True, slots=True)
class Piece:
    """Text, or the name of an embedding, that is tokenised apart from what is beside it."""

    text: str
    weight: float = 1.0
    embedding: bool = False


def pieces(prompt: str) -> list[Piece]:
    """What a prompt with weights consists of. InvalidValue where parentheses go too deep, or an embedding has no name.

    As of ComfyUI 0.3.64, `sd1_clip.py`, also where parentheses are not in pairs.
    """
    for written, kept in ESCAPES.items():
        prompt = prompt.replace(written, kept)
    return [piece for text, weight in _weighted(prompt, 1.0, 0) for piece in _embeddings(_unescaped(text), weight)]


def plain(prompt: str) -> str:
    """A prompt whose encoder knows no weights: nothing is taken apart, but escaped parentheses are parentheses."""
    return prompt.replace("\\)", ")").replace("\\(", "(")


def embedded(request: ImageRequest, spec: ModelSpec) -> tuple[str, ...]:
    """The embeddings that a request's prompts name, each once; none where language models read them, or diffusers."""
    found = [piece.text for prompt in naming(request, spec) for piece in pieces(prompt) if piece.embedding]
    return tuple(dict.fromkeys(found))


def naming(request: ImageRequest, spec: ModelSpec) -> list[str]:
    """Those of the prompts of a request that may name any: what costs no time to tell."""
    if not request.reading or spec.family.rpartition(".")[2] not in WEIGHING:
        return []
    words = (request.reading.prompts, request.reading.negative_prompts)
    prompts = [request.prompt, request.negative_prompt, *(text for each in words for _, text in each)]
    return [prompt for prompt in prompts if prompt and EMBEDDING in prompt]


def _unescaped(text: str) -> str:
    for written, kept in ESCAPES.items():
        text = text.replace(kept, written[1])
    return text


def _weighted(text: str, weight: float, depth: int) -> Iterator[tuple[str, float]]:
    if depth > DEEPEST:
        raise InvalidValue(f"prompt: its parentheses go more than {DEEPEST} deep.", "prompt")
    for part in _parts(text):
        if len(part) >= 2 and part[0] + part[-1] == "()":
            inner, own = _own(part[1:-1])
            yield from _weighted(inner, weight * HEAVIER if own is None else own, depth + 1)
        else:
            yield part, weight


def _parts(text: str) -> Iterator[str]:
    """Outermost parentheses, with what they hold, and the text between."""
    start = depth = 0
    for found in re.finditer(r"[()]", text):
        at = found.start()
        if found[0] == "(":
            if depth == 0:
                yield text[start:at]
                start = at
            depth += 1
        else:
            depth -= 1
            if depth == 0:
                yield text[start : at + 1]
                start = at + 1
    yield text[start:]


def _own(text: str) -> tuple[str, float | None]:
    """What stands in parentheses, and the weight that it says, if it does."""
    before, _, number = text.rpartition(":")
    try:
        weight = float(number)
    except ValueError:
        return text, None
    return (before, weight) if before and math.isfinite(weight) else (text, None)


def _embeddings(text: str, weight: float) -> Iterator[Piece]:
    first, *others = re.split(f"[ \n]{EMBEDDING}", text)
    for part in (first, *(EMBEDDING + other for other in others)):
        if part.startswith(EMBEDDING):
            name, *rest = part.removeprefix(EMBEDDING).split() or [""]
            if not (bare := name.strip(",")):
                raise InvalidValue("prompt: embedding: should be followed by a name.", "prompt")
            yield Piece(bare, weight, embedding=True)
            left = " ".join(rest)
            part = left if bare == name else f"{name[len(bare) :]} {left}"
        if part:
            yield Piece(part, weight)
