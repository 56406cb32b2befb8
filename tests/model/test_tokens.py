"""How many tokens prompts are."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from fakes import RECIPE
from handler.model.tokens import counted
from tiny import clip_tokenizer, t5_tokenizer


@pytest.mark.parametrize("make", [clip_tokenizer, t5_tokenizer])
def test_all_of_the_prompts_are_counted(make: Any, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = make()
    words = [counted(SimpleNamespace(tokenizer=tokenizer), replace(RECIPE, prompt="red " * n)) for n in (1, 2, 900)]
    assert words[1] - words[0] == (words[2] - words[0]) / 899 >= 1
    both = replace(RECIPE, prompt="red ", negative_prompt="red ")
    assert counted(SimpleNamespace(tokenizer=tokenizer), both) == 2 * words[0]
    assert not caplog.records


def test_the_tokenizer_that_reads_most_counts() -> None:
    recipe, t5 = replace(RECIPE, prompt="ultramarine"), t5_tokenizer()
    alone = counted(SimpleNamespace(tokenizer=t5), recipe)
    assert counted(SimpleNamespace(tokenizer=clip_tokenizer(), tokenizer_2=t5), recipe) == alone
    assert counted(SimpleNamespace(tokenizer=SimpleNamespace(tokenizer=t5)), recipe) == alone  # a processor
    assert counted(SimpleNamespace(tokenizer=None), recipe) == counted(SimpleNamespace(), recipe) == 0
