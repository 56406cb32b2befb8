"""Modulation for several steps at once: each step gets its own, whatever the scheduler; else what diffusers makes."""

from collections.abc import Callable
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import PATIENT, unwarmed

import tiny
from handler import MODELS, ImageRequest, Worker
from handler.api.references import Reference
from handler.core.errors import Cancelled
from handler.model.compiling import modulation
from handler.model.compiling.modulation import ROWS, Modulations, Run

LAYER = {"flux-dev": "norm1.linear", "sd3.5-large": "norm1.linear", "qwen-image": "img_mod.1"}
STEPS = 5
ROUNDING = 1e-5  # one step's timestep instead of its neighbour's makes far more
EVERY = pytest.mark.parametrize("model", LAYER)


class Watched:
    """A tiny worker, uncompiled, whose first block notes its modulation, and what it would be without looking ahead."""

    def __init__(self, model: str, volume: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.worker, self.products, self.plain = worker_of(model, volume), 0, []
        self.found: list[Any] = []
        self.wanted: list[Any] = []
        transformer = self.worker._pipeline.transformer
        self.embedder, self.modulations = transformer.time_text_embed, Modulations()
        monkeypatch.setattr(transformer, "modulations", self.modulations, raising=False)
        block, embed, multiply = transformer.transformer_blocks[0], Run.embed, torch.nn.functional.linear

        def counted(*given: Any, **weights: Any) -> Any:
            self.products += 1
            return multiply(*given, **weights)

        with monkeypatch.context() as patch:
            patch.setattr(torch.nn.functional, "linear", counted)
            names = [f"{LAYER[model]}.{kind}" for kind in ("weight", "bias")]
            self.make = self.modulations.maker({"weights": names}, dict(block.named_parameters()))

        def embedded(run: Run, *given: Any) -> Any:
            self.plain[:] = [run._plain(*given)]
            return embed(run, *given)

        def note(module: Any, args: Any, kwargs: Any) -> None:
            layer = module.get_submodule(LAYER[model])
            self.found.append(self.make(kwargs["temb"]))
            self.wanted.append(layer(torch.nn.functional.silu(self.plain[0])))

        monkeypatch.setattr(Run, "embed", embedded)
        self.remove = block.register_forward_pre_hook(note, with_kwargs=True).remove

    def draw(self, **fields: Any) -> Any:
        self.products, self.found, self.wanted = 0, [], []
        images = fields.pop("images", ())
        asked = {"prompt": "stars", "width": 64, "height": 64, "seed": 1, "num_inference_steps": STEPS} | fields
        recipe = self.worker.spec.recipe(ImageRequest(**asked, images=tuple(b"x" for _ in images)), images)
        return self.worker.generate(recipe)[0].rgb.astype(int)

    def is_right(self) -> bool:
        pairs = zip(self.found, self.wanted, strict=True)
        return len(self.found) > 0 and all((one - other).norm() < ROUNDING * other.norm() for one, other in pairs)


@pytest.fixture(scope="module")
def volume(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return tmp_path_factory.mktemp("volume")


@cache
def worker_of(model: str, volume: Any) -> Worker:
    tiny.write(MODELS[model], volume)
    with unwarmed():
        return Worker.boot(PATIENT.model_copy(update={"model": model, "volume": volume, "compile": "off"}))


@pytest.fixture
def watch(volume: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    made: list[Watched] = []

    def watched(model: str) -> Watched:
        made.append(Watched(model, volume, monkeypatch))
        return made[-1]

    yield watched
    for each in made:
        each.remove()


@EVERY
def test_each_step_gets_its_own_modulation(model: str, watch: Callable[[str], Watched]) -> None:
    """With every scheduler, and where an image is drawn in its last steps alone; unproven, then proven."""
    watched = watch(model)
    image = Reference(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8), "")
    edit = {"images": (image,), "strength": 0.6}
    asked: list[dict[str, Any]] = [{"scheduler": name} for name in MODELS[model].schedulers]
    for fields in [*asked, edit]:
        pictures = [watched.draw(**fields), watched.draw(**fields)]
        assert watched.is_right()
        assert watched.products < len(watched.found)
        assert (pictures[0] == pictures[1]).all()
    assert len(watched.modulations.proven) == len(asked) + 1


@EVERY
def test_weights_are_multiplied_once_a_picture(model: str, watch: Callable[[str], Watched]) -> None:
    watched = watch(model)
    watched.draw(scheduler="flow-match-euler")
    assert watched.products == 1
    assert watched.modulations.run is None


@EVERY
def test_longer_runs_look_ahead_again(model: str, watch: Callable[[str], Watched]) -> None:
    watched = watch(model)
    watched.draw(num_inference_steps=ROWS + 1, scheduler="flow-match-euler")
    assert watched.is_right()
    assert watched.products == (3 if model == "sd3.5-large" else 2)  # its guidance makes two rows of a picture


def test_what_is_not_as_predicted_is_as_diffusers_makes_it(
    watch: Callable[[str], Watched], monkeypatch: pytest.MonkeyPatch
) -> None:
    watched = watch("flux-dev")
    want = watched.draw()
    watched.modulations.proven.clear()
    monkeypatch.setattr(modulation, "CONVERTED", {"FluxTransformer2DModel": lambda timesteps, _: timesteps + 1})
    assert np.abs(watched.draw() - want).max() <= 1
    assert watched.is_right()
    assert watched.products == STEPS
    assert not watched.modulations.proven


def test_a_stopped_run_leaves_nothing(watch: Callable[[str], Watched]) -> None:
    watched = watch("flux-dev")
    recipe = watched.worker.spec.recipe(ImageRequest(prompt="stars", width=64, height=64, num_inference_steps=STEPS))

    def stop(*_: Any) -> None:
        raise Cancelled("stopped")

    with pytest.raises(Cancelled):
        watched.worker.generate(recipe, stop)
    assert watched.modulations.run is None
    assert "forward" not in vars(watched.embedder)
    assert not watched.modulations.proven


def test_another_prompt_in_the_same_run_has_its_own_rows() -> None:
    def embed(timestep: torch.Tensor, pooled: torch.Tensor) -> torch.Tensor:
        return timestep[:, None] + pooled

    class SD3Transformer2DModel:
        time_text_embed = SimpleNamespace(forward=embed)

    steps = torch.tensor([3.0, 2.0, 1.0])
    scheduler = SimpleNamespace(timesteps=steps, step_index=None, begin_index=None)
    run, prompts = Run(SD3Transformer2DModel(), scheduler, proven=False), torch.tensor([[[1.0, 2.0]], [[3.0, 4.0]]])
    prompt, negative = prompts
    for index, step in enumerate(steps):
        for pooled in (prompt, negative):
            temb = run.embed(step.expand(1), pooled)
            assert torch.equal(temb, embed(step.expand(1), pooled))
            assert (run.find(torch.neg, temb) is not None) == (pooled is prompt)
        scheduler.step_index = index + 1
