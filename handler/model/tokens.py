"""How many tokens a request's prompts are, for the `usage` of answers: all, also those that a model cuts off."""

from typing import Any

from handler.core.recipe import Recipe

READERS = ("tokenizer_3", "tokenizer_2", "tokenizer")  # the first there is: what reads most of a prompt comes last


def counted(pipeline: Any, recipe: Recipe) -> int:
    """The tokens of the prompt, and of a negative one that is used; 0 of a pipeline that has no tokenizer."""
    found = next((each for name in READERS if (each := getattr(pipeline, name, None)) is not None), None)
    tokenizer = getattr(found, "tokenizer", found)  # a processor has one inside
    if tokenizer is None:
        return 0
    return sum(_length(tokenizer, text) for text in (recipe.prompt, recipe.negative_prompt) if text)


def _length(tokenizer: Any, text: str) -> int:
    """Without what is put around every prompt, and with no word in the log of a long one."""
    return len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
