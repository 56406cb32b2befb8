"""What a replica of a model needs of a node, and how many pictures it draws at once, as far as that is known ahead."""

import math
from dataclasses import dataclass

from handler.catalog.gpus import Gpu
from handler.catalog.spec import ModelSpec
from handler.core.settings import Settings
from handler.engine.batching import at_once
from handler.worker.outlook import outlook

PARTS = 20  # of a GPU: its need is rounded up to whole ones


@dataclass(frozen=True, slots=True)
class Need:
    """`gpus` are a part of one or whole ones, 0 for a model on a CPU. `together` pictures are drawn at once."""

    gpus: float
    together: int


def replica_need(settings: Settings, spec: ModelSpec, gpu: Gpu | None) -> Need:
    """By what a worker will do on `gpu`; a StartError says why it cannot run there.

    A part of a GPU is the share of its memory that the model needs: others may have the rest. What streams its weights
    has all of one.
    """
    together = at_once(settings.batch, {}, spec.size)
    if gpu is None:
        return Need(0, together)
    seen = outlook(settings, spec, gpu, math.inf)  # how much memory the node has is for the worker there to find
    plan = seen.require()
    if seen.receipt:
        together = at_once(settings.batch, seen.receipt.figures.batches, spec.size)
    if settings.ranks > 1:
        return Need(settings.ranks, together)
    share = math.ceil(plan.needs_gb / gpu.memory_gb * PARTS) / PARTS if plan.mode == "resident" else 1
    return Need(min(1, share), together)
