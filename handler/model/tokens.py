"""How many tokens a request's prompts are to the model's tokenizer, how many are read, which words are unknown.

Where several text encoders read, the one that reads most of a prompt counts: FLUX.1's and Stable Diffusion 3.5's T5.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import takewhile
from types import ModuleType
from typing import Any

from handler.catalog.spec import ModelSpec
from handler.core.errors import OutOfRange
from handler.core.recipe import Recipe, Tokens
from handler.model.text.pieces import WEIGHING
from handler.model.text.unknown import unknown

READERS = ("tokenizer_3", "tokenizer_2", "tokenizer")  # the first there is: what reads most of a prompt comes last


def counted(family: ModuleType, pipeline: Any, recipe: Recipe, spec: ModelSpec) -> Tokens:
    """Those of the prompt and of a negative one that is used; none of a pipeline that has no tokenizer."""
    each = [tokens for _, tokens in _each(family, pipeline, recipe, spec)]
    strange = unknown(_tokenizer(pipeline), spec.lexicon, recipe) if each and spec.lexicon else ()
    return Tokens(sum(one.given for one in each), sum(one.read for one in each), strange)


def require_read(family: ModuleType, pipeline: Any, recipe: Recipe, spec: ModelSpec) -> None:
    """OutOfRange names both numbers if `recipe` is to be refused where not all of its prompts would be read."""
    if recipe.long_prompts != "refuse":
        return
    for name, tokens in _each(family, pipeline, recipe, spec):
        if tokens.read < tokens.given:
            told = f"it has {tokens.given} tokens, and {spec.id} reads {tokens.read} of them"
            raise OutOfRange(f"{name}: {told}; send a shorter one, or long_prompts 'cut'.", name)


def before(told: Callable[[str], Sequence[int]]) -> int:
    """How many tokens stand before the words of a prompt; `told` gives all tokens for one."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(told("a"), told("b"), strict=False)))


def chat(tokenizer: Any, text: str) -> list[int]:
    """All tokens for a prompt that is a person's turn in a conversation."""
    turn = [{"role": "user", "content": text}]
    return _ids(tokenizer, tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True))


def _each(family: ModuleType, pipeline: Any, recipe: Recipe, spec: ModelSpec) -> Iterator[tuple[str, Tokens]]:
    tokenizer = _tokenizer(pipeline)
    texts = {"prompt": recipe.prompt, "negative_prompt": recipe.negative_prompt}
    if tokenizer is None:
        return
    room = _room(family, pipeline, tokenizer, spec)
    unbounded = recipe.long_prompts == "chunked" or (recipe.reading and spec.family.rpartition(".")[2] in WEIGHING)
    for name, text in texts.items():
        given = len(_ids(tokenizer, text)) if text else 0
        yield name, Tokens(given, given if unbounded else min(given, room))


def _tokenizer(pipeline: Any) -> Any:
    found = next((each for name in READERS if (each := getattr(pipeline, name, None)) is not None), None)
    return getattr(found, "tokenizer", found)  # a processor has one inside


def _room(family: ModuleType, pipeline: Any, tokenizer: Any, spec: ModelSpec) -> int:
    """How many tokens of a prompt are read, beside those that are put around each."""
    if told := getattr(family, "room", None):
        return int(told(pipeline, spec.text_tokens))
    return spec.text_tokens - len(tokenizer("")["input_ids"])


def _ids(tokenizer: Any, text: str) -> list[int]:
    """Without what is put around every prompt, and with no word in the log of a long one."""
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids
