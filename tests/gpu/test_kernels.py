"""On a GPU: every kernel of attention it has, on the shapes of real models, beside native; and in compiled blocks."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import PATIENT

from handler import Clock, ImageRequest, Settings, Worker
from handler.catalog.attention import KERNELS, refusal, refusals
from handler.model import attention
from handler.model.hardware import Hardware, detect

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


def unless_lacking(kernel: str) -> str:
    """`kernel`, if this machine has it: also if it is never taken unasked."""
    hardware = detect(GPU)
    if why := refusal(KERNELS[kernel], hardware.capability, hardware.dtype):
        pytest.skip(why)
    return kernel


@pytest.mark.parametrize("name", SHAPES)
def test_fp8_differs_as_eight_bits_do_and_is_timed(name: str) -> None:
    """Beside native: with its roundings as kernels of their own, and without them, as in compiled code at best."""
    from handler.model.fp8_attention import E4M3

    kernel, given = unless_lacking("cudnn-fp8"), call(*SHAPES[name])
    want, got = (attention._attended(one, given).float() for one in ("native", kernel))
    apart = float((got - want).norm() / want.norm())
    native_ms, eager_ms = (attention._milliseconds(one, given) for one in ("native", kernel))
    rounded = [given[one].transpose(1, 2).to(E4M3).contiguous() for one in ("query", "key", "value")]
    unit = torch.ones((), device="cuda")
    torch.cuda.synchronize()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(10):
        torch.ops.kindling.attention_fp8(*rounded, unit, 0.1)
    end.record()
    end.synchronize()
    alone_ms = begin.elapsed_time(end) / 10
    print(f"\n{name}: native {native_ms:.3f} ms, FP8 {eager_ms:.3f}, of it cuDNN {alone_ms:.3f}; apart {apart:.4f}")
    assert attention.BOUND < apart < 0.07


@pytest.mark.parametrize("channels", [32, 64, 128])
def test_fp8_is_what_a_cpu_computes(channels: int) -> None:
    """cuDNN rounds numerators by the largest score so far, the CPU by the largest of all: a last bit apart."""
    unless_lacking("cudnn-fp8")
    from handler.model.fp8_attention import E4M3, attention_fp8

    generator = torch.Generator().manual_seed(0)
    rounded = torch.randn(3, 2, 333, 4, channels, generator=generator).to(E4M3)
    unit, scale = torch.tensor(0.5), channels**-0.5
    want, got = attention_fp8(*rounded, unit, scale), attention_fp8(*rounded.cuda(), unit.cuda(), scale)
    assert (got.cpu().float() - want.float()).norm() / want.float().norm() < 0.04


@pytest.fixture(params=[name for name in KERNELS if name != "native"])
def kernel(request: pytest.FixtureRequest) -> Iterator[str]:
    yield unless_lacking(request.param)
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
        assert (booted("auto").hardware.attention == kernel) == (not KERNELS[kernel].aside)
        assert "attention is native, was" in booted("native").ledger.plan_reason


def test_a_worker_measures_within_its_budget(tmp_path: Path) -> None:
    clock = Clock(3600)
    worker = Worker.boot(Settings(device="cuda", compile="off", volume=tmp_path, cold_start_budget_s=3600), clock)
    assert isinstance(worker.hardware, Hardware)
    assert worker.hardware.attention in KERNELS
    [seconds] = [phase.seconds for phase in clock.ledger.phases if phase.name == "attention"] or [0.0]
    print(f"\n{worker.ledger.attention}; {seconds:.2f} s")
