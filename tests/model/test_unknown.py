"""Which words of a prompt spark does not know: none that its captions have, and any other, whatever is sent."""

import importlib
import random
import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from conftest import PATIENT
from transformers import AutoTokenizer

import tiny
from handler import MODELS, ImageRequest, Worker
from handler.core.quoting import QUOTED
from handler.core.reading import Reading, Words
from handler.core.recipe import Lora, Recipe
from handler.model.text.unknown import MOST, unknown
from handler.model.tokens import counted
from handler.volume.sources import EMBEDDED
from spark.scenes import KINDS, SPLITS, caption, sample_meaning
from spark.text import EXTRA_WORDS, perturb

SPARK = MODELS["spark"]
CAPTIONS = 3000  # 20,000 gave the tokenizer its words


@cache
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(EMBEDDED / "spark" / "tokenizer_2")


def recipe(prompt: str, **fields: Any) -> Recipe:
    return SPARK.recipe(ImageRequest(prompt=prompt, seed=1, **fields))


def found(prompt: str, **fields: Any) -> tuple[str, ...]:
    assert SPARK.lexicon
    return unknown(tokenizer(), SPARK.lexicon, recipe(prompt, **fields))


@cache
def captions() -> list[str]:
    rng = random.Random(11)
    meanings = [sample_meaning(rng, rng.choice(SPLITS), rng.choice(KINDS)) for _ in range(CAPTIONS)]
    return [caption(meaning, rng, everyday) for meaning in meanings for everyday in (True, False)]


def test_whatever_a_caption_says_is_known() -> None:
    assert [text for text in captions() if found(text) or found(text.upper())] == []


def test_of_a_perturbed_caption_the_stranger_alone_is_not() -> None:
    rng, named = random.Random(12), 0
    for text in captions():
        told = perturb(text, rng)
        strangers = set(told.split()) - set(text.split())
        assert set(found(told)) <= strangers
        named += bool(found(told))
    assert named > CAPTIONS // 20


def test_words_that_have_a_token_and_were_never_taught_are_not() -> None:
    assert SPARK.lexicon
    said = set(" ".join(captions()).lower().replace(".", " ").split())
    for word in SPARK.lexicon.untaught:
        assert word in EXTRA_WORDS
        assert word not in said
        assert found(f"a {word} circle") == (word,)
        assert found(f"a {word.upper()} circle") == (word.upper(),)


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("", ()),
        ("a cat in a hat", ("cat", "hat")),
        ("A Cat, a CAT and a cat!", ("Cat",)),
        ("two red circles (and 3 stars), on: a blue-gray background...", ()),
        ("5 red circles, 2 blue stars", ("5",)),
        ("The star's left; I'd like it \u2018red\u2019", ()),
        ("the cat\u2019s hat isn't red", ("cat\u2019s", "hat", "isn't")),
        ("a/cat_with+hat <pad> </s>", ("cat", "hat", "pad", "s")),
        ("\u201cred\u201d \u2014 \u732b\u3002\u72ac", ("\u732b", "\u72ac")),
        ("\U0001f431 and \u2764\ufe0f", ("\U0001f431", "\u2764\ufe0f")),
        ("\u0939\u093f\u0928\u094d\u0926\u0940 red", ("\u0939\u093f\u0928\u094d\u0926\u0940",)),
        ("cat\0dog \x1b[31mred \u202eevil\u200b", ("cat", "dog", "31mred", "evil")),
        ("\u2581red ' '' \u2019", ("\u2581red",)),
        ("(red:1.3) embedding:ink", ("1", "embedding", "ink")),
    ],
)
def test_words_are_what_stands_between_spaces_and_punctuation(prompt: str, words: tuple[str, ...]) -> None:
    assert found(prompt) == words


@pytest.mark.parametrize(
    "prompt",
    [
        "q" * 32_000,
        "\u732b" * 32_000,
        "\U0001f431" * 32_000,
        "\0" * 32_000,
        "e\u0301" * 16_000,
        "'" * 32_000,
        " ".join(f"w{i}" for i in range(5000)),
        "".join(map(chr, range(0xD800)))[:32_000],
        "".join(map(chr, range(0xE000, 0x15D00)))[:32_000],
    ],
    ids=["a word", "han", "emoji", "nul", "accents", "apostrophes", "many words", "unicode", "more unicode"],
)
def test_whatever_is_sent_few_words_are_named_and_all_can_be_printed(prompt: str) -> None:
    words = found(prompt)
    assert len(words) <= MOST
    assert all(len(word.encode("utf-8")) > 0 and len(word) <= QUOTED and word.isprintable() for word in words)


def test_comfyuis_weights_and_embeddings_are_no_words() -> None:
    assert found("a (red:1.3) ((cat)) embedding:ink, blue", reading=Reading()) == ("cat",)


def test_what_each_encoder_is_told_is_looked_at_and_nothing_else() -> None:
    own = Words(l="a dog", t5="a red (hat:1.2)")
    assert found("(" * 40 + "a cat" + ")" * 40, reading=Reading(prompts=own)) == ("hat", "dog")
    assert found("a cat", reading=Reading(prompts=Words(l="a dog"))) == ("cat", "dog")


def test_a_lora_may_have_taught_more() -> None:
    assert SPARK.lexicon
    taught = replace(recipe("a cat"), loras=(Lora("cats", 1.0, "0" * 64),))
    assert unknown(tokenizer(), SPARK.lexicon, taught) == ()


def test_peoples_own_weights_may_have_been_taught_more(tmp_path: Path) -> None:
    shutil.copy(EMBEDDED / "spark/transformer/diffusion_pytorch_model.safetensors", tmp_path / "mine.safetensors")
    mine = {"volume": tmp_path, "device": "cpu", "weights": ("mine.safetensors",)}
    with Worker.boot(PATIENT.model_copy(update=mine)) as worker:
        drawn, _ = worker.generate(replace(recipe("a cat", num_inference_steps=1), size=(64, 64)))
    assert (drawn.tokens.given > 0, drawn.tokens.unknown) == (True, ())


@pytest.mark.parametrize("model", [name for name in MODELS if name != "spark"])
def test_of_no_other_model_it_is_said(model: str) -> None:
    assert MODELS[model].lexicon is None


def test_others_are_not_asked() -> None:
    spec = MODELS["flux-schnell"]
    asked = spec.recipe(ImageRequest(prompt="a cat", seed=1))
    assert counted(importlib.import_module(spec.family), tiny.build(spec), asked, spec).unknown == ()


def test_a_picture_comes_with_them(spark: Worker) -> None:
    asked = replace(recipe("a cat", num_inference_steps=1), size=(64, 64))
    for _ in range(2):  # also where the prompt was read before
        assert spark.generate(asked)[0].tokens.unknown == ("cat",)
    assert spark.generate(replace(asked, prompt="a star"))[0].tokens.unknown == ()
