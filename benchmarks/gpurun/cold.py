"""Cold starts on a GPU without a volume of 34 GB: random fp8 weights, baked in memory; servers that start from them."""

import gc
import tempfile
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path

import torch

import cold_start
from gpurun.pictures import ready, started, studio
from gpurun.scale import MODEL, Case, NotCompiledError, Row, Run
from handler import MODELS, Worker
from handler.volume.publishing import publishing
from handler.volume.sources import weight_facts

MEMORY = Path("/dev/shm")  # noqa: S108


@cache
def volume(run: Run) -> tempfile.TemporaryDirectory[str]:
    """The run's volume, in memory where there is such a disk; gone with the process."""
    return tempfile.TemporaryDirectory(prefix="kindling-", dir=MEMORY if MEMORY.is_dir() else None)


def bake(run: Run) -> Iterator[Case]:
    """Leave compiled code and rounded weights where `python -m handler bake` would."""
    room, folder = studio(run), Path(volume(run).name)
    room.quantise("fp8")
    with room.engine("on", room.spec(text_tokens=MODELS[MODEL].text_tokens), folder) as engine:
        yield "compiling", partial(started, engine)
        if worker := ready(engine):
            yield "leaving the weights", partial(_left, worker, folder)
    del room, engine, worker
    studio.cache_clear()
    gc.collect()
    torch.cuda.empty_cache()  # the servers want the GPU


def _left(worker: Worker, folder: Path) -> Row:
    spec, precision = worker.spec, worker.hardware.precision
    target = folder / "baked" / spec.id / f"{precision}-{spec.revision[:8]}"
    with publishing(target, weight_facts(spec, precision)) as part:
        worker.save(part)
    return {"gbytes": worker.weight_bytes / 1e9}


def starts(run: Run) -> Iterator[Case]:
    """Servers, one after the other, each from the birth of its process to its first picture."""
    folder = Path(volume(run).name)
    for number in range(run.scale.starts):
        yield f"start {number + 1}", partial(_started, folder)


def _started(folder: Path) -> Row:
    start = cold_start.start(MODEL, folder, "auto", precision="fp8")
    if start.eager:
        raise NotCompiledError(start.plan)
    return {f"{name}_s": seconds for name, seconds in start.seconds.items()} | {"peak_mb": start.peak_mb}
