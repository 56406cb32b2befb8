"""What the host does for a picture beside the models' own code, counted: module trees are not walked."""

import importlib
import itertools
import logging
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import diffusers
import pytest
import torch
from torch import nn

import tiny
from handler import MODELS, ImageRequest, ModelSpec, Worker
from handler.model.families import constants
from handler.model.runner import Runner
from handler.model.stages import MARKS

FAMILIES = list({spec.family: spec for spec in MODELS.values() if not spec.embedded}.values())
CALLS = 3000  # that the model's thread makes of Python functions for a picture, without the models; measured: 700


def drawing(spec: ModelSpec, pipeline: Any) -> Runner:
    return Runner(spec, importlib.import_module(spec.family), pipeline, lambda _: False, MARKS["cpu"])


@pytest.fixture
def walked(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """Modules whose trees were walked from end to end."""
    seen: list[nn.Module] = []
    walk = nn.Module.named_modules

    def watched(self: nn.Module, *args: Any, **options: Any) -> Iterator[Any]:
        yield from walk(self, *args, **options)
        seen.append(self)

    monkeypatch.setattr(nn.Module, "named_modules", watched)
    return seen


@pytest.mark.parametrize("spec", FAMILIES, ids=lambda spec: spec.id)
def test_no_picture_walks_a_model(spec: ModelSpec, walked: list[nn.Module]) -> None:
    """From text; the first picture may, to learn what there is."""
    pipeline = tiny.build(spec)
    constants.settle(pipeline)
    draw = drawing(spec, pipeline).draw
    models = [part for part in pipeline.components.values() if isinstance(part, nn.Module)]
    models += [child for model in models for child in model.children()]
    recipe = spec.recipe(ImageRequest(prompt="x", width=64, height=64, seed=1, num_inference_steps=spec.min_steps))
    for counted in (False, True):
        walked.clear()
        [outcome] = draw([recipe], [lambda *_: None])
        assert not isinstance(outcome, Exception)
        assert not counted or not [module for module in walked if any(module is model for model in models)]


@pytest.mark.parametrize("spec", FAMILIES, ids=lambda spec: spec.id)
def test_another_picture_of_known_words_asks_no_tokenizer_and_notes_no_configuration(
    spec: ModelSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = tiny.build(spec)
    draw, loaded = drawing(spec, pipeline).draw, pipeline.scheduler
    recipe = spec.recipe(ImageRequest(prompt="x", width=64, height=64, seed=1, num_inference_steps=spec.min_steps))
    [first] = draw([recipe], [lambda *_: None])
    asked: list[str] = []
    for kind, name in [
        *((type(part), "__call__") for key, part in pipeline.components.items() if key.startswith("tokenizer")),
        (type(pipeline), "register_to_config"),
    ]:
        monkeypatch.setattr(kind, name, lambda *_, name=name, **__: asked.append(name))
    [second] = draw([recipe], [lambda *_: None])
    assert asked == []
    assert not isinstance(first, BaseException)
    assert not isinstance(second, BaseException)
    assert (second[0].tokens, pipeline.scheduler) == (first[0].tokens, loaded)
    assert second[0].rgb.tobytes() == first[0].rgb.tobytes()


@pytest.mark.parametrize("spec", FAMILIES, ids=lambda spec: spec.id)
def test_what_is_known_is_what_would_be_found(spec: ModelSpec) -> None:
    """Also when weights move or are cast."""
    pipeline, plain = tiny.build(spec), tiny.build(spec)
    constants.settle(pipeline)
    assert pipeline._execution_device == plain._execution_device
    for name, part in pipeline.components.items():
        if isinstance(part, nn.Module):
            other = getattr(plain, name)
            assert (part.device, part.dtype) == (other.device, other.dtype)
            part.to(torch.bfloat16), other.to(torch.bfloat16)
            assert part.dtype == other.dtype
            part.to("meta"), other.to("meta")
            assert part.device == other.device


def test_an_edit_runs_where_its_pipeline_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its pipeline is another, of the same models."""
    spec = MODELS["flux-dev"]
    pipeline = tiny.build(spec)
    constants.settle(pipeline)
    edit = diffusers.FluxImg2ImgPipeline(**pipeline.components)
    monkeypatch.setattr(diffusers.DiffusionPipeline, "device", None)
    assert edit._execution_device == torch.device("cpu")


def test_another_programs_pipelines_run_where_they_did() -> None:
    """Such as those that have no VAE, whatever was settled before."""
    constants.settle(tiny.build(MODELS["flux-dev"]))
    with torch.device("meta"):
        unet = diffusers.UNet2DModel()
    assert diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler())._execution_device == torch.device("meta")
    bare = tiny.build(MODELS["flux-dev"])
    bare.vae = None
    assert bare._execution_device == torch.device("cpu")


def test_an_unknown_diffusers_looks_itself(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(diffusers, "__version__", "0.99.0")
    spec = MODELS["flux-dev"]
    pipeline = tiny.build(spec)
    with caplog.at_level(logging.WARNING):
        constants.settle(pipeline)
    assert "0.99.0 is not known" in caplog.text
    assert pipeline.transformer not in constants._telling
    assert pipeline._execution_device == torch.device("cpu")


def test_the_lane_has_little_to_do_for_a_picture(spark: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python calls of the thread that launches kernels, with models that answer at once what they answered before."""
    recipe = spark.spec.recipe(ImageRequest(prompt="a red circle", seed=1, width=64, height=64))
    for model, name in ((spark._pipeline.transformer, "forward"), (spark._pipeline.vae, "decode")):
        answers: list[Any] = []
        monkeypatch.setattr(model, name, replayed(getattr(model, name), answers))
    spark.generate(recipe)
    calls = itertools.count()
    sys.setprofile(lambda frame, event, _: next(calls) if event == "call" else None)
    try:
        spark.generate(recipe)
    finally:
        sys.setprofile(None)
    assert next(calls) < CALLS


def replayed(function: Any, answers: list[Any]) -> Any:
    def answer(*args: Any, **options: Any) -> Any:
        if not answers:
            answers.append(function(*args, **options))
        return answers[0]

    return answer


class Importing(str):
    """A module's name, at whose sight another thread has imported one more."""

    def startswith(self, *prefixes: Any) -> bool:
        sys.modules[f"imported beside {self}"] = ModuleType("beside")
        return False


def test_other_threads_may_import_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in map(Importing, ("one", "another")):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
        monkeypatch.setitem(sys.modules, f"imported beside {name}", ModuleType("beside"))
        monkeypatch.delitem(sys.modules, f"imported beside {name}")
    monkeypatch.setattr(constants, "KNOWING", [("diffusers", "__version__", lambda known: known)])
    constants._replace.__wrapped__()
