"""How many tokens of a prompt are read: where the count says that it ends, what follows changes nothing."""

import importlib
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch

import tiny
from handler import MODELS, ImageRequest, Worker
from handler.api.recipes import settled
from handler.core.errors import OutOfRange, Unsupported
from handler.core.reading import Reading
from handler.core.recipe import Recipe, Tokens
from handler.model.tokens import counted

ONE_OF_EACH = {spec.family: spec.id for spec in MODELS.values() if not spec.embedded}.values()
LONG = "a (red:1.3) circle on [a] blue background, embedding:ink " * 12
WORDS = ("very ", "v")  # of which each is one token, of people's words and of bytes


@cache
def pipeline(model: str) -> Any:
    return tiny.build(MODELS[model])


def recipe(model: str, **fields: Any) -> Recipe:
    spec = MODELS[model]
    guided = {"guidance_scale": 3.0} if spec.takes_negative_prompt else {}
    return spec.recipe(ImageRequest(seed=1, width=64, height=64, **guided | fields))


def count(model: str, **fields: Any) -> Tokens:
    family = importlib.import_module(MODELS[model].family)
    return counted(family, pipeline(model), recipe(model, **fields), MODELS[model])


def told(model: str, **fields: Any) -> dict[str, Any]:
    """What the family makes of a prompt."""
    spec = MODELS[model]
    with torch.inference_mode():
        made: dict[str, Any] = importlib.import_module(spec.family).encode(
            pipeline(model), recipe(model, **fields), spec.text_tokens
        )
    return made


def same(one: Any, other: Any) -> bool:
    if isinstance(one, list):
        return all(map(same, one, other))
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else bool(one == other)


def alike(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(same(one[name], other[name]) for name in one)


@pytest.mark.parametrize("model", ONE_OF_EACH)
def test_as_many_as_are_said_are_read(model: str) -> None:
    word = next(word for word in WORDS if count(model, prompt=word * 3).given == 3)
    room = count(model, prompt=word * 900).read
    assert count(model, prompt=word * 900) == Tokens(900, room)
    assert count(model, prompt=word * room) == Tokens(room, room)
    last = [told(model, prompt=word * (room - 1) + end) for end in ("red", "blue")]
    assert not alike(*last)
    ends = [told(model, prompt=word * room + end) for end in ("", "red", "blue " * 9)]
    for name, value in ends[0].items():
        torch.testing.assert_close([each[name] for each in ends[1:]], [value] * 2)  # Qwen-Image's texts have no padding


def test_both_prompts_count() -> None:
    assert count("sdxl", prompt="red", negative_prompt="very " * 100) == Tokens(101, 76)
    assert count("sdxl", prompt="") == Tokens()
    family = importlib.import_module(MODELS["sdxl"].family)
    assert counted(family, object(), recipe("sdxl", prompt="x"), MODELS["sdxl"]) == Tokens()


@pytest.mark.parametrize(("model", "all_"), [("sdxl", True), ("sd3.5-large", True), ("qwen-image", False)])
def test_comfys_reading_cuts_what_a_language_model_reads(model: str, all_: bool) -> None:
    found = count(model, prompt="very " * 900, reading=Reading())
    assert (found.read == found.given) == all_


@pytest.mark.parametrize("model", ["sd1.5", "sdxl"])
@pytest.mark.parametrize("negative", [None, "", "blurry"])
def test_in_chunks_a_short_prompt_is_read_as_ever(model: str, negative: str | None) -> None:
    """To the bit, and what ComfyUI would take for weights or embeddings is text."""
    asked = {"prompt": "a (red:1.3) [circle], embedding:ink", "negative_prompt": negative}
    assert alike(told(model, **asked), told(model, **asked, long_prompts="chunked"))


@pytest.mark.parametrize("model", ["sd1.5", "sdxl"])
def test_in_chunks_all_of_a_long_prompt_is_read(model: str) -> None:
    cut, read = (told(model, prompt=LONG, long_prompts=how) for how in ("cut", "chunked"))
    assert (cut["prompt_embeds"].shape[1], read["prompt_embeds"].shape[1] % 77) == (77, 0)
    assert read["prompt_embeds"].shape == read["negative_prompt_embeds"].shape
    assert torch.equal(read["prompt_embeds"][:, :75], cut["prompt_embeds"][:, :75])  # their ends differ
    assert not alike(read, told(model, prompt=LONG + "very green", long_prompts="chunked"))
    found = count(model, prompt=LONG, long_prompts="chunked")
    assert found.given == found.read > 75
    with torch.inference_mode():
        assert pipeline(model)(**read, width=64, height=64, num_inference_steps=1, output_type="latent").images.any()


def test_who_says_nothing_has_the_workers_way() -> None:
    said, unsaid = ImageRequest(prompt="x", long_prompts="cut"), ImageRequest(prompt="x")
    assert settled(said, MODELS["sdxl"], "refuse") is said
    ways = [settled(unsaid, MODELS[model], "chunked").long_prompts for model in ("sdxl", "sd1.5", "flux-dev")]
    assert ways == ["chunked", "chunked", "cut"]
    assert recipe("sdxl", prompt="x", long_prompts="chunked").described()["long_prompts"] == "chunked"
    assert "long_prompts" not in recipe("sdxl", prompt="x", long_prompts="refuse").described()
    assert recipe("sdxl", prompt="x", long_prompts="chunked", reading=Reading()).long_prompts == "cut"
    with pytest.raises(Unsupported, match="flux-dev cannot read prompts in chunks"):
        recipe("flux-dev", prompt="x", long_prompts="chunked")


def test_a_long_prompt_is_refused_also_where_it_was_read_before(spark: Worker) -> None:
    asked = spark.spec.recipe(ImageRequest(prompt="very " * 40, seed=1, num_inference_steps=1))
    pixels, _ = spark.generate(asked)
    assert pixels.tokens == Tokens(40, 31)
    with pytest.raises(OutOfRange, match="prompt: it has 40 tokens, and spark reads 31 of them; send") as no:
        spark.generate(replace(asked, long_prompts="refuse"))
    assert no.value.param == "prompt"
    spark.generate(replace(asked, prompt="very " * 31, long_prompts="refuse"))
