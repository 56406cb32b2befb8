"""Which kernel computes attention: the fastest on the model's own tensors, measured in some tens of milliseconds."""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from handler.catalog.attention import KERNELS, NATIVE, KernelChoice, backend
from handler.core.errors import BudgetExceeded, DeviceLost, SettingsError
from handler.core.tracebacks import let_go
from handler.model.faults import meaning

MARGIN = 0.05  # how much faster another must be: less is noise, and would change pixels from one worker to the next
BOUND = 0.01  # of a result's norm that may differ from native's: 16-bit kernels differ by 0.0025, 8-bit ones by 0.05
ROUNDS, REPEATS = 7, 3
NEEDED_S = 30.0  # of the budget, for the picture that shows the model's tensors: a cold one
TOLD = 120  # characters of an error
SAME = ("attn_mask", "is_causal", "scale", "enable_gqa")  # what the dispatcher hands on as it got it
Call = Mapping[str, Any]  # the arguments of one call of torch's scaled_dot_product_attention


@dataclass(frozen=True, slots=True)
class Timing:
    """What one call takes in milliseconds, or why this kernel may not win."""

    id: str
    ms: float | None
    why: str = ""


def dispatches(model: Any) -> bool:
    """Whether `model` computes attention by diffusers' dispatcher, so that there is a choice at all."""
    processors = (getattr(module, "processor", None) for module in model.modules())
    return any(hasattr(processor, "_attention_backend") for processor in processors)


def use(model: Any, chosen: KernelChoice) -> None:
    """Let `model` compute attention so; SettingsError if it has no choice."""
    if dispatches(model):
        model.set_attention_backend(backend(chosen.id))
    elif chosen.id != NATIVE:
        told = f"{chosen.reason}: diffusers has only native for {type(model).__name__}. Use auto."
        raise SettingsError(told, "KINDLING_ATTENTION")


@contextmanager
def compiling(kernel: str) -> Iterator[None]:
    """While blocks are compiled: exported code leaves the choice among torch's own kernels to torch, so tell torch."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    if not KERNELS[kernel].order:
        yield
        return
    with sdpa_kernel([getattr(SDPBackend, name) for name in KERNELS[kernel].order], set_priority=True):
        yield


def unmeasured(model: Any, streaming: bool, remaining_s: float) -> str:
    """Why measuring would not pay; empty if it would. `streaming`: the model's blocks wait in host memory."""
    if not dispatches(model):
        return f"diffusers has no other for {type(model).__name__}"
    if streaming:
        return "blocks take longer to come from host memory than attention takes"
    if remaining_s < NEEDED_S:
        return f"measuring may take {NEEDED_S:.0f} s, and {remaining_s:.0f} s are left"
    return ""


def measured(model: Any, refused: Mapping[str, str], draw: Callable[[], object]) -> KernelChoice:
    """`fastest`, but native where that cannot be told: it may draw where measuring found no memory, or NaN."""
    try:
        return fastest(model, refused, draw)
    except BudgetExceeded:
        raise
    except Exception as error:
        why = f"measuring failed: {(str(error) or type(error).__name__).splitlines()[0][:TOLD]}"
        if isinstance(meant := meaning(error, (0, 0)), DeviceLost):
            raise meant from error
        let_go(error)
        return KernelChoice(NATIVE, why)


def fastest(model: Any, refused: Mapping[str, str], draw: Callable[[], object]) -> KernelChoice:
    """The kernel that is best at what `model` asks of attention while `draw` draws, and why; never one of `refused`."""
    use(model, KernelChoice(NATIVE, "to see what is asked"))
    calls = calls_of(draw)
    if not calls:
        return KernelChoice(NATIVE, f"{type(model).__name__} asked for no attention")
    return decide(measure(calls, refused), max(map(_tokens, calls)))


def decide(timings: list[Timing], tokens: int) -> KernelChoice:
    """The fastest by `MARGIN`, of two alike the earlier, so native if in doubt; and the figures that say so."""
    best = timings[0]
    for timing in timings[1:]:
        if timing.ms is not None and best.ms is not None and timing.ms < (1 - MARGIN) * best.ms:
            best = timing
    raced = [timing for timing in timings if timing.ms is not None and timing is not best]
    against = ", against " * bool(raced) + ", ".join(f"{KERNELS[t.id].name} {t.ms:.2f} ms" for t in raced)
    figures = f"{KERNELS[best.id].name} {best.ms:.2f} ms for {tokens} tokens{against}"
    return KernelChoice(best.id, "; ".join([figures, *(f"{KERNELS[t.id].name} {t.why}" for t in timings if t.why)]))


def calls_of(draw: Callable[[], object]) -> list[Call]:
    """One call of each shape that diffusers' dispatcher, on native, makes to torch while `draw` draws."""
    import torch
    from torch.overrides import TorchFunctionMode

    seen: dict[str, Call] = {}

    class Note(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            given = kwargs or {}
            if function is torch.nn.functional.scaled_dot_product_attention and not args:  # others do not name them
                tensors = [(n, list(t.shape), t.dtype) for n, t in given.items() if isinstance(t, torch.Tensor)]
                seen.setdefault(str(tensors), given)
            return function(*args, **given)

    with Note():
        draw()
    return list(seen.values())


def _tokens(call: Call) -> int:
    count: int = call["query"].shape[2]
    return count


def measure(calls: list[Call], refused: Mapping[str, str]) -> list[Timing]:
    """Native's timing of the longest call, then those of all kernels that can do every call as native does it."""
    import torch

    longest, found = max(calls, key=_tokens), dict[str, list[float]]()
    with torch.inference_mode():
        why = {name: refused.get(name) or _unlike(name, calls) for name in KERNELS} | {NATIVE: ""}
        for _ in range(ROUNDS):
            for name in (name for name in KERNELS if not why[name]):
                found.setdefault(name, []).append(_milliseconds(name, longest))
    return [Timing(name, statistics.median(found[name]) if name in found else None, why[name]) for name in KERNELS]


def _unlike(kernel: str, calls: list[Call]) -> str:
    """Why this kernel may not win: it fails, or differs from native. Empty if neither; it is then warm."""
    for call in calls:
        want = _attended(NATIVE, call).float()
        try:
            apart = float((_attended(kernel, call).float() - want).norm() / want.norm())
        except Exception as error:
            if isinstance(meant := meaning(error, (0, 0)), DeviceLost):
                raise meant from error
            return f"cannot do it: {(str(error) or type(error).__name__).splitlines()[0][:TOLD]}"
        if not apart <= BOUND:  # NaN neither
            return f"differs from native by {apart:.3f} of its norm"
    return ""


def _attended(kernel: str, call: Call) -> Any:
    """What the kernel makes of a call, by the dispatcher, which wants tokens before heads."""
    from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn

    tensors = (call[name].transpose(1, 2) for name in ("query", "key", "value"))
    same = {name: call[name] for name in SAME if name in call}
    return dispatch_attention_fn(*tensors, **same, backend=AttentionBackendName(backend(kernel)))


def _milliseconds(kernel: str, call: Call) -> float:
    import torch

    wait: Callable[[], object] = torch.cuda.synchronize if call["query"].is_cuda else lambda: None
    wait()
    begun = time.perf_counter()
    for _ in range(REPEATS):
        _attended(kernel, call)
    wait()
    return (time.perf_counter() - begun) / REPEATS * 1000
