"""What diffusers asks of a pipeline's modules for every picture, answered without walking their trees.

It looks for hooks of its own offloading, casting and caching, none of which is used here, and for the first parameter,
to say where and of which type a module is: 9 to 15 ms of a FLUX.1 picture before its first kernel is launched. `settle`
notes the answers once, and functions that know them take the place of those that look. For modules that were not
settled, and where a version of diffusers was not read or lacks a name, diffusers looks as ever.
"""

import functools
import logging
import pkgutil
import sys
from collections.abc import Callable, Iterator
from typing import Any
from weakref import WeakKeyDictionary

import diffusers
import torch
from torch import nn

READ = ("0.42.1",)  # versions whose private functions are those that are replaced here
log = logging.getLogger(__name__)
Place = tuple[dict[str, Any], str]  # of a tensor: it may be cast, or give way to another one
_telling: WeakKeyDictionary[nn.Module, tuple[Place, Place]] = (
    WeakKeyDictionary()
)  # of a module's device, and of its type
_runs_on: WeakKeyDictionary[nn.Module, torch.device] = WeakKeyDictionary()  # by the VAE, which a pipeline's edits share


def settle(pipeline: Any) -> None:
    """Note the answers of a pipeline that is loaded, with the weights that it will keep."""
    if diffusers.__version__ not in READ:
        log.warning("diffusers %s is not known here: for each picture it walks all modules", diffusers.__version__)
        return
    _replace()
    for part in pipeline.components.values():
        if isinstance(part, nn.Module) and isinstance(part, diffusers.ModelMixin):
            first, *_ = found = list(places(part))
            _telling[part] = first, next(place for place in found if _at(place).dtype == part.dtype)
    _runs_on[pipeline.vae] = pipeline._execution_device


def places(part: nn.Module) -> Iterator[Place]:
    """Where its tensors are: parameters, then buffers, in the order in which diffusers finds them."""
    for kind in ("_parameters", "_buffers"):
        for module in part.modules():
            tensors: dict[str, Any] = getattr(module, kind)
            yield from ((tensors, name) for name, tensor in tensors.items() if tensor is not None)


def _at(place: Place) -> Any:
    tensors, name = place
    return tensors[name]


@functools.cache
def _replace() -> None:
    """Once, in every module that has imported the name by now; later ones import what is in its place."""
    for place, name, knowing in KNOWING:
        owner = pkgutil.resolve_name(place)
        if looking := getattr(owner, name, None):
            modules = [module for key, module in [*sys.modules.items()] if key.startswith("diffusers.")]
            for holder in (owner, *modules):
                if vars(holder).get(name) is looking:
                    setattr(holder, name, knowing(looking))


def _function(answer: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """What takes a function's place: `answer` for a module that was settled."""
    return lambda looking: lambda module: answer(module) if module in _telling else looking(module)


def _reset(looking: Callable[..., None]) -> Any:
    """A registry knows those below it, once it has looked."""

    def reset(registry: Any, recurse: bool = True) -> None:
        settled = registry._module_ref in _telling
        looking(registry, recurse and not settled)
        for below in registry._get_child_registries() if recurse and settled else ():
            looking(below, False)

    return reset


def _execution_device(looking: Any) -> Any:
    def device(pipeline: Any) -> Any:
        vae: Any = getattr(pipeline, "vae", None)  # those of other programs may have none
        return _runs_on[vae] if vae in _runs_on else looking.fget(pipeline)

    return property(device)


KNOWING: tuple[tuple[str, str, Callable[[Any], Any]], ...] = (
    ("diffusers.hooks.group_offloading", "_get_top_level_group_offload_hook", _function(lambda module: None)),
    (
        "diffusers.models.modeling_utils",
        "get_parameter_device",
        _function(lambda module: _at(_telling[module][0]).device),
    ),
    (
        "diffusers.models.modeling_utils",
        "get_parameter_dtype",
        _function(lambda module: _at(_telling[module][1]).dtype),
    ),
    ("diffusers.utils.torch_utils", "get_module_execution_device", _function(lambda module: module.device)),
    ("diffusers.hooks.hooks:HookRegistry", "reset_stateful_hooks", _reset),
    ("diffusers:DiffusionPipeline", "_execution_device", _execution_device),
)
