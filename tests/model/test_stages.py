"""What a step says is true: progress, deadline and hang watch follow the device, not what it was told to do."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fakes import FakeFamily, raises
from handler import MODELS
from handler.core.errors import Cancelled, DeviceLost, NumericalError
from handler.core.recipe import Recipe
from handler.model.families.schedulers import FLOW
from handler.model.runner import PROMPTS_KEPT, Runner
from handler.model.stages import MARKS, Stages

RECIPE = Recipe("spark", "embedded", "a red circle", (64, 64), 4, 0.0, "flow-match-euler", 1)


class Gpu:
    """A device whose clock stands still unless somebody waits for it: each mark takes it a second to reach."""

    def __init__(self) -> None:
        self.told, self.done, self.waits = 0, 0, 0

    def mark(self) -> "Mark":
        """Leave a mark in what the device is told."""
        self.told += 1
        return Mark(self, self.told)


class Mark:
    """The device has reached it when it has done as much."""

    def __init__(self, gpu: Gpu, place: int) -> None:
        self._gpu, self.place = gpu, place

    def synchronize(self) -> None:
        """Wait for the device."""
        self._gpu.waits += 1
        self._gpu.done = max(self._gpu.done, self.place)

    def elapsed_time(self, later: "Mark") -> float:
        """Milliseconds."""
        assert self._gpu.done >= later.place, "the device has not come so far"
        return 1000.0 * (later.place - self.place)


@pytest.fixture
def gpu() -> Gpu:
    return Gpu()


@pytest.fixture
def pipeline() -> FakeFamily:
    return FakeFamily()


@pytest.fixture
def drawing(gpu: Gpu, pipeline: Any) -> Runner:
    family: Any = SimpleNamespace(encode=lambda *_: {}, SCHEDULERS=FLOW)
    return Runner(MODELS["spark"], family, pipeline, lambda _: False, gpu.mark)


def test_a_step_is_told_when_the_device_has_done_the_one_before(drawing: Runner, gpu: Gpu) -> None:
    """What is told to the device is two marks of encoding, then one a step; it never lags by more than one."""
    seen: list[tuple[int, int, int]] = []
    drawing.draw([RECIPE], [lambda done, _: seen.append((done, gpu.told - 2, gpu.done - 2))])
    assert seen == [(1, 1, -2), (2, 2, 1), (3, 3, 2), (4, 4, 3)]


def test_a_cancelled_picture_stops_where_the_device_is(drawing: Runner, gpu: Gpu, pipeline: FakeFamily) -> None:
    """Nobody launches what nobody wants: one step more than the device had done when it was given up."""

    def stop(done: int, _: Any) -> None:
        if gpu.done - 2 >= 1:
            raise Cancelled("enough")

    [outcome] = drawing.draw([RECIPE], [stop])
    assert isinstance(outcome, Cancelled)
    assert pipeline.steps_run == 2


def test_stages_are_the_time_of_the_device(drawing: Runner) -> None:
    """By its clock, which goes on by a second from mark to mark; what the host's says is microseconds."""
    [(_, stages)] = drawing.draw([RECIPE], [lambda *_: None])
    assert stages == {"encode": 1.0, "denoise": 4.0, "decode": 1.0}


def test_a_picture_ends_with_one_wait(drawing: Runner, gpu: Gpu, pipeline: FakeFamily) -> None:
    """However many are drawn at once, and however they fail: each but the first step waits for the one before."""
    pipeline.broken = {2}
    outcomes = drawing.draw([replace(RECIPE, seed=seed) for seed in (1, 2, 254)], [lambda *_: None] * 3)
    assert [type(outcome) for outcome in outcomes] == [tuple, NumericalError, tuple]
    assert gpu.waits == 3 + 1


def test_a_black_picture_is_none(drawing: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeFamily, "colour", lambda *_: 0.001)
    [outcome] = drawing.draw([RECIPE], [lambda *_: None])
    assert isinstance(outcome, NumericalError)
    assert "all-black" in str(outcome)


def test_a_device_that_fails_while_it_is_waited_for_is_lost(drawing: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Mark) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(Mark, "synchronize", fail)
    outcomes = drawing.draw([RECIPE] * 2, [lambda *_: None] * 2)
    assert [type(outcome) for outcome in outcomes] == [DeviceLost] * 2


def test_a_device_that_was_lost_before_takes_no_mark(drawing: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> Mark:
        raise RuntimeError("CUDA error: unspecified launch failure")

    monkeypatch.setattr(drawing, "_mark", fail)
    [outcome] = drawing.draw([RECIPE], [lambda *_: None])
    assert isinstance(outcome, DeviceLost)


def test_words_are_encoded_once_and_the_last_sixteen_are_kept(gpu: Gpu, pipeline: Any) -> None:
    """A picture's words are its prompt, what it shall not be, and how much the prompt counts."""
    encoded: list[Any] = []

    def encode(pipeline: Any, recipe: Recipe, tokens: int) -> dict[str, Any]:
        if recipe.prompt == "unsaid":
            encoded.append("refused")
            raise ValueError("no such word")
        encoded.append((recipe.prompt, recipe.negative_prompt, recipe.guidance))
        return {}

    family: Any = SimpleNamespace(encode=encode, SCHEDULERS=FLOW)
    drawing = Runner(MODELS["spark"], family, pipeline, lambda _: False, gpu.mark)

    def draws(*recipes: Recipe) -> list[Any]:
        encoded.clear()
        drawing.draw(recipes, [lambda *_: None] * len(recipes))
        return list(encoded)

    many = [replace(RECIPE, prompt=str(number)) for number in range(PROMPTS_KEPT + 1)]
    assert not [each for each in drawing.draw(many, [lambda *_: None] * len(many)) if isinstance(each, BaseException)]
    first, *others = [replace(RECIPE, prompt=str(number)) for number in range(16)]
    assert draws(first) == [("0", None, 0.0)]
    assert draws(first, replace(first, seed=2, steps=2), replace(first, long_prompts="refuse")) == []
    assert draws(replace(first, negative_prompt="red")) == [("0", "red", 0.0)]
    assert draws(replace(first, guidance=2.0)) == [("0", None, 2.0)]
    assert [len(draws(each)) for each in (*others, *others, first)] == [1] * 15 + [0] * 15 + [1]
    another, unsaid = replace(RECIPE, prompt="another"), replace(RECIPE, prompt="unsaid")
    kept = (first, *others[1:], another)
    assert [len(draws(each)) for each in (*kept, *kept, others[0])] == [0] * 15 + [1] + [0] * 16 + [1]
    assert draws(unsaid) == draws(unsaid) == ["refused"]
    assert draws(others[0], another) == []


class Worded(FakeFamily):
    """Takes prompts as tensors; `rows` is how many it was given each time."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[int] = []

    def __call__(self, prompt_embeds: torch.Tensor, **options: Any) -> Any:
        """As a pipeline of diffusers is called."""
        self.rows.append(len(prompt_embeds))
        return super().__call__(**options)


def test_prompts_of_other_lengths_are_drawn_in_runs_of_their_own(gpu: Gpu) -> None:
    """All of them, each in its place, whichever run it was in."""
    family: Any = SimpleNamespace(
        encode=lambda pipeline, recipe, tokens: {"prompt_embeds": torch.zeros(1, len(recipe.prompt))}, SCHEDULERS=FLOW
    )
    pipeline: Any = Worded()
    drawing = Runner(MODELS["spark"], family, pipeline, lambda _: False, gpu.mark)
    recipes = [replace(RECIPE, prompt=text, seed=seed) for seed, text in enumerate(("a", "abc", "b", "ab", "xyz"), 2)]
    first, *others = drawing.draw_some(recipes, [lambda *_: None] * 5)
    assert [outcome is None for outcome in (first, *others)] == [False, True, False, True, True]
    outcomes = drawing.draw(recipes, [lambda *_: None] * 5)
    assert pipeline.batches == pipeline.rows == [2, 2, 2, 1]
    assert [outcome[0].recipe.seed for outcome in outcomes if isinstance(outcome, tuple)] == [2, 3, 4, 5, 6]


def test_what_ends_a_program_ends_one_picture_if_it_came_from_who_watches_it(drawing: Runner) -> None:
    def ends(*_: Any) -> None:
        raise SystemExit("bye")

    [outcome] = drawing.draw([RECIPE], [ends])
    assert isinstance(outcome, SystemExit)
    one, other = drawing.draw([RECIPE, replace(RECIPE, seed=2)], [ends, lambda *_: None])
    assert (type(one), type(other)) == (SystemExit, tuple)


def test_what_ends_a_program_while_it_draws_does(drawing: Runner, pipeline: FakeFamily) -> None:
    pipeline.at_step = {2: raises(KeyboardInterrupt())}
    with pytest.raises(KeyboardInterrupt):
        drawing.draw([RECIPE], [lambda *_: None])


def test_on_a_cpu_all_is_done_when_it_is_told() -> None:
    stages = Stages(MARKS["cpu"])
    stages.begin("denoise")
    stages.step()
    stages.step()
    stages.finish()
    assert list(stages.seconds) == ["encode", "denoise", "decode"]
    assert all(seconds >= 0 for seconds in stages.seconds.values())
