"""A denoiser split over processes, each with a part of the tokens: diffusers' context parallelism, as a group of ranks.

Ulysses (https://arxiv.org/abs/2309.14509) exchanges tokens for heads around attention, and ring attention
(https://arxiv.org/abs/2310.01889) passes keys and values on. Either way each rank ends with the whole result.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from handler.core.errors import DeviceMissing, OutOfRange, SettingsError

BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}  # gloo for sizes too, which are on the CPU
SOCKET, LOOPBACK = "GLOO_SOCKET_IFNAME", "lo"  # else gloo looks for this machine's name, which may lead nowhere
COMPILED = "kindling-compiled"  # the group of compiled code, which has its name in it
SPLIT = ("hidden_states", "encoder_hidden_states")  # tensors (picture, token, channel) of a forward


def require_devices(device: str, ranks: int) -> None:
    """DeviceMissing if this machine has fewer GPUs than there are to be ranks."""
    if device == "cuda" and (there := torch.cuda.device_count()) < ranks:
        raise DeviceMissing(f"{ranks} GPUs are to draw each picture, and this machine shows {there}.")


def require_alone() -> None:
    """SettingsError if this process belongs to a group: a program that has one cannot hold a worker of several GPUs."""
    if dist.is_initialized():
        raise SettingsError("This program has a torch.distributed group already; draw on one GPU here.")


def join(rank: int, ranks: int, device: str, store: Path, patience_s: float) -> None:
    """Become `rank` of the group that meets in the file `store`; what takes longer than `patience_s` raises ever after.

    The group is this process's one: SettingsError if it has another.
    """
    require_alone()
    dist.init_process_group(
        BACKENDS[device],
        init_method=store.as_uri(),
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=patience_s),
    )


@contextmanager
def at_home() -> Iterator[None]:
    """While groups are made: all ranks are on this machine."""
    before = os.environ.get(SOCKET)
    os.environ.setdefault(SOCKET, LOOPBACK)
    try:
        yield
    finally:
        if before is None:
            del os.environ[SOCKET]


def leave() -> None:
    """Belong to no group any more."""
    if dist.is_initialized():
        dist.destroy_process_group()


def split(model: Any, ulysses: int, ring: int, device: str, patience_s: float) -> None:
    """Let this rank compute its part of `model`, one of `ulysses` times `ring`; SettingsError if attention forbids it.

    What `ModelMixin.enable_parallelism` does, but that works without an accelerator too, and with any number of tokens:
    where they cannot be split evenly, ranks tell each other around attention how many they have.
    """
    from diffusers.hooks.context_parallel import apply_context_parallel
    from diffusers.models._modeling_parallel import (
        ContextParallelConfig,
        ContextParallelOutput,
        ParallelConfig,
    )
    from torch.distributed.device_mesh import init_device_mesh

    config: Any = ContextParallelConfig(ulysses_degree=ulysses, ring_degree=ring)
    whole = ParallelConfig(context_parallel_config=config)
    mesh = init_device_mesh(device, config.mesh_shape, mesh_dim_names=config.mesh_dim_names)
    whole.setup(dist.get_rank(), dist.get_world_size(), torch.device(device), mesh=mesh)
    if ring == 1:
        config._ulysses_mesh = Groups(dist.group.WORLD, _compiled(patience_s))
    layers = [module for module in model.modules() if hasattr(getattr(module, "processor", None), "_parallel_config")]
    for layer in layers:
        _require_splittable(layer.processor._attention_backend)
        layer.processor._parallel_config = whole
    model._parallel_config = whole
    ends = {name for name, plan in model._cp_plan.items() if isinstance(plan, ContextParallelOutput)}
    apply_context_parallel(model, config, {name: plan for name, plan in model._cp_plan.items() if name not in ends})
    parts = Parts(config)
    model.register_forward_pre_hook(parts.look, with_kwargs=True)
    for name in ends:
        model.get_submodule(name).register_forward_hook(parts.gather)


@dataclass(frozen=True, slots=True)
class Groups:
    """In the place of a mesh: ranks exchange by `eager`, but in code that is being compiled by `compiled`.

    A group lets go of tensors late, on a thread of its own, under a lock that whoever uses the group takes too. To let
    go of Python's it needs the interpreter, which compiled code keeps. So that has a group that sees none of them.
    """

    eager: Any
    compiled: Any

    def get_group(self) -> Any:
        """The one to use here."""
        return self.compiled if torch.compiler.is_exporting() else self.eager


def _compiled(patience_s: float) -> Any:
    """A group of all ranks by the name that is in compiled code, in every process and start the same."""
    registry: Any = dist.distributed_c10d
    group = dist.new_group(timeout=timedelta(seconds=patience_s))
    group._set_group_name(COMPILED)
    registry._register_process_group(COMPILED, group)
    return group


def _require_splittable(kernel: Any) -> None:
    from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

    kernel = AttentionBackendName(kernel or "native")
    if not _AttentionBackendRegistry._is_context_parallel_available(kernel):
        told = f"{kernel.value} cannot be split over several GPUs. Use auto, or native."
        raise SettingsError(f"KINDLING_ATTENTION: {told}", "KINDLING_ATTENTION")


class Parts:
    """Which part of the tokens each rank has in this forward of the model. All ranks see the same."""

    def __init__(self, config: Any) -> None:
        self._config, self._ranks, self._tokens = config, config.ulysses_degree * config.ring_degree, 0

    def look(self, _: Any, args: Any, kwargs: Any) -> None:
        """At what comes in, before it is split: (picture, token, channel). OutOfRange if it cannot be."""
        lengths = [kwargs[name].shape[1] for name in SPLIT if name in kwargs]
        self._tokens = lengths[0]
        uneven = any(length % self._ranks for length in lengths)
        if uneven and min(self._config.ring_degree, self._config.ulysses_degree) > 1:  # diffusers splits evenly then
            told = f"width / 16 x height / 16, of images too, has to be a multiple of {self._ranks} here"
            raise OutOfRange(f"size: {told}, for {self._ranks} GPUs draw each picture.", "size")
        self._config.ulysses_anything = uneven and self._config.ring_degree == 1
        self._config.ring_anything = uneven and self._config.ulysses_degree == 1

    def gather(self, _: Any, args: Any, part: torch.Tensor) -> torch.Tensor:
        """The whole output, of this rank's part of it. Parts travel in one size, for gloo takes no others."""
        sizes = [len(each) for each in torch.arange(self._tokens).tensor_split(self._ranks)]
        padded = torch.nn.functional.pad(part, (0, 0, 0, sizes[0] - part.shape[1])).contiguous()
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded)
        return torch.cat([each[:, :size] for each, size in zip(parts, sizes, strict=True)], dim=1)


def in_step(number: int, seconds: float) -> bool:
    """Whether all ranks are at the same place, as each says `number`: after a run that some of them did not finish."""
    said = torch.tensor([number, -number], dtype=torch.int64)
    try:
        dist.all_reduce(said, op=dist.ReduceOp.MAX, async_op=True).wait(timedelta(seconds=seconds))
    except RuntimeError:
        return False
    return said.tolist() == [number, -number]
