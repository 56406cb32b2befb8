"""A worker in somebody's own program: a context whose end gives the model's memory back."""

import traceback
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from weakref import ref

import numpy as np
import pytest
from conftest import unwarmed
from torch import nn

from fakes import RECIPE, FakeFamily
from handler import Clock, ImageRequest, Settings, Worker
from handler.core.errors import NotReady, StartError
from handler.model.loading.weights import _plain


def held(worker: Worker) -> Iterator[Any]:
    """All of the model's weights, and what draws with them."""
    yield from (ref(worker._pipeline), ref(worker._runner))
    for part in worker._pipeline.components.values():
        if isinstance(part, nn.Module):
            yield from map(ref, (part, *part.parameters(), *part.buffers()))


def drawn(worker: Worker) -> Any:
    request = ImageRequest(prompt="a red circle on a blue background", width=64, height=64, seed=7)
    pixels, stages = worker.generate(worker.spec.recipe(request))
    assert pixels.rgb.shape == (64, 64, 3)
    assert stages.keys() == {"encode", "denoise", "decode"}
    return pixels.rgb


def test_a_worker_is_a_context_that_gives_its_memory_back() -> None:
    """All of it, also what knows itself in circles; and another one draws the same."""
    pictures = []
    for _ in range(2):
        with unwarmed(), Worker.boot(Settings(), Clock.anew(240)) as worker:
            pictures.append(drawn(worker))
            weights = list(held(worker))
            assert len(weights) > 100
        assert [weight for weight in weights if weight() is not None] == []
        assert worker.facts["device"]
        with pytest.raises(NotReady, match="closed"):
            drawn(worker)
    assert np.array_equal(*pictures)


def test_of_a_start_that_fails_nothing_stays_though_its_error_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine keeps it, and a program its engine."""
    weights: list[Any] = []

    def lost(worker: Worker, *_: object) -> None:
        weights.extend(held(worker))
        raise OSError("no such device")

    monkeypatch.setattr(Worker, "_warm", lost)
    with pytest.raises(StartError, match="no such device") as kept:
        Worker.boot(Settings(), Clock.anew(240))
    assert len(weights) > 100
    assert [weight for weight in weights if weight() is not None] == []
    assert kept.value.__cause__
    assert "lost" in [entry.name for entry in traceback.extract_tb(kept.value.__cause__.__traceback__)]


@pytest.mark.parametrize("precision", ["int8", "fp8", "nvfp4"])
def test_weights_are_freed_though_somebody_knows_them(precision: str) -> None:
    """As torch's loader of compiled code does; also those of a class of their own."""
    with unwarmed(), Worker.boot(Settings(precision=precision), Clock.anew(240)) as worker:
        weights = [*worker._pipeline.transformer.parameters(), *worker._pipeline.transformer.buffers()]
        tensors = [tensor for weight in weights for tensor in _plain(weight)]
        assert sum(tensor.untyped_storage().nbytes() for tensor in tensors) > 10**6
    assert sum(tensor.untyped_storage().nbytes() for tensor in tensors) == 0
    worker.close()


def test_what_was_compiled_and_not_published_leaves_no_file(family: FakeFamily) -> None:
    with family.boot(Settings(), Clock.anew(240)) as worker:
        worker._package = TemporaryDirectory(prefix="kindling-")
        folder = Path(worker._package.name)
    assert not folder.exists()


def test_an_error_inside_goes_on_and_closes_too(family: FakeFamily) -> None:
    with pytest.raises(ZeroDivisionError), family.boot(Settings(), Clock.anew(240)) as worker:
        raise ZeroDivisionError
    with pytest.raises(NotReady):
        worker.draw_some([RECIPE], [lambda *_: None])


def test_its_verbs_are_methods() -> None:
    assert {"boot", "generate", "draw", "draw_some", "close"} <= set(dir(Worker))


def test_a_clock_may_begin_in_a_process_that_is_older() -> None:
    anew, old = Clock.anew(240), Clock(240)
    assert anew.elapsed < old.elapsed
    assert anew.birth.identity != old.birth.identity
