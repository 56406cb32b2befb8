"""Passes over the graph of an exported block, and the memory they ask for: fewer kernels, fewer bytes, same numbers.

What is computed twice is computed once, so activations that several layers multiply are rounded once. Products of the
same activations and different weights become one product by all those weights, one after another. That is so in the
graph alone: the module keeps its layers, whose weights become slices of the memory that the product reads.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

# Where matrix products have what belongs to the columns of their result: weights, weights' scales, biases.
OWN = {"aten.linear.default": (1, 2), "aten._scaled_mm.default": (1, 3, 4), "aten._int_mm.default": (1,)}
VIEWS = {"aten.t.default", "aten.view.dtype"}  # what may lie between a weight and its product
TILE = 128  # rows of a weight that share a tile of MXFP8's or NVFP4's scales
ALIGNMENT = 16  # bytes: where kernels want every weight to start
Merged = dict[str, list[str]]  # the weights that a constant of the graph consists of, by their names in the block


def fuse(module: Any) -> Merged:
    """Change the graph of `module`, an exported block without mutations, in place; what it takes that the block lacks.

    Merged constants are buffers of `module`; of the weights they consist of it lets go.
    """
    _compute_once(module.graph)
    merged = _merge(module)
    module.graph.eliminate_dead_code()
    module.delete_all_unused_submodules()
    module.graph.lint()
    module.recompile()
    return merged


def _compute_once(graph: Any) -> None:
    seen: dict[tuple[str, str, str], Any] = {}
    for node in graph.nodes:
        if node.op == "call_function" and not node.is_impure():
            first = seen.setdefault((str(node.target), repr(node.args), repr(node.kwargs)), node)
            if first is not node:
                node.replace_all_uses_with(first)
                graph.erase_node(node)


@dataclass(frozen=True, slots=True)
class Operand:
    """A weight of a product, its memory, and the views of it that the product takes, from the last to the first."""

    name: str
    tensor: Any
    views: tuple[Any, ...]

    @property
    def kind(self) -> str:
        """Alike for weights that can follow one another."""
        steps = [(str(view.target), view.args[1:]) for view in self.views]
        return f"{self.tensor.dtype} {tuple(self.tensor.shape[1:])} {steps}"

    def rows_of(self, weight: Any) -> bool:
        """Whether what follows in memory belongs to the rows that follow those of `weight`."""
        rows = weight.shape[0]
        tiles = self.tensor.ndim == 1 and self.tensor.element_size() == 1 and rows % TILE == 0
        return bool(tiles or self.tensor.shape[0] == rows)


@dataclass(frozen=True, slots=True)
class Product:
    """A matrix product, with its own operands by their positions."""

    node: Any
    own: dict[int, Operand]

    @property
    def kind(self) -> str:
        """Alike for products that can be one."""
        args = [self.own[i].kind if i in self.own else arg for i, arg in enumerate(self.node.args)]
        return f"{self.node.target} {args} {self.node.kwargs}"

    @property
    def columns(self) -> int:
        """Of the result."""
        return int(self.own[1].tensor.shape[0])


def _product(node: Any, tensors: Mapping[str, Any]) -> Product | None:
    """`node` as a product with weights that nothing else reads; None if it is none."""
    own = {}
    for position in OWN.get(str(node.target), ()):
        if position < len(node.args) and node.args[position] is not None:
            operand = _operand(node.args[position], tensors)
            if operand is None:
                return None
            own[position] = operand
    weight = own.get(1)
    rows = weight is not None and all(operand.rows_of(weight.tensor) for operand in own.values())
    return Product(node, own) if rows else None


def _operand(node: Any, tensors: Mapping[str, Any]) -> Operand | None:
    views = []
    while str(node.target) in VIEWS and len(node.users) == 1:
        views.append(node)
        node = node.args[0]
    if node.op != "get_attr" or node.target not in tensors or len(node.users) > 1:
        return None
    return Operand(node.target, tensors[node.target], tuple(views))


def _merge(module: Any) -> Merged:
    """Make one of all products that share what they multiply."""
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    kinds: dict[str, list[Product]] = {}
    for node in module.graph.nodes:
        if product := _product(node, tensors):
            kinds.setdefault(product.kind, []).append(product)
    merged: Merged = {}
    for products in kinds.values():
        if len(products) > 1:
            _replace(module, products, merged)
    return merged


def _replace(module: Any, products: list[Product], merged: Merged) -> None:
    """Put one product, and slices of it, where the first of `products` is."""
    import torch

    graph, first, args = module.graph, products[0].node, list(products[0].node.args)
    with graph.inserting_before(first), torch.no_grad():
        for position, operand in products[0].own.items():
            parts = [product.own[position] for product in products]
            merged[name := f"merged_{len(merged)}"] = [part.name for part in parts]
            module.register_buffer(name, _bytes(part.tensor for part in parts).view(operand.tensor.dtype))
            args[position] = graph.get_attr(name)
            for view in reversed(operand.views):
                args[position] = graph.call_function(view.target, (args[position], *view.args[1:]))
        whole, start = graph.call_function(first.target, tuple(args), first.kwargs), 0
        for product in products:
            span = (start, start + product.columns)
            piece = graph.call_function(torch.ops.aten.slice.Tensor, (whole, -1, *span))
            product.node.replace_all_uses_with(piece)
            start = span[1]
    for product in products:
        graph.erase_node(product.node)


def _bytes(tensors: Iterable[Any], flat: bool = False) -> Any:
    """All rows of `tensors`, one after another, as bytes: there are dtypes that cannot be concatenated."""
    import torch

    rows = (tensor.contiguous().view(torch.uint8) for tensor in tensors)
    return torch.cat([each.flatten() if flat else each for each in rows])


def joined(weights: Mapping[str, Any], merged: Merged) -> dict[str, Any]:
    """The tensors that `merged` names; the block's own `weights` share their memory from now on.

    Weights that are views of a file's memory change places within it, so nothing is there twice; nobody else may
    hold them.
    """
    import torch

    with torch.inference_mode(False), torch.no_grad():
        groups = {name: [weights[part] for part in parts] for name, parts in merged.items()}
        for parts in groups.values():
            if not _adjacent(parts):
                _gather(parts, list(weights.values()))
        return {name: _whole(parts) for name, parts in groups.items()}


def _adjacent(tensors: list[Any]) -> bool:
    """Whether each begins where the one before it ends, in the same allocation."""
    first, *rest = tensors
    end = first.data_ptr() + first.nbytes
    for tensor in rest:
        if tensor.data_ptr() != end or tensor.untyped_storage().data_ptr() != first.untyped_storage().data_ptr():
            return False
        end += tensor.nbytes
    return all(tensor.is_contiguous() for tensor in tensors)


def _gather(parts: list[Any], others: list[Any]) -> None:
    """Let `parts` be adjacent: where they are, if all that lies between them is known, else in new memory."""
    import torch

    start = min(part.data_ptr() for part in parts)
    stop = max(part.data_ptr() + part.nbytes for part in parts)
    between = sorted((each for each in others if start <= each.data_ptr() < stop), key=lambda each: each.data_ptr())
    if _adjacent(between) and not any(each.nbytes % ALIGNMENT for each in between):
        moved = [*parts, *(each for each in between if all(each is not part for part in parts))]
        offset = start - parts[0].untyped_storage().data_ptr()
        memory = _within(parts[0], torch.uint8, offset, (stop - start,)).copy_(_bytes(moved, flat=True))
    else:
        moved, memory = parts, _bytes(parts, flat=True)
    for tensor, piece in zip(moved, memory.split([each.nbytes for each in moved]), strict=True):
        tensor.data = piece.view(tensor.dtype).view(tensor.shape)


def _whole(parts: list[Any]) -> Any:
    """Adjacent tensors as one."""
    first, rows = parts[0], sum(part.shape[0] for part in parts)
    return _within(first, first.dtype, first.storage_offset(), (rows, *first.shape[1:]))


def _within(tensor: Any, dtype: Any, offset: int, shape: tuple[int, ...]) -> Any:
    """What is `offset` elements into the allocation of `tensor`, which may be made for inference only."""
    import torch

    there = torch.empty(0, dtype=dtype, device=tensor.device)
    return there.set_(tensor.untyped_storage(), offset, torch.Size(shape), torch.empty(shape, device="meta").stride())
