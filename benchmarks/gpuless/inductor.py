"""What Inductor makes of an exported program, as AOTInductor would get it: kernels, launches and bytes, nothing run.

It stops once all kernels are written. A program whose sizes are open is then counted at any sizes that are asked for:
the code is that for the pictures it was exported beside, as a worker's is.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch._inductor import aot_compile, graph
from torch._inductor.dependencies import MemoryDep
from torch._inductor.scheduler import BaseSchedulerNode, ExternKernelSchedulerNode, NopKernelSchedulerNode
from torch._inductor.utils import sympy_subs
from torch._inductor.virtualized import V
from torch.utils._pytree import tree_structure, tree_unflatten

from gpuless.eager import ATTENTION, FREE, LEFT, attention_line, kind, product
from gpuless.work import BYTES, Region, Work, line, values

QUANTISED = (torch.float8_e4m3fn, torch.int8, torch.float4_e2m1fn_x2)
PLACES = ("torch", "ops", "aten", "kindling", "extern_kernels")  # of a kernel's full name
Shapes = list[tuple[int, ...]]


class Lowered:
    """A program after lowering. Keep none: it holds all that Inductor knew."""

    def __init__(self, lowering: Any) -> None:
        self.graph, self.values = lowering, dict[Any, int]()

    def at(self, shapes: Shapes) -> Work:
        """The work for inputs of these shapes."""
        inputs = [value for value in self.graph.graph_inputs.values() if hasattr(value, "get_size")]
        self.values = {}
        for value, shape in zip(inputs, shapes, strict=True):
            self.values |= {e: size for e, size in zip(value.get_size(), shape, strict=True) if e.is_Symbol}
        found = [tuple(map(self.number, value.get_size())) for value in inputs]
        assert found == shapes, f"compiled for other sizes: {[value.get_size() for value in inputs]}, {shapes}"
        with V.set_graph_handler(self.graph):
            return self._count()

    def number(self, expression: Any) -> int:
        """A size, with the inputs' sizes put in."""
        return int(sympy_subs(self.graph.sizevars.simplify(expression), self.values))

    def _start(self, expression: Any) -> Any:
        """A place in a buffer: a number, unless it depends on what is in memory."""
        place = sympy_subs(self.graph.sizevars.simplify(expression), self.values).expand(identity=True)
        return int(place) if place.is_Integer else place

    def _count(self) -> Work:
        work, casts = Work(kernels=len(self.graph.wrapper_code.src_to_kernel)), set()
        for node in self.graph.scheduler.nodes:
            if isinstance(node, ExternKernelSchedulerNode):
                self._extern(node.node, work)
                casts |= _rounded(node.node)
            elif not isinstance(node, NopKernelSchedulerNode):
                work.launches += 1
                work.triton_bytes += self._touched(node)
        work.casts = len(casts)
        return work

    def _extern(self, node: Any, work: Work) -> None:
        """A kernel that was there before: heavy, or counted by what it takes and leaves."""
        tensors, name = [value for value in node.inputs if value.has_tensor_output()], _name(node)
        if type(node).__name__ == "MultiOutput":  # one of several results of another node
            work.extern_bytes += self._bytes(node) if _name(node.inputs[0]) not in ATTENTION else 0
            return
        if name in FREE:
            return
        shapes = [[self.number(size) for size in value.get_size()] for value in tensors]
        if name in LEFT:
            result = [self.number(size) for size in node.get_size()]
            return work.add(product(tensors[LEFT[name]].get_dtype(), shapes[LEFT[name]], result))
        if name in ATTENTION:
            return work.add(attention_line(ATTENTION[name], tensors[0].get_dtype(), *shapes[:2]))
        if name == "convolution":
            result = [self.number(size) for size in node.get_size()]
            return work.add(line("conv", kind(tensors[0].get_dtype()), *_convolution(shapes, result)))
        work.launches += 1
        work.extern_bytes += sum(self._bytes(value) for value in (*tensors, node) if value.has_tensor_output())

    def _bytes(self, value: Any) -> int:
        width = BYTES.get(kind(value.get_dtype()), value.get_dtype().itemsize)
        return int(width * _product(map(self.number, value.get_size())))

    def _touched(self, node: BaseSchedulerNode) -> int:
        """Bytes a generated kernel reads and writes, each region of a buffer once, what stays inside it not at all."""
        mine, regions = set(node.get_nodes()), dict[str, set[Region]]()
        for dep in node.read_writes.reads_and_writes():
            if not isinstance(dep, MemoryDep) or self._inner(dep.name, mine):
                continue
            place = (self._start(dep.get_offset()), self.number(dep.get_numel()))
            regions.setdefault(dep.name, set()).add(place)  # one region may be walked in several ways
        total = 0
        for name, places in regions.items():
            whole = _product(map(self.number, V.graph.get_buffer(name).get_size()))
            total += min(values(places), whole) * V.graph.get_dtype(name).itemsize
        return total

    def _inner(self, name: str, nodes: set[Any]) -> bool:
        """Whether nothing but these nodes uses the buffer, and one of them makes it."""
        buffer = self.graph.scheduler.name_to_buf.get(name)
        return buffer is not None and buffer.defining_op in nodes and all(u.node in nodes for u in buffer.users)


def _name(node: Any) -> str:
    """torch.ops.aten._scaled_dot_product_cudnn_attention.default -> _scaled_dot_product_cudnn_attention"""
    name = getattr(node, "python_kernel_name", None) or ""
    return next((part for part in str(name).split(".") if part not in PLACES), "")


def _convolution(shapes: list[list[int]], result: list[int]) -> tuple[int, ...]:
    out, into, *kernel = shapes[1]
    return shapes[0][0], out, into, _product(kernel), _product(result[2:])


def _rounded(node: Any) -> set[str]:
    """The buffer of few bits that a product takes as its activations, if it does."""
    if (name := _name(node)) in LEFT and (left := node.inputs[LEFT[name]]).get_dtype() in QUANTISED:
        return {left.get_name()}
    return set()


def _product(sizes: Any) -> int:
    total = 1
    for size in sizes:
        total *= size
    return total


class _Stop(Exception):
    """Raised where all kernels are written, with what Inductor knows then."""


@contextmanager
def distinct_weights() -> Iterator[None]:
    """Fakes have no memory, by which Inductor tells whether two weights are one."""
    before, graph.is_same_tensor = graph.is_same_tensor, lambda one, other: one is other
    try:
        yield
    finally:
        graph.is_same_tensor = before


@contextmanager
def _stopping() -> Iterator[None]:
    """Inductor stops after its kernels, before anything is compiled."""

    def codegen(self: Any) -> Any:
        self.init_wrapper_code()
        self._update_scheduler()
        self.wrapper_code.push_codegened_graph(self)
        self.scheduler.codegen()
        raise _Stop(self)

    before, graph.GraphLowering.codegen = graph.GraphLowering.codegen, codegen
    try:
        with distinct_weights():
            yield
    finally:
        graph.GraphLowering.codegen = before


def lower(module: Any, example: Mapping[str, Any], options: Mapping[str, Any]) -> Lowered:
    """An exported module, of fakes and called with keywords, lowered as AOTInductor would with these options."""
    values = placeholders(module)
    with mode_of(values), torch.inference_mode(False), _stopping():
        fill(module)
        try:
            aot_compile(module, (), tree_unflatten(values, tree_structure(dict(example))), options=dict(options))
        except Exception as error:
            return Lowered(_stopped(error).args[0])
    raise AssertionError("Inductor did not stop")


def placeholders(module: Any) -> list[Any]:
    """The tensors that an exported module was exported beside."""
    return [node.meta.get("val") for node in module.graph.nodes if node.op == "placeholder"]


def mode_of(values: list[Any]) -> Any:
    """The mode that these fakes live in."""
    return next(value for value in values if isinstance(value, torch.Tensor)).fake_mode  # type: ignore[attr-defined]


def _stopped(error: BaseException) -> _Stop:
    """What stopped Inductor, if it was us; else the error is raised again."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, _Stop):
        cause = getattr(cause, "inner_exception", None) or cause.__cause__ or cause.__context__
    if cause is None:
        raise error
    return cause


def fill(module: Any) -> Any:
    """Give `module` weights without values on the GPU, of the fake mode that is on; the module."""
    for part in module.modules():
        for held, wrap in ((part._parameters, _parameter), (part._buffers, _same), (vars(part), _same)):
            for name, tensor in [pair for pair in held.items() if isinstance(pair[1], torch.Tensor)]:
                fresh = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cuda:0")
                held[name] = wrap(fresh)
    return module


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _parameter(tensor: torch.Tensor) -> Any:
    return torch.nn.Parameter(tensor, requires_grad=False)
