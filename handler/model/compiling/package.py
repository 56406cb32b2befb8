"""Code for the blocks a model repeats, compiled once ahead of time and bound to the weights of every later worker.

A package is one file with machine code for each kind of repeated block and no weights: `bind_blocks` gives each
block of a loaded model the code over its own weights, in milliseconds and without Dynamo or Inductor. What differed
between the pictures drawn while compiling is dynamic, so one package serves every picture size, one or several at once.
A VAE's decoder can be one more block.
"""

import contextlib
import inspect
import json
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any

from handler.core.scratch import Scratch
from handler.model.compiling import toolchain
from handler.model.compiling.fusing import fuse
from handler.model.compiling.joining import joined
from handler.model.compiling.modulation import Modulations, take_out

OPTIONS = {  # no weights inside, and nothing assumed of the values of those it was compiled beside
    "aot_inductor.package": True,
    "aot_inductor.package_constants_in_so": False,
    "always_keep_tensor_constants": True,
    "joint_graph_constant_folding": False,
    "force_layout_optimization": True,  # channels last for convolutions of any size: of a fixed one it is anyway
    "shape_padding": False,  # else it times every product padded and unpadded, where sizes vary to no end
}
LAYOUT = "kindling"  # the entry of the code's metadata that says what it takes
# Of modules: what no code depends on, and the place of a block among others.
UNTOLD = {"training", "gradient_checkpointing", "forward", "layer_id"}


def compile_blocks(transformer: Any, draw: Callable[[], object], package: Path, decoder: Any = None) -> float:
    """Compile each kind of repeated block, and a VAE's decoder, into `package` (a .pt2 file); the seconds it took.

    `draw` draws pictures, a step each, that differ in size and in how many come at once, none alone: they show what
    the blocks take, and what of it varies. A 1 would be taken for a constant.
    """
    from torch._inductor.package.package import package_aoti

    start = time.perf_counter()
    firsts = {kind: blocks[0] for kind, blocks in _kinds(transformer, decoder).items()}
    calls = _calls(firsts, draw)
    with warnings.catch_warnings(), toolchain.environment():
        warnings.simplefilter("ignore")  # torch warns of its own deprecations
        package_aoti(str(package), {kind: _compiled(block, calls[kind]) for kind, block in firsts.items()})
    return time.perf_counter() - start


def _kinds(transformer: Any, decoder: Any = None) -> dict[str, list[Any]]:
    """The repeated blocks by kind, and the decoder, which is one of its own."""
    kinds: dict[str, list[Any]] = {}
    for module in transformer.modules():
        if type(module).__name__ in (transformer._repeated_blocks or ()):
            kinds.setdefault(kind_of(module), []).append(module)
    if not kinds:
        raise ValueError(f"{type(transformer).__name__} names no repeated blocks")
    return kinds if decoder is None else {**kinds, kind_of(decoder): [decoder]}


def kinds_of(transformer: Any, decoder: Any = None) -> list[str]:
    """The kinds of what is compiled."""
    return sorted(_kinds(transformer, decoder))


def kinds_in(package: Path) -> list[str]:
    """The kinds that a package has code for; none if it is no package."""
    with contextlib.suppress(zipfile.BadZipFile), zipfile.ZipFile(package) as file:
        paths = [name.split("/") for name in file.namelist()]
        return sorted({path[path.index("aotinductor") + 1] for path in paths if "aotinductor" in path[:-1]})
    return []


def kind_of(block: Any) -> str:
    """The name of its kind: same class, same names, types and shapes of weights, same settings, so the same code."""
    weights = [(n, str(w.dtype), list(w.shape), list(w.stride())) for n, w in _weights(block).items()]
    return f"{type(block).__name__}-{digest([weights, [*_settings(block)]])}"


def _settings(block: Any) -> Iterator[Any]:
    """What else its code is made for: heads, epsilons, flags, functions; of each module in it by name."""
    for path, module in block.named_modules():
        told = {name: value for name, value in vars(module).items() if name[0] != "_" and name not in UNTOLD}
        yield path, type(module).__qualname__, {name: _told(value) for name, value in told.items()}


def _told(value: Any) -> Any:
    """`value` as JSON has it; of what is no plain value, which function or class it is."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [_told(item) for item in value]
    if isinstance(value, dict):
        return {str(name): _told(item) for name, item in value.items()}
    return getattr(value, "__qualname__", type(value).__qualname__)


def digest(value: Any) -> str:
    """A short name for a JSON value."""
    return blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=8).hexdigest()


def _weights(block: Any) -> dict[str, Any]:
    return dict([*block.named_parameters(remove_duplicate=False), *block.named_buffers(remove_duplicate=False)])


def _calls(blocks: Mapping[str, Any], draw: Callable[[], object]) -> dict[str, list[dict[str, Any]]]:
    """What each block is called with while `draw` runs, by parameter name; only what holds tensors, or must be said."""
    calls: dict[str, list[dict[str, Any]]] = {kind: [] for kind in blocks}
    with contextlib.ExitStack() as hooks:
        for kind, block in blocks.items():

            def note(module: Any, args: Any, kwargs: Any, kind: str = kind) -> None:
                bound = inspect.signature(module.forward).bind(*args, **kwargs)
                needed = {p.name for p in bound.signature.parameters.values() if p.default is p.empty}
                given = {name: value for name, value in bound.arguments.items() if name in needed or [*_leaves(value)]}
                calls[kind].append(given)

            hooks.callback(block.register_forward_pre_hook(note, with_kwargs=True).remove)
        draw()
    return calls


def _leaves(value: Any) -> Iterator[Any]:
    """Everything in nested tuples, lists and dicts but None."""
    if isinstance(value, dict):
        value = tuple(value.values())
    if isinstance(value, tuple | list):
        for item in value:
            yield from _leaves(item)
    elif value is not None:
        yield value


def _compiled(block: Any, calls: list[dict[str, Any]]) -> Any:
    """Machine code for one block: what `package_aoti` puts into the package."""
    import torch
    from torch._inductor import aot_compile

    module, example, layout = program(block, calls)
    with torch.inference_mode(False):
        metadata = {"aot_inductor.metadata": {LAYOUT: layout}}
        return aot_compile(module, (), example, options={**options(module), **metadata})


def options(module: Any) -> dict[str, Any]:
    """With what Inductor compiles this graph: where tokens are rounded each with its own scale, by one kernel each.

    The sketches have so few that it would find the peaks of long ones by a kernel of its own, which reads them all.
    """
    over = [node.args[1] for node in module.graph.nodes if str(node.target) == "aten.amax.default"]
    return {**OPTIONS, "split_reductions": not over or any(len(axes) > 1 for axes in over)}


def program(block: Any, calls: list[dict[str, Any]]) -> tuple[Any, dict[str, Any], str]:
    """One block as the graph that is compiled, what it is called with by parameter name, and, as JSON, what it takes.

    `calls` differ in all that may vary. Fake tensors do as well.
    """
    import torch
    from torch.utils._pytree import tree_map, tree_map_only

    takes = [(str(first.dtype), _shape(first, *others)) for first, *others in zip(*map(_leaves, calls), strict=True)]
    with torch.inference_mode(False):
        example = tree_map_only(torch.Tensor, lambda t: torch.zeros_like(t.contiguous()), calls[0])
        exported = torch.export.export(block, (), example, dynamic_shapes=tree_map(_varying, *calls))
        decomposed = exported.run_decompositions({})  # into itself, but for mutations and what copies nothing
        module = decomposed.module(check_guards=False)
        made = {"merged": fuse(module), "modulation": take_out(module, example)}
    return module, example, json.dumps({"names": list(calls[0]), "takes": takes, **made})


def _varying(*values: Any) -> Any:
    """Which dimensions of a tensor differ from call to call, as `torch.export` wants it said."""
    from torch.export import Dim

    if values[0] is None:
        return None
    return {i: Dim.DYNAMIC for i, size in enumerate(_shape(*values)) if size is None}


def _shape(*tensors: Any) -> list[int | None]:
    """The sizes all of them share; None where they differ."""
    return [first if {first} == {*others} else None for first, *others in zip(*(t.shape for t in tensors), strict=True)]


def bind_blocks(transformer: Any, package: Path, decoder: Any = None) -> None:
    """Let a package's code, over the loaded weights, replace `forward` of every repeated block: of all, or of none.

    And of a VAE's decoder. The weights are shared, not copied: they must be where they will stay; the file need not.
    Code runs on one thread, in the order of one stream, and waits for nothing. What is unpacked goes when unbound.
    """
    from torch._C._aoti import AOTIModelPackageLoader  # below torch's own wrapper, which loads every kind each time

    forwards, modulations, split, unpacked = [], Modulations(), _split(transformer), Scratch()
    for kind, blocks in _kinds(transformer, decoder).items():
        for block in blocks:
            with toolchain.setting({"TMPDIR": str(unpacked.path)}):
                code = AOTIModelPackageLoader(str(package), kind, True, 1, -1)
            layout, weights = json.loads(code.get_metadata()[LAYOUT]), _weights(block)
            weights |= joined(weights, layout["merged"])
            code.load_constants({name: weights[name] for name in code.get_constant_fqns()}, False, True, True)
            making = layout["modulation"] and modulations.maker(layout["modulation"], weights)
            forwards.append((block, _forward(block, code, layout, making, split)))
    for block, forward in forwards:
        block.forward = forward
    transformer.modulations, transformer.unpacked = modulations, unpacked


def unbind_blocks(transformer: Any, decoder: Any = None) -> None:
    """Give every repeated block, and a VAE's decoder, its own `forward` back."""
    for blocks in _kinds(transformer, decoder).values():
        for block in blocks:
            block.__dict__.pop("forward", None)
    transformer.__dict__.pop("modulations", None)
    transformer.__dict__.pop("unpacked", None)


def _split(transformer: Any) -> Any:
    """How ranks share the tokens of a forward, if they do: evenly, as code is compiled for it, or not."""
    return getattr(getattr(transformer, "_parallel_config", None), "context_parallel_config", None)


def _forward(
    block: Any, code: Any, layout: dict[str, Any], modulate: Callable[[Any], Any] | None, split: Any
) -> Callable[..., Any]:
    """`code` as the block's forward. What it was not compiled for stays eager: the code itself checks nothing."""
    import torch
    from torch.utils._pytree import tree_unflatten, treespec_loads

    eager, run, result = block.forward, code.boxed_run, treespec_loads(code.get_call_spec()[1])
    names, parameters = layout["names"], tuple(inspect.signature(eager).parameters)
    takes = [(getattr(torch, dtype.removeprefix("torch.")), shape) for dtype, shape in layout["takes"]]
    at = layout["modulation"]["at"] if modulate else -1

    def forward(*args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(parameters, args, strict=False)), **kwargs}
        tensors = [leaf for name in names for leaf in _leaves(given.pop(name, None))]
        if [*_leaves(given)] or not _fits(tensors, takes) or (split and split.ulysses_anything):
            return eager(*args, **kwargs)
        if modulate:
            tensors[at] = modulate(tensors[at])
        return tree_unflatten(run([tensor.contiguous() for tensor in tensors]), result)

    return forward


def _fits(tensors: list[Any], layout: list[tuple[Any, list[int | None]]]) -> bool:
    return len(tensors) == len(layout) and all(
        getattr(tensor, "dtype", None) is dtype
        and tensor.ndim == len(shape)
        and all(want in (None, size) for want, size in zip(shape, tensor.shape, strict=True))
        for tensor, (dtype, shape) in zip(tensors, layout, strict=True)
    )
