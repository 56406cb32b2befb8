"""Ranks that encode a prompt together, each with a part of the text encoder's weights: tensor parallelism.

Of what makes heads and neurons each rank has its part (https://arxiv.org/abs/1909.08053); what brings these back to the
width of a token makes a part of a sum on each rank. Which layers these are is transformers' `base_model_tp_plan` of
Mistral, Qwen2.5-VL and Qwen3.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

from handler.core.errors import SettingsError

ROWS, COLUMNS = 0, 1  # of a weight (out, in)
AXES = {
    **dict.fromkeys(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"), ROWS),
    **dict.fromkeys(("self_attn.o_proj", "mlp.down_proj"), COLUMNS),
}
LAYER = re.compile(r"(?:^|\.)layers\.\d+\.(\w+\.\w+)$")  # of the language model: those of what it sees are blocks


@dataclass(frozen=True, slots=True)
class Shard:
    """What `rank` has of a text encoder in so many `parts`; of more ranks several have the same."""

    rank: int = 0
    parts: int = 1

    def shares(self, name: str) -> bool:
        """Whether it has only a part of the tensor of that name."""
        return self.parts > 1 and _axis(name) is not None

    def of(self, name: str, tensor: Any) -> Any:
        """What it has of a tensor: a view."""
        axis = _axis(name) if self.parts > 1 else None
        return tensor if axis is None else tensor.chunk(self.parts, axis)[self.rank % self.parts]


WHOLE = Shard()


def _axis(name: str) -> int | None:
    """Along which a tensor is cut."""
    path, _, kind = name.rpartition(".")
    layer = LAYER.search(path)
    axis = AXES.get(layer[1]) if layer else None
    return axis if kind == "weight" or (kind, axis) == ("bias", ROWS) else None


def together(encoders: Iterable[Any], parts: int, patience_s: float) -> None:
    """Let `encoders`, of which this rank has one of so many parts, sum up with its neighbours, which have the others.

    All ranks have to come here. What takes longer than `patience_s` raises ever after.
    """
    import torch.distributed as dist

    group = None
    if parts < dist.get_world_size():
        group, _ = dist.new_subgroups(parts, timeout=timedelta(seconds=patience_s))
    for encoder in encoders:
        for name, layer in encoder.named_modules():
            if _axis(f"{name}.weight") == COLUMNS:
                _require_split(name, layer, parts)
                layer.register_forward_hook(partial(_sum, group))


def _require_split(name: str, layer: Any, parts: int) -> None:
    if layer.bias is not None or layer.weight.shape[1] * parts != layer.in_features:
        raise SettingsError(f"KINDLING_TP_SIZE: {name} of the text encoder cannot be split. Use 1.", "KINDLING_TP_SIZE")


def _sum(group: Any, _: Any, __: Any, part: Any) -> Any:
    import torch.distributed as dist

    dist.all_reduce(part, group=group)
    return part
