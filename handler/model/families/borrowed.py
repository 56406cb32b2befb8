"""What a call of a pipeline borrows, its components, comes back as it was, however the call ends.

diffusers' pipelines change their components and change them back at the end, which an error never reaches: SDXL decodes
with its VAE in fp32, Qwen-Image's VAE holds what it made of a frame. Without this, one picture that failed would spoil
all later ones.
"""

import traceback
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from handler.model import offload
from handler.model.families.constants import Place, places

Noted = list[tuple[dict[str, Any], dict[str, Any]]]  # dicts, and what was in them


class Components:
    """Those of a pipeline that is loaded, with the types and devices that its weights will keep."""

    def __init__(self, pipeline: Any) -> None:
        self._attributes: dict[str, Any] = vars(pipeline)
        self._parts: dict[str, Any] = dict(getattr(pipeline, "components", {}))
        models = [part for part in self._parts.values() if isinstance(part, nn.Module)]
        stay = [place for model in models if model not in offload.streamed for place in places(model)]
        self._kinds = [(place, _kind(place)) for place in stay]

    @contextmanager
    def lent(self) -> Iterator[None]:
        """Lend them. What is raised inside takes with it whatever was changed: types, devices, attributes, hooks."""
        before = [each for part in self._parts.values() for each in _noted(part)]
        try:
            yield
        except BaseException as error:
            traceback.clear_frames(error.__traceback__)  # they hold the memory that this may need
            self._bring_back(before)
            raise

    def _bring_back(self, before: Noted) -> None:
        self._attributes.update(self._parts)
        for found, kept in before:
            found.clear()
            found.update(kept)
        with torch.inference_mode(False), torch.no_grad():
            for (tensors, name), (dtype, device) in self._kinds:
                if _kind((tensors, name)) != (dtype, device):
                    tensors[name].data = tensors[name].data.to(device, dtype)


def _kind(place: Place) -> tuple[torch.dtype, torch.device]:
    tensors, name = place
    return tensors[name].dtype, tensors[name].device


def _noted(part: Any) -> Noted:
    """The attributes of a component, and of a model also its hooks, weights and modules, a level deep."""
    attributes = getattr(part, "__dict__", {})
    inside = attributes.values() if isinstance(part, nn.Module) else ()
    return [(each, dict(each)) for each in (attributes, *inside) if type(each) in (dict, OrderedDict)]
