"""A worker in somebody's own program: a context whose end gives the model's memory back."""

import sys
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from weakref import ref

import numpy as np
import pytest
import torch
from conftest import unwarmed
from torch import nn

from fakes import RECIPE, FakeFamily
from handler import Clock, ImageRequest, Settings, Worker
from handler.core.birth import Birth
from handler.core.errors import DeviceLost, NotReady, StartError
from handler.core.host import trim
from handler.core.scratch import Scratch
from handler.model.loading.weights import _plain
from handler.worker import loaded


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


def test_weights_are_read_while_libraries_are_imported_as_far_as_memory_is_free(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("handler.core.host.AHEAD", 0)
    left: list[threading.Thread] = []

    def look(phase: str) -> None:
        readers = [thread for thread in threading.enumerate() if thread.name.startswith("reader-")]
        if phase == "weights" and readers:
            readers[0].join(20)  # it ends when there is nothing more to read
            left.extend([readers[0]] if readers[0].is_alive() else [])

    with unwarmed(), Worker.boot(Settings(), Clock(240, Birth.anew(), look)):
        assert left == []


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
        worker._package = Scratch()
        folder = worker._package.path
    assert not folder.exists()


def test_an_error_inside_goes_on_and_closes_too(family: FakeFamily) -> None:
    with pytest.raises(ZeroDivisionError), family.boot(Settings(), Clock.anew(240)) as worker:
        raise ZeroDivisionError
    with pytest.raises(NotReady):
        worker.draw_some([RECIPE], [lambda *_: None])


LOST = torch.AcceleratorError if hasattr(torch, "AcceleratorError") else RuntimeError


def lost(*_: object) -> None:
    """What freeing weights on a GPU that is no more may raise."""
    raise LOST("CUDA error: unspecified launch failure")


def test_an_error_inside_is_not_hidden_by_that_of_closing(
    family: FakeFamily, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(loaded, "free", lost)
    with pytest.raises(DeviceLost) as kept, family.boot(Settings(), Clock.anew(240)) as worker:
        raise DeviceLost("The GPU failed.")
    assert kept.value.__context__ is None
    assert "the memory of spark could not be given back" in caplog.text
    assert worker._pipeline is None
    with pytest.raises(LOST, match="unspecified launch failure"), family.boot(Settings(), Clock.anew(240)):
        pass  # where there is no other, it is told


def test_nor_is_that_of_a_start(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise DeviceLost("The GPU failed.")

    monkeypatch.setattr(Worker, "_warm", fail)
    monkeypatch.setattr(loaded, "free", lost)
    clock = Clock.anew(240)
    with pytest.raises(StartError, match=r"^The GPU failed\.$"):
        Worker.boot(Settings(), clock)
    assert clock.ledger.reason == "The GPU failed."


def test_a_closed_worker_has_no_weights_and_says_that_it_is_closed(family: FakeFamily, tmp_path: Path) -> None:
    with family.boot(Settings(), Clock.anew(240)) as worker:
        pass
    assert worker.weight_bytes == 0
    for act in (worker.save, worker.publish):
        with pytest.raises(NotReady, match="This worker is closed"):
            act(tmp_path)


def test_its_verbs_are_methods() -> None:
    assert {"boot", "generate", "draw", "draw_some", "close"} <= set(dir(Worker))


def test_a_clock_may_begin_in_a_process_that_is_older() -> None:
    anew, old = Clock.anew(240), Clock(240)
    assert anew.elapsed < old.elapsed
    assert anew.birth.identity != old.birth.identity


def test_pictures_of_another_size_leave_no_memory_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """glibc keeps freed tensors of odd sizes; giving them back takes time, which pictures of one size need not pay."""
    trimmed: list[int] = []
    monkeypatch.setitem(loaded.RESIZED, "cpu", lambda: trimmed.append(1))
    with FakeFamily().engine() as engine:
        assert engine.worker
        counts = []
        for width in (256, 256, 128, 128, 256):
            engine.worker.generate(engine.spec.recipe(ImageRequest(prompt="x", width=width, height=256)))
            counts.append(len(trimmed))
    assert counts == [0, 0, 1, 1, 2]


@pytest.mark.skipif(sys.platform != "linux", reason="of glibc")
def test_what_is_freed_goes_back_to_the_host() -> None:
    def resident() -> int:
        [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS")]
        return int(line.split()[1]) * 1024

    blocks = [b"x" * 100_000 for _ in range(2000)]  # each below what glibc takes from the host apart
    kept = blocks[::50]
    full = resident()
    del blocks
    trim()
    assert resident() < full - 100_000_000
    assert len(kept) == 40
