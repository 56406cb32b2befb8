"""Pieces of a prompt as the tokens of one text encoder: in chunks as long as its window, and nothing is ever cut."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from handler.core.errors import InvalidValue, OutOfRange
from handler.model.text.pieces import Piece

LONG = 8  # tokens of a piece that is divided where a chunk ends; shorter ones go on in the next
MOST = 64  # chunks of one prompt: 4800 tokens. ComfyUI has no limit
MOST_TOKENS = 2048  # of an encoder without a window, whose attention takes memory by their square

Token = tuple[Any, float]  # a number of the vocabulary, or an embedding's vector, and its weight
Chunk = list[Token]


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """An encoder's tokenizer, the token that fills its chunks, and how these look.

    `window` is how long every chunk is; without one there is a single chunk, of `least` tokens or as many as there are.
    `ended` says whether that which weights are reckoned from, the empty one, has an end before its padding.
    """

    tokenizer: Any
    pad: int
    window: int = 0
    least: int = 0
    ended: bool = True

    @property
    def start(self) -> list[int]:
        """The token that chunks begin with, if there is one."""
        first = [*self.tokenizer("")["input_ids"]]
        return first[:-1]

    @property
    def end(self) -> int:
        """The token that ends them."""
        found: int = self.tokenizer("")["input_ids"][-1]
        return found

    def chunks(self, pieces: Sequence[Piece], vectors: Mapping[str, Any]) -> list[Chunk]:
        """`pieces` as chunks of one length; `vectors` has those (count, width) of each embedding by its name.

        OutOfRange if there are more than `MOST` chunks, or `MOST_TOKENS`.
        """
        groups = [self._tokens(piece, vectors) for piece in pieces]
        whole = [*chain.from_iterable(groups)]
        chunks = _divided(groups, self.window - len(self.start) - 1) if self.window else [whole]
        _require_bounds(len(chunks), 0 if self.window else len(chunks[0]))
        found = [[(token, 1.0) for token in self.start] + chunk + [(self.end, 1.0)] for chunk in chunks]
        return [self.padded(chunk, self.window or self.least) for chunk in found]

    def padded(self, chunk: Chunk, length: int) -> Chunk:
        """`chunk` with padding up to `length`."""
        return chunk + [(self.pad, 1.0)] * (length - len(chunk))

    def empty(self, length: int) -> list[int]:
        """The tokens of a chunk without words."""
        told = [*self.start, *([self.end] if self.ended else [])]
        return told + [self.pad] * (length - len(told))

    def _tokens(self, piece: Piece, vectors: Mapping[str, Any]) -> Chunk:
        if piece.embedding:
            if piece.text not in vectors:
                raise InvalidValue(f"prompt: there is no embedding '{piece.text:.80}' here.", "prompt")
            return [(vector, piece.weight) for vector in vectors[piece.text]]
        told = self.tokenizer(piece.text, add_special_tokens=False, verbose=False)
        return [(token, piece.weight) for token in told["input_ids"]]


def _divided(groups: Sequence[Chunk], room: int) -> list[Chunk]:
    """The tokens of `groups` in chunks of at most `room`; only long groups are divided. One chunk at least."""
    chunks: list[Chunk] = [[]]
    for group in groups:
        left, long = group, len(group) >= LONG
        while len(chunks[-1]) + len(left) > room:
            fits = room - len(chunks[-1]) if long else 0
            chunks[-1] += left[:fits]
            left = left[fits:]
            chunks.append([])
        chunks[-1] += left
    return chunks


def _require_bounds(chunks: int, tokens: int) -> None:
    if chunks > MOST:
        raise OutOfRange(f"prompt: it is read in chunks, of which it may have {MOST}, not {chunks}.", "prompt")
    if tokens > MOST_TOKENS:
        raise OutOfRange(f"prompt: it may have {MOST_TOKENS} tokens for this encoder, not {tokens}.", "prompt")
