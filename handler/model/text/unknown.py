"""Which words of a prompt a model does not know, where its row can say: one that has a token for each word it knows."""

import re
from collections.abc import Iterator
from itertools import islice
from typing import Any
from unicodedata import category

from handler.catalog.parts import Lexicon
from handler.core.quoting import LONGEST, brief
from handler.core.recipe import Recipe
from handler.model.text.pieces import pieces

MOST = 20  # words that are named
APOSTROPHES = "'\u2019"
APART = re.compile(r"[\0-&(-/:-@\[-`{-\x7f]+")  # ASCII's spaces, controls and punctuation, but for the apostrophe
SPELL = set("LMNS")  # Unicode's letters, what is put on them, numbers, and symbols, which emoji are
WHOLE = "\u2581"  # before the token of a whole word


def unknown(tokenizer: Any, lexicon: Lexicon, recipe: Recipe) -> tuple[str, ...]:
    """Up to `MOST` words of the prompt, each once, short and printable; none where a LoRA may have taught others."""
    return () if recipe.loras else tuple(islice(_strange(tokenizer, lexicon, _said(recipe)), MOST))


def _said(recipe: Recipe) -> str:
    """What FLUX's encoders are told, each its own; without weights and embeddings where ComfyUI's reading has them."""
    if not recipe.reading:
        return recipe.prompt
    words = recipe.reading.prompts
    told = dict.fromkeys(recipe.prompt if own is None else own for own in (words.t5, words.l))
    return " ".join(piece.text for prompt in told for piece in pieces(prompt) if not piece.embedding)


def _strange(tokenizer: Any, lexicon: Lexicon, prompt: str) -> Iterator[str]:
    seen = set[str]()
    for word in _words(prompt):
        lower = word.lower()
        if lower not in seen and not _known(tokenizer, lexicon, lower):
            yield brief(word)
        seen.add(lower)


def _known(tokenizer: Any, lexicon: Lexicon, word: str) -> bool:
    """Of a word such as "star's" what stands before the apostrophe counts, which is a token of its own."""
    bare = word.replace(APOSTROPHES[1], APOSTROPHES[0]).partition(APOSTROPHES[0])[0]
    known: bool = tokenizer.convert_tokens_to_ids(WHOLE + bare) != tokenizer.unk_token_id
    return known and bare not in lexicon.untaught


def _words(text: str) -> Iterator[str]:
    """What stands between spaces and punctuation, emoji too; nothing of it is invisible."""
    for part in dict.fromkeys(APART.split(text)):
        spelt = part if part.isascii() else "".join(c if _spells(c) else " " for c in part[:LONGEST])
        yield from filter(None, (word.strip(APOSTROPHES) for word in spelt.split()))


def _spells(character: str) -> bool:
    return character in APOSTROPHES or category(character)[0] in SPELL
