"""Previews: like the finished picture once a few were drawn, of the right shape everywhere, and changing nothing."""

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from conftest import PATIENT
from test_families import EVERY, PAIRS, PERFECT, TARGET, packed

import tiny
from handler import MODELS, ImageRequest, ModelSpec, Worker
from handler.model.preview import LEARNED, SHRINK, Projection

TAUGHT = (
    "a blue square on a red background",
    "a white triangle on a green background",
    "three pink diamonds on a gray background",
    "a black cross on a yellow background",
    "a cyan heart and a brown ring on a white background",
    "a small purple circle at the bottom on an orange background",
)
NEW = (
    "a large yellow star on a purple background",
    "two small green hearts on a white background",
    "a red circle on a blue background",
    "an orange ring in the top left corner on a black background",
)
LIKE_DB = 20.0  # measured with spark: 22.4 to 26.7


def draw(worker: Worker, prompt: str, seed: int, **fields: Any) -> tuple[Any, list[Any]]:
    """The picture, and the preview of each step."""
    seen: list[Any] = []
    recipe = worker.spec.recipe(ImageRequest(prompt=prompt, seed=seed, **fields))
    pixels, _ = worker.generate(recipe, lambda done, preview: seen.append(preview()))
    return pixels.rgb, seen


def shrunk(rgb: Any) -> Any:
    height, width, _ = rgb.shape
    return rgb.reshape(height // SHRINK, SHRINK, width // SHRINK, SHRINK, 3).mean((1, 3))


def psnr(one: Any, other: Any) -> float:
    return float(10 * np.log10(255**2 / np.square(one.astype(float) - other).mean()))


@pytest.fixture(scope="module")
def taught() -> Worker:
    """spark, of its own: what the other tests draw would teach it more."""
    worker = Worker.boot(PATIENT)
    for seed, prompt in enumerate(TAUGHT):
        draw(worker, prompt, seed)
    return worker


@pytest.mark.parametrize("prompt", NEW)
def test_after_a_few_pictures_previews_resemble_the_picture_to_come(taught: Worker, prompt: str) -> None:
    picture, seen = draw(taught, prompt, 100)
    assert [preview.dtype for preview in seen] == [np.uint8] * 4
    assert min(psnr(preview, shrunk(picture)) for preview in seen) > LIKE_DB
    nearer = [np.abs(preview.astype(int) - seen[-1]).mean() for preview in seen]
    assert 0 < nearer[0] == max(nearer)  # between them each step draws the whole picture anew


def test_asking_for_previews_changes_no_byte(spark: Worker) -> None:
    recipe = spark.spec.recipe(ImageRequest(prompt=NEW[0], seed=3))
    silent = spark.generate(recipe)[0].rgb
    assert draw(spark, NEW[0], 3)[0].tobytes() == silent.tobytes()


def test_what_was_learned_is_solved_once_and_anew_when_there_is_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """To solve makes the host wait for the device."""
    solve, solved = torch.linalg.solve, list[Any]()
    monkeypatch.setattr(torch.linalg, "solve", lambda *given: solved.append(given) or solve(*given))
    learning, size = Projection(), (64, 64)
    latents = [torch.randn(1, 16, 64, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    first, _ = (learning.draw(latents[0], size) for _ in range(2))
    assert len(solved) == 1
    learning.learn(latents[0], torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(2)))
    second, third = (learning.draw(latents[0], size) for _ in range(2))
    assert len(solved) == 2
    assert torch.equal(second, third)
    assert not torch.equal(first, second)


@pytest.fixture(scope="module")
def boot(tmp_path_factory: pytest.TempPathFactory) -> Callable[[ModelSpec], Worker]:
    """Boots a worker for a row, once, from tiny weights."""
    volume, practise = tmp_path_factory.mktemp("volume"), Worker._practise

    def practise_small(worker: Worker, prompt: str, _: tuple[int, int], *rest: Any) -> None:
        practise(worker, prompt, (256, 256), *rest)  # one of full size takes seconds

    @cache
    def booted(model: str) -> Worker:
        tiny.write(MODELS[model], volume)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Worker, "_practise", practise_small)
            return Worker.boot(PATIENT.model_copy(update={"model": model, "volume": volume, "compile": "off"}))

    return lambda spec: booted(spec.id)


@EVERY
def test_every_row_has_previews(spec: ModelSpec, boot: Callable[[ModelSpec], Worker]) -> None:
    """At an eighth of the size, whatever the latents look like; learned from the warm-up picture alone."""
    worker = boot(spec)
    picture, seen = draw(worker, "a red circle", 1, width=128, height=96, num_inference_steps=min(2, spec.max_steps))
    assert {preview.shape for preview in seen} == {(12, 16, 3)}
    assert psnr(seen[-1], shrunk(picture)) > psnr(np.full_like(seen[-1], 128), shrunk(picture))
    _, seen = draw(worker, "a red circle", 1, width=100, height=72, num_inference_steps=spec.min_steps)
    assert seen[0].shape == (9, 13, 3)


@pytest.mark.parametrize(("spec", "name"), PAIRS)
def test_previews_show_what_a_step_heads_for(
    spec: ModelSpec, name: str, boot: Callable[[ModelSpec], Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A perfect predictor heads for its picture from the first step, however noisy the latents still are."""
    worker, headed = boot(spec), []

    def noted(_: Projection, latents: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        headed.append(latents)
        return torch.zeros(size[1] // SHRINK, size[0] // SHRINK, 3, dtype=torch.uint8)

    monkeypatch.setattr(Projection, "draw", noted)
    perfect = PERFECT.get(spec.family.rpartition(".")[2], packed)
    monkeypatch.setattr(getattr(worker._pipeline, worker._family.DENOISER), "forward", perfect)
    steps = min(spec.steps, 8)
    draw(worker, "x", 1, width=128, height=96, num_inference_steps=steps, scheduler=name)
    assert len(headed) >= steps
    assert max(float((latents - TARGET).abs().max()) for latents in headed) < 0.05


def test_blocks_of_two_by_two_and_single_pixels_are_learned_alike() -> None:
    """Latents that hold the colours themselves, packed or not, give the picture back."""
    rng = torch.Generator().manual_seed(0)
    picture = torch.rand(3, 8, 12, generator=rng).repeat_interleave(SHRINK, 1).repeat_interleave(SHRINK, 2)
    colours = picture[:, ::SHRINK, ::SHRINK]
    packed = colours.reshape(3, 4, 2, 6, 2).permute(1, 3, 0, 2, 4).reshape(1, 24, 12)
    for latents in (colours[None], colours[None, :, None], packed):
        projection = Projection()
        for _ in range(LEARNED):
            projection.learn(latents, picture)
        drawn = projection.draw(latents, (12 * SHRINK, 8 * SHRINK)).permute(2, 0, 1) / 255
        assert (drawn - colours).abs().max() < 0.03


def test_where_nothing_was_learned_previews_are_grey() -> None:
    projection = Projection()
    drawn = projection.draw(torch.randn(1, 4, 8, 8), (64, 64))
    assert set(drawn.flatten().tolist()) == {128}
