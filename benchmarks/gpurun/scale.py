"""What the parts of a run on a GPU share: how large everything is, its seconds, how it times, and random models."""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

import random_models

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32  # of activations, as workers have it in fp8
MODEL = "flux-schnell"
PARTS = random_models.CONFIGS[MODEL][1]
Row = dict[str, Any]  # what a case found, by figure: milliseconds end in _ms, seconds in _s
Case = tuple[str, Callable[[], Row]]
Part = Callable[["Run"], Iterator[Case]]


@dataclass(frozen=True, slots=True)
class Scale:
    """How large everything is. `smaller` is what differs from the model's own configuration, by component."""

    size: tuple[int, int] = (1024, 1024)
    small: tuple[int, int] = (512, 512)
    tokens: int = 256
    dev_tokens: int = 512
    dev_steps: int = 28
    pictures: int = 5
    starts: int = 3
    square: int = 8192  # of the matrices whose product shows the chip's ceiling
    copied: int = 1 << 30  # bytes of the copy that shows the memory's
    ways: Mapping[str, tuple[str, ...]] = field(
        default_factory=lambda: {
            "bf16": ("dynamic", "static"),
            "fp8": ("dynamic", "static"),
            "fp8-tensor": ("dynamic",),
            "int8-dynamic": ("dynamic",),
        }
    )
    backend: str = "inductor"  # of torch.compile
    # Others write 34 GB, compile for long, or want a Blackwell.
    tests: tuple[str, ...] = ("tests/gpu/test_step_loop.py", "tests/gpu/test_kernels.py")
    smaller: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


FULL = Scale()
TINY = Scale(
    size=(128, 256),  # the least whose half by a quarter is a picture still
    small=(64, 64),
    tokens=16,
    dev_tokens=32,
    dev_steps=5,
    pictures=2,
    starts=1,
    square=32,
    copied=1 << 10,
    ways={"fp8": ("dynamic",)},
    backend="eager",
    tests=("tests/gpu/test_step_loop.py",),
    smaller={
        "transformer": {
            "num_layers": 1, "num_single_layers": 0, "num_attention_heads": 2, "attention_head_dim": 16,
            "joint_attention_dim": 48, "pooled_projection_dim": 16, "axes_dims_rope": (4, 6, 6),
        },
        "text_encoder": {
            "hidden_size": 16, "intermediate_size": 32, "projection_dim": 16, "num_hidden_layers": 1,
            "num_attention_heads": 2,
        },
        "text_encoder_2": {"d_model": 48, "d_ff": 32, "num_layers": 1, "num_heads": 2, "d_kv": 8},
        "vae": {"block_out_channels": (4, 4, 8, 8), "layers_per_block": 1, "norm_num_groups": 2},
    },
)  # fmt: skip


class NotCompiledError(Exception):
    """What was to be compiled is not; says why."""


@dataclass(eq=False)
class Run:
    """One run: its scale, and when it must be over."""

    scale: Scale
    seconds: float
    begun: float = field(default_factory=time.monotonic)

    @property
    def left(self) -> float:
        """Seconds."""
        return self.seconds - (time.monotonic() - self.begun)


def bare(scale: Scale, name: str, **differing: Any) -> Any:
    """One component of the model: if it has weights, without memory for them."""
    kind, config = PARTS[name]
    made = random_models.made((kind, {**config, **scale.smaller.get(name, {}), **differing}))
    return made.to(DTYPE) if isinstance(made, torch.nn.Module) else made


def built(scale: Scale, name: str, **differing: Any) -> Any:
    """One component of the model: if it has weights, random ones on the device."""
    made = bare(scale, name, **differing)
    if isinstance(made, torch.nn.Module):
        random_models.randomise(made)
        made.requires_grad_(False)
    return made


def noise(*shape: int) -> torch.Tensor:
    """Random numbers on the device: on zeros some kernels are faster."""
    return torch.randn(shape, device=DEVICE, dtype=DTYPE)


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


@torch.inference_mode()
def timed(call: Callable[[], object]) -> Row:
    """`ms` of one call as the device takes them, `launch_ms` as the host does when it waits for nothing."""
    call()
    synchronize()
    begun = time.perf_counter()
    call()
    launched = time.perf_counter() - begun
    synchronize()
    return {"ms": _median_ms(call), "launch_ms": 1000 * launched}


def _median_ms(call: Callable[[], object]) -> float:
    """The median of some calls; on a GPU by its events, each after the L2 cache was emptied."""
    if DEVICE == "cuda":
        from triton.testing import do_bench

        return float(do_bench(call, warmup=10, rep=60, return_mode="median"))
    spent = []
    for _ in range(3):
        begun = time.perf_counter()
        call()
        spent.append(time.perf_counter() - begun)
    return 1000 * statistics.median(spent)


@torch.inference_mode()
def kernels(call: Callable[[], object]) -> list[tuple[str, int, float]]:
    """What runs in one call: each kernel's name, how often, and its microseconds in all; the longest first."""
    from torch.profiler import ProfilerActivity, profile

    activity = ProfilerActivity.CUDA if DEVICE == "cuda" else ProfilerActivity.CPU
    with profile(activities=[activity]) as profiler:
        call()
        synchronize()
    on_gpu = DEVICE == "cuda"
    rows = [
        (event.key[:100], event.count, event.self_device_time_total if on_gpu else event.self_cpu_time_total)
        for event in profiler.key_averages()
    ]
    return sorted(rows, key=lambda row: -row[2])[:40]
