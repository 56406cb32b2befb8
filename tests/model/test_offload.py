"""Models whose parts wait in host memory: drawn bit for bit as without, each part there when it computes."""

import mmap
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import PATIENT

import tiny
from handler import MODELS, ImageRequest, ModelSpec, Worker
from handler.core.errors import Cancelled
from handler.core.recipe import Recipe, Reference
from handler.model import offload
from handler.model.loading import weights
from handler.model.loading.weights import free
from handler.model.offload import Stream, _pages

OWN = [spec for spec in MODELS.values() if not spec.base and spec.id not in ("spark", "sdxl-turbo")]
CROPPED = Reference(np.full((64, 64, 3), 90, np.uint8), "")


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> list[Stream]:
    """The streams made; what waits is NaN, so that using it shows.

    All weights are where allocations start, as those that come are: on a CPU, sums depend on that in their last bit.
    """
    read = weights.tensors
    monkeypatch.setattr(
        weights, "tensors", lambda *given: {name: found.clone() for name, found in read(*given).items()}
    )
    made: list[Stream] = []
    init, go = Stream.__init__, Stream._go

    def spoil(one: Stream, part: Any) -> None:
        for tensor, host in one._parts[part]:
            tensor.data = torch.full_like(host, torch.nan) if host.is_floating_point() else torch.zeros_like(host)

    def watched(one: Stream, *given: Any) -> None:
        init(one, *given)
        made.append(one)
        for part in one._parts:
            spoil(one, part)

    def gone(one: Stream, part: Any) -> None:
        go(one, part)
        spoil(one, part)

    monkeypatch.setattr(Stream, "__init__", watched)
    monkeypatch.setattr(Stream, "_go", gone)
    monkeypatch.setattr(Worker, "_warm", lambda *_: None)  # a picture of full size each time
    return made


def boot(spec: ModelSpec, volume: Path, mode: str, **fields: Any) -> Worker:
    update = {"model": spec.id, "volume": volume, "compile": "off", "offload": mode}
    return Worker.boot(PATIENT.model_copy(update=update | fields))


def small(spec: ModelSpec, prompt: str = "a red circle") -> Recipe:
    images = (CROPPED,) * min(1, spec.max_images)
    request = ImageRequest(
        prompt=prompt, width=64, height=64, seed=1, num_inference_steps=min(2, spec.max_steps),
        images=tuple(b"x" for _ in images),
    )  # fmt: skip
    return spec.recipe(request, images)


@pytest.mark.parametrize("spec", OWN, ids=lambda spec: spec.id)
def test_draws_the_same(spec: ModelSpec, tmp_path: Path, streams: list[Stream]) -> None:
    tiny.write(spec, tmp_path)
    resident = boot(spec, tmp_path, "off").generate(small(spec))[0].rgb
    assert not streams
    for mode in ("encoders", "blocks"):
        worker = boot(spec, tmp_path, mode)
        assert (worker.generate(small(spec))[0].rgb == resident).all(), mode
        assert all(len(one._here) <= 1 for one in streams)
        streams.clear()


def test_a_quantised_model_draws_the_same_with_and_without_a_step_cache(tmp_path: Path, streams: list[Stream]) -> None:
    spec = MODELS["flux-dev"]
    tiny.write(spec, tmp_path)
    request = ImageRequest(prompt="a red circle", width=64, height=64, seed=1, num_inference_steps=6)
    resident, waiting = (boot(spec, tmp_path, mode, precision="int8", step_cache="on") for mode in ("off", "blocks"))
    for cache in ("off", "on"):
        recipe = spec.recipe(request.model_copy(update={"step_cache": cache}), served="on")
        assert (resident.generate(recipe)[0].rgb == waiting.generate(recipe)[0].rgb).all()
    assert (waiting.ledger.plan, waiting.memory.mode) == ("EAGER", "blocks")
    assert "stay in place" in waiting.ledger.plan_reason


def test_a_picture_that_is_cancelled_leaves_the_worker_whole(tmp_path: Path, streams: list[Stream]) -> None:
    spec = MODELS["flux-dev"]
    tiny.write(spec, tmp_path)
    worker = boot(spec, tmp_path, "blocks")
    before = worker.generate(small(spec))[0].rgb

    def stop(*_: Any) -> None:
        raise Cancelled("enough")

    with pytest.raises(Cancelled):
        worker.generate(small(spec, "another"), stop)
    assert (worker.generate(small(spec))[0].rgb == before).all()


class Net(torch.nn.Module):
    """Layers that repeat between others; one is never called, and one only if told."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = torch.nn.Parameter(torch.ones(1))
        self.first, self.unused, self.last = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2), torch.nn.LayerNorm(2)
        self.layers = torch.nn.ModuleList(torch.nn.Sequential(torch.nn.Linear(2, 2)) for _ in range(3))
        self.requires_grad_(False)

    def forward(self, x: torch.Tensor, skip: int = -1) -> torch.Tensor:
        x = self.first(x) * self.gain
        for number, layer in enumerate(self.layers):
            x = x if number == skip else layer(x)
        return self.last(x)


@pytest.fixture
def net(monkeypatch: pytest.MonkeyPatch) -> tuple[Net, list[str]]:
    """A streamed one, and what came (+) and went (-)."""
    seen: list[str] = []
    net = Net()
    names = {part: name.removeprefix("layers.") for name, part in net.named_modules()}
    for sign, name, method in (("+", "_come", Stream._come), ("-", "_go", Stream._go)):

        def noted(one: Stream, part: Any, sign: str = sign, method: Any = method) -> None:
            if (part in one._here) == (sign == "-"):
                seen.append(sign + names[part])
            method(one, part)

        monkeypatch.setattr(Stream, name, noted)
    offload.stream([net], "cpu")
    return net, seen


ORDER = "+first +0 -first +1 -0 +2 -1 +last -2 -last"


def test_the_next_part_comes_while_one_computes(net: tuple[Net, list[str]]) -> None:
    model, seen = net
    first = model(torch.ones(1, 2))
    assert " ".join(seen) == "+first -first +0 -0 +1 -1 +2 -2 +last -last"  # nothing is known yet
    seen.clear()
    with torch.inference_mode():
        assert (model(torch.ones(1, 2)) == first).all()
    assert " ".join(seen) == ORDER


def test_a_part_that_is_skipped_goes_again(net: tuple[Net, list[str]]) -> None:
    model, seen = net
    model(torch.ones(1, 2))
    seen.clear()
    model(torch.ones(1, 2), skip=1)
    assert " ".join(seen) == "+first +0 -first +1 -0 -1 +2 +last -2 -last"


def test_a_part_that_fails_goes_too(net: tuple[Net, list[str]]) -> None:
    model, seen = net
    model(torch.ones(1, 2))
    seen.clear()
    with pytest.raises(RuntimeError, match="shapes"):
        model(torch.ones(1, 3))
    assert " ".join(seen) == "+first +0 -first"
    seen.clear()
    model(torch.ones(1, 2))
    assert " ".join(seen) == ORDER.replace("+0 ", "", 1)  # it was still there


class Queue:
    """A GPU's stream that computes nothing: what it was told."""

    def __init__(self, name: str, told: list[str]) -> None:
        self.name, self.told = name, told

    def wait_stream(self, other: "Queue") -> None:
        self.told.append(f"{self.name} waits for {other.name}")

    def wait_event(self, event: str) -> None:
        self.told.append(f"{self.name} waits for {event}")

    def record_event(self) -> str:
        self.told.append(event := f"copy {sum(word.startswith('copy') for word in self.told)}")
        return event


def test_copies_and_computing_wait_for_one_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that a part left may be copied to once its kernels are through; a part computes once it is there."""
    told: list[str] = []
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: Queue("compute", told))
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    copy, how = torch.Tensor.copy_, list[Any]()
    monkeypatch.setattr(
        torch.Tensor, "copy_", lambda to, *given, **more: (how.append(more), copy(to, *given, **more))[1]
    )
    net = Net()
    one = Stream(net, "cpu")
    net(torch.ones(1, 2))
    one._copies = Queue("copies", told)
    net(torch.ones(1, 2))
    assert told[:7] == [
        "copies waits for compute", "copy 0", "compute waits for copy 0",  # the first part, and
        "copies waits for compute", "copy 1",  # the next, told before the first computes
        "compute waits for copy 0",  # as it goes
        "compute waits for copy 1",
    ]  # fmt: skip
    assert how
    assert all(each == {"non_blocking": True} for each in how)  # else the host waits for each


def test_pages_are_locked_once() -> None:
    page = mmap.PAGESIZE
    spans = [(0, 10), (20, page), (page - 1, 2 * page + 1), (4 * page, 4 * page), (5 * page, 6 * page)]
    assert _pages(spans) == [(0, 3 * page), (5 * page, 6 * page)]


def test_host_memory_is_locked_in_whole_pages_whatever_the_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """What CUDA is told of two tensors, the later one first; and a refusal of its is one of ours."""
    page, locked, codes = mmap.PAGESIZE, list[tuple[int, int, int]](), list[int]()

    def register(start: int, size: int, flags: int) -> int:
        locked.append((start, size, flags))
        return 700 + len(locked)

    monkeypatch.setattr(torch.cuda, "cudart", lambda: SimpleNamespace(cudaHostRegister=register))
    monkeypatch.setattr(torch.cuda, "check_error", codes.append)
    memory = mmap.mmap(-1, 8 * page)
    parts = ((5 * page, page), (0, page + 10), (page, 20))
    spans = (torch.frombuffer(memory, dtype=torch.uint8, offset=at, count=size) for at, size in parts)
    first = torch.frombuffer(memory, dtype=torch.uint8).data_ptr()
    offload.lock_pages(spans, starts := [])
    assert starts == [first, first + 5 * page]
    assert locked == [(first, 2 * page, 0), (first + 5 * page, page, 0)]
    assert codes == [701, 702]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_on_a_gpu_all_that_waits_is_locked(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All parts' tensors, of each model; what stays on the device is not."""
    locked: list[int] = []

    def lock(hosts: Any, starts: list[int]) -> None:
        locked.extend(host.data_ptr() for host in hosts)
        starts += [7, 8]

    monkeypatch.setattr(offload, "lock_pages", lock)
    monkeypatch.setattr(offload, "Stream", lambda model, device: Stream(model, "cpu"))
    nets = [Net(), Net()]
    waits = {tensor.data_ptr() for net in nets for name, tensor in net.named_parameters() if name != "gain"}
    offload.stream(nets, device)
    assert len(locked) == len({*locked})
    assert {*locked} == (waits if device == "cuda" else set())
    unlocked: list[int] = []
    monkeypatch.setattr(torch.cuda, "cudart", lambda: SimpleNamespace(cudaHostUnregister=unlocked.append))
    sizes = [tensor.untyped_storage() for net in nets for tensor in net.parameters()]
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: unlocked.append(sum(map(len, sizes))))
    whole = sum(map(len, sizes))
    for _ in range(2):
        free(SimpleNamespace(components={str(number): net for number, net in enumerate(nets)}))
        assert unlocked == ([whole, 7, 8] if device == "cuda" else [])  # before its memory goes
    assert sum(map(len, sizes)) == 0


def test_a_part_is_a_block_that_the_model_names_or_what_stands_in_a_list(net: tuple[Net, list[str]]) -> None:
    model, _ = net
    names = {part: name for name, part in model.named_modules()}
    others, layers = ["first", "unused", "last"], ["layers.0", "layers.1", "layers.2"]
    assert [names[part] for part in offload._parts(model)] == [*others, *layers]
    model._repeated_blocks = ["Linear"]  # type: ignore[assignment]
    assert [names[part] for part in offload._parts(model)] == [*others, *(f"{name}.0" for name in layers)]


@pytest.mark.parametrize("tiles", [False, True])
def test_large_pictures_are_decoded_in_tiles_where_memory_is_short(
    tiles: bool, tmp_path: Path, streams: list[Stream], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = MODELS["flux-schnell"]
    tiny.write(spec, tmp_path)
    monkeypatch.setattr("handler.worker.memory._tile_above", lambda *_: 64 * 64 - tiles)
    worker = boot(spec, tmp_path, "off")
    vae, seen = worker._pipeline.vae, set[bool]()
    vae.decoder.register_forward_pre_hook(lambda *_: seen.add(vae.use_tiling))
    worker.generate(small(spec))
    assert seen == {tiles}
    assert not vae.use_tiling
    assert worker.facts["tiling"] == f"above {64 * 64 - tiles} pixels"
