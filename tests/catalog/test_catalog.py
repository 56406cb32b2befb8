import importlib
import re

import pytest
from diffusers import DiffusionPipeline

from handler import MODELS, MODES, ImageRequest
from handler.catalog.models import find
from handler.core.errors import ModelNotFound, OutOfRange, Unsupported

ROWS = list(MODELS.values())


@pytest.mark.parametrize("spec", ROWS, ids=lambda s: s.id)
def test_rows_are_sound(spec) -> None:
    assert 1 <= spec.steps <= spec.max_steps <= 50
    assert all(side % spec.multiple == 0 for side in spec.size)
    assert spec.license.obligation.endswith(".")
    assert spec.embedded or re.fullmatch("([0-9a-f]{40})?", spec.revision)
    assert not spec.base or (spec.revision and spec.base.revision)  # whose files are mixed
    family = importlib.import_module(spec.family)
    assert set(spec.schedulers) <= set(family.SCHEDULERS)
    assert callable(family.encode)
    assert issubclass(family.PIPELINE, DiffusionPipeline)
    assert bool(spec.grafts) == bool(spec.base)


@pytest.mark.parametrize(
    ("model", "billions", "fp16_gb", "steps", "guidance", "commercial", "schedulers"),
    [  # RunInfra's table, and the schedulers it names
        ("flux-schnell", 12, 24, 4, 0.0, True, {"flow-match-euler"}),
        ("flux-dev", 12, 24, 28, 3.5, False, {"flow-match-euler"}),
        ("sd3.5-large", 8, 16, 28, 4.5, True, {"flow-match-euler"}),
        ("sdxl", 3.5, 7, 20, 5.0, True, {"dpm++", "euler-a", "heun", "ddim"}),
        ("sdxl-turbo", 3.5, 7, 1, 0.0, True, {"dpm++", "euler-a", "heun", "ddim"}),
        ("sdxl-lightning", 3.5, 7, 4, 0.0, True, {"dpm++", "euler-a", "heun", "ddim"}),
    ],
)
def test_the_seeds_values(
    model: str, billions: float, fp16_gb: float, steps: int, guidance: float, commercial: bool, schedulers: set[str]
) -> None:
    spec = MODELS[model]
    count = spec.parameters + (spec.other_parameters if spec.family.endswith("sdxl") else 0)  # of all of it
    assert (count, 2 * count) == pytest.approx((billions * 1e9, fp16_gb * 1e9), rel=0.01)
    assert (spec.steps, spec.guidance, spec.license.commercial) == (steps, guidance, commercial)
    assert schedulers <= set(spec.schedulers)


def test_names_are_unique_and_found_in_any_case() -> None:
    names = [name for spec in ROWS for name in spec.names] + list(MODES)
    assert len(names) == len(set(names))
    assert find("Black-Forest-Labs/flux.1-SCHNELL") is MODELS["flux-schnell"]
    assert find("realtime") is MODELS["flux-schnell"]
    assert find("quality") is MODELS["flux-dev"]
    with pytest.raises(ModelNotFound, match="spark"):
        find("dall-e-2")


def test_recipe_fills_what_is_open() -> None:
    recipe = MODELS["flux-dev"].recipe(ImageRequest(prompt="x"))
    assert (recipe.size, recipe.steps, recipe.guidance, recipe.scheduler) == ((1024, 1024), 28, 3.5, "flow-match-euler")
    seeds = {MODELS["spark"].recipe(ImageRequest(prompt="x")).seed for _ in range(20)}
    assert len(seeds) > 15
    assert MODELS["spark"].recipe(ImageRequest(prompt="x", seed=0)).seed == 0


@pytest.mark.parametrize(
    ("fields", "error", "param"),
    [
        ({"num_inference_steps": 9}, OutOfRange, "num_inference_steps"),
        ({"guidance_scale": 3.5}, OutOfRange, "guidance_scale"),
        ({"scheduler": "ddim"}, OutOfRange, "scheduler"),
        ({"negative_prompt": "blur"}, Unsupported, "negative_prompt"),
    ],
)
def test_what_a_distilled_model_refuses(fields, error, param) -> None:
    with pytest.raises(error, match="spark") as caught:
        MODELS["spark"].recipe(ImageRequest(prompt="x", **fields))
    assert caught.value.param == param


def test_harmless_values_are_no_refusal() -> None:
    recipe = MODELS["spark"].recipe(ImageRequest(prompt="x", guidance_scale=0.0, negative_prompt=""))
    assert recipe.guidance == 0
    assert MODELS["flux-dev"].recipe(ImageRequest(prompt="x", guidance_scale=0.0)).guidance == 0


QUALITY = {  # steps of spark and of flux-dev, and whether a worker's step cache is used
    "low": (2, 14, True), "medium": (3, 21, True), "auto": (4, 28, True), "standard": (4, 28, True),
    "high": (5, 35, False), "hd": (5, 35, False), "xhigh": (6, 42, False), "max": (8, 50, False), None: (4, 28, True),
}  # fmt: skip


@pytest.mark.parametrize("word", QUALITY)
def test_a_quality_is_steps_within_the_models_range(word) -> None:
    request = ImageRequest(prompt="x", quality=word)
    dev, (spark, steps, cached) = MODELS["flux-dev"], QUALITY[word]
    assert [MODELS["spark"].recipe(request).steps, dev.recipe(request).steps] == [spark, steps]
    for spec in MODELS.values():
        assert spec.min_steps <= spec.recipe(request).steps <= spec.max_steps
    assert (dev.recipe(request, served="on").step_cache is not None) == cached
    own = ImageRequest(prompt="x", quality=word, num_inference_steps=7, step_cache="on")
    assert dev.recipe(own, served="on").steps == 7
    assert dev.recipe(own, served="on").step_cache == dev.step_cache


@pytest.mark.parametrize("spec", MODELS.values(), ids=lambda spec: spec.id)
def test_a_scale_of_1_is_none_for_the_distilled_and_a_scale_for_others(spec) -> None:
    drawn = spec.recipe(ImageRequest(prompt="x", guidance_scale=1.0))
    assert drawn.guidance == (1 if spec.takes_guidance else 0)
