"""On a GPU: every kernel of attention it has, on the shapes of real models, beside native; and in compiled blocks."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import PATIENT

from handler import Clock, ImageRequest, Settings, Worker, attention
from handler.hardware import Hardware, detect
from handler.kernels import KERNELS, refusals

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
GPU = PATIENT.model_copy(update={"device": "cuda"})
SHAPES = {  # heads, tokens of picture and text, channels of a head
    "flux-schnell, 1024x1024": (24, 4096 + 256, 128),
    "flux-dev, 1024x1024": (24, 4096 + 512, 128),
    "flux2-dev, 1024x1024": (48, 4096 + 512, 128),
    "z-image-turbo, 1024x1024": (30, 4096 + 64, 128),
    "flux-schnell, 1008x560, no multiple of 128": (24, 63 * 35 + 256, 128),
    "flux-schnell, 512x512": (24, 1024 + 256, 128),
}


def call(heads: int, tokens: int, channels: int, masked: bool = False) -> dict[str, Any]:
    """One call of torch's function as diffusers makes it: tokens before heads in memory."""
    generator = torch.Generator("cuda").manual_seed(0)
    tensors = torch.randn(3, 1, tokens, heads, channels, device="cuda", dtype=torch.bfloat16, generator=generator)
    names = dict(zip(("query", "key", "value"), (t.transpose(1, 2) for t in tensors), strict=True))
    mask = torch.zeros(1, 1, tokens, tokens, device="cuda", dtype=torch.bfloat16) if masked else None
    return {**names, "attn_mask": mask, "is_causal": False, "scale": None, "enable_gqa": False}


def refused() -> dict[str, str]:
    hardware = detect(GPU)
    return refusals(hardware.capability, hardware.dtype)


@pytest.mark.parametrize("name", SHAPES)
def test_kernels_agree_and_are_measured(name: str) -> None:
    timings = attention.measure([call(*SHAPES[name])], refused())
    print(f"\n{name}: {attention.decide(timings, SHAPES[name][1])}")
    for timing in timings:
        assert timing.ms or timing.why == refused()[timing.id], f"{timing.id} {timing.why}"


def test_a_mask_is_no_reason_to_fail() -> None:
    timings = {timing.id: timing for timing in attention.measure([call(24, 1024, 128, masked=True)], refused())}
    assert timings["native"].ms
    assert "cannot do it" in timings["flash"].why


@pytest.mark.parametrize("attempt", range(3))
def test_measuring_again_chooses_the_same(attempt: int) -> None:
    calls: list[attention.Call] = [call(*SHAPES["flux-dev, 1024x1024"])]
    chosen = [attention.decide(attention.measure(calls, refused()), 4608).id for _ in range(5)]
    assert len(set(chosen)) == 1


@pytest.fixture(params=[name for name in KERNELS if name != "native"])
def kernel(request: pytest.FixtureRequest) -> Iterator[str]:
    if why := refused()[request.param]:
        pytest.skip(why)
    yield request.param
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry

    _AttentionBackendRegistry.set_active_backend("native")


@pytest.mark.parametrize("policy", ["off", "on"])
def test_spark_draws_with_it(kernel: str, policy: str, tmp_path: Path) -> None:
    """Eager and in compiled blocks, the same picture as native's but for rounding; what compiled it fits only it."""

    def booted(name: str) -> Worker:
        return Worker.boot(GPU.model_copy(update={"attention": name, "compile": policy, "volume": tmp_path}))

    def draw(worker: Worker) -> Any:
        return worker.generate(worker.spec.recipe(ImageRequest(prompt="a red circle", seed=1)))[0].rgb.astype(int)

    worker = booted(kernel)
    assert worker.ledger.plan == ("COMPILED" if policy == "on" else "EAGER"), worker.ledger.plan_reason
    assert abs(draw(worker) - draw(booted("native"))).mean() < 2
    if worker.unpublished:
        worker.publish(tmp_path)
        assert booted(kernel).ledger.plan_reason.startswith("HIT")
        assert booted("auto").hardware.attention == kernel
        assert "attention is native, was" in booted("native").ledger.plan_reason


def test_a_worker_measures_within_its_budget(tmp_path: Path) -> None:
    clock = Clock(3600)
    worker = Worker.boot(Settings(device="cuda", compile="off", volume=tmp_path, cold_start_budget_s=3600), clock)
    assert isinstance(worker.hardware, Hardware)
    assert worker.hardware.attention in KERNELS
    [seconds] = [phase.seconds for phase in clock.ledger.phases if phase.name == "attention"] or [0.0]
    print(f"\n{worker.ledger.attention}; {seconds:.2f} s")
