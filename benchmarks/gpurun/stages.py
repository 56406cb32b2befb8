"""The stages of a picture on a GPU: what the device spends in each, and what the host does to launch it."""

import functools
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch

from gpurun.scale import DEVICE, Row, synchronize

Stage = tuple[str, float, Any, Any]  # its name, the host's seconds, and the device's marks around it


@contextmanager
def watched(pipeline: Any) -> Iterator[list[Stage]]:
    """Note what the host and the device spend in each stage of a picture."""
    stages: list[Stage] = []

    def noting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            begun, start = time.perf_counter(), mark()
            result = function(*args, **kwargs)
            stages.append((name, time.perf_counter() - begun, start, mark()))
            return result

        return call

    with ExitStack() as stack:
        places = (("encode", pipeline, "encode_prompt"), ("step", pipeline.transformer, "forward"))
        for name, owner, method in (*places, ("decode", pipeline.vae, "decode")):
            stack.enter_context(mock.patch.object(owner, method, noting(name, getattr(owner, method))))
        yield stages


def mark() -> Any:
    """A point in the device's work; of a CPU's, now."""
    if DEVICE != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def between(start: Any, end: Any) -> float:
    """Milliseconds."""
    return float(start.elapsed_time(end)) if DEVICE == "cuda" else 1000 * (end - start)


def told(stages: list[Stage]) -> Row:
    """Milliseconds of each stage: the device's, and the host's to launch it; of steps the medians."""
    synchronize()
    row: Row = {}
    for name in dict.fromkeys(stage[0] for stage in stages):
        those = [(1000 * seconds, between(start, end)) for each, seconds, start, end in stages if each == name]
        row[f"{name}_launch_ms"], row[f"{name}_ms"] = (statistics.median(column) for column in zip(*those, strict=True))
    return row


def peak_gb() -> float:
    """The most memory that tensors took at once, since the last time this was asked; 0 on a CPU."""
    if DEVICE != "cuda":
        return 0.0
    peak = torch.cuda.max_memory_allocated() / 1e9
    torch.cuda.reset_peak_memory_stats()
    return peak
