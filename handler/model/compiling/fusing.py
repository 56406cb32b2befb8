"""Passes over the graph of an exported block: fewer kernels, fewer bytes, the same numbers.

What is computed twice is computed once, so activations that several layers multiply are rounded once. Products of the
same activations and different weights become one product by all those weights, one after another. That is so in the
graph alone: the module keeps its layers, whose weights become slices of the memory that the product reads. And the
tokens of prompt and picture are put together last, after what is computed of each: so norm, rotation and copy are one.
"""

import operator
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from handler.model.compiling.joining import Merged, as_bytes

# Where matrix products have what belongs to the columns of their result: weights, weights' scales, biases.
OWN = {"aten.linear.default": (1, 2), "aten._scaled_mm.default": (1, 3, 4), "aten._int_mm.default": (1,)}
VIEWS = {"aten.t.default", "aten.view.dtype", "aten.detach.default"}  # what may lie between a weight and its product
TILE = 128  # rows of a weight that share a tile of MXFP8's or NVFP4's scales
# What computes each token for itself, if it keeps the number of tokens.
TOKENWISE = {
    f"aten.{name}"
    for name in ("view.default", "unbind.int", "neg.default", "stack.default", "clamp.default", "_to_copy.default")
}
BROADCAST = {"aten.mul.Tensor", "aten.add.Tensor"}
TOKENWISE |= BROADCAST | {str(operator.getitem)}


def fuse(module: Any) -> Merged:
    """Change the graph of `module`, an exported block without mutations, in place; what it takes that the block lacks.

    Merged constants are buffers of `module`; of the weights they consist of it lets go.
    """
    _compute_once(module.graph)
    _join_last(module.graph)
    merged = _merge(module)
    module.graph.eliminate_dead_code()
    module.delete_all_unused_submodules()
    module.graph.lint()
    module.recompile()
    return merged


def _compute_once(graph: Any) -> None:
    seen: dict[tuple[str, str, str], Any] = {}
    for node in graph.nodes:
        if str(node.target) == "aten._assert_tensor_metadata.default":  # of what was traced: it cannot be otherwise
            graph.erase_node(node)
        elif node.op == "call_function" and not node.is_impure():
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
    merged: dict[str, list[str]] = {}
    for products in kinds.values():
        if len(products) > 1:
            _replace(module, products, merged)
    return merged


def _replace(module: Any, products: list[Product], merged: dict[str, list[str]]) -> None:
    """Put one product, and slices of it, where the first of `products` is."""
    import torch

    graph, first, args = module.graph, products[0].node, list(products[0].node.args)
    with graph.inserting_before(first), torch.no_grad():
        for position, operand in products[0].own.items():
            parts = [product.own[position] for product in products]
            merged[name := f"merged_{len(merged)}"] = [part.name for part in parts]
            module.register_buffer(name, as_bytes(part.tensor for part in parts).view(operand.tensor.dtype))
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


def _join_last(graph: Any) -> None:
    """Move each concatenation of two kinds of tokens (batch, tokens, heads, width) behind what each token becomes."""
    for node in list(graph.nodes):
        cat = str(node.target) == "aten.cat.default" and node.args[1:] == (1,) and len(node.args[0]) == 2
        if cat and node.meta["val"].ndim == 4 and len(nodes := _tokenwise(node)) > 1:
            _compute_apart(graph, nodes)


def _tokenwise(joined: Any) -> list[Any]:
    """`joined` and all that is computed of it token by token, in the order of the graph."""
    found, tokens, node = {joined: None}, str(joined.meta["val"].shape[1]), joined.next
    while node.op != "output":
        alone = str(node.target) in BROADCAST or not {*node.all_input_nodes} - found.keys() - {*_sizes(node)}
        if str(node.target) in TOKENWISE and found.keys() & {*node.all_input_nodes} and alone:
            values = node.meta["val"] if isinstance(node.meta["val"], list | tuple) else [node.meta["val"]]
            if all(value.ndim > 2 and str(value.shape[1]) == tokens for value in values):
                found[node] = None
        node = node.next
    return list(found)


def _sizes(node: Any) -> list[Any]:
    """What a view is told as its shape."""
    return list(node.args[1]) if str(node.target) == "aten.view.default" else []


def _compute_apart(graph: Any, nodes: list[Any]) -> None:
    """Compute `nodes` for each part of the first, a concatenation; put together what others read of them."""
    import torch

    joined, parts = nodes[0], nodes[0].args[0]
    made, aten = {joined: parts}, torch.ops.aten
    with graph.inserting_before(joined):
        counts = [graph.call_function(aten.sym_size.int, (part, 1)) for part in parts]
    for node in nodes[1:]:
        with graph.inserting_before(node):
            made[node] = [_for_part(graph, node, made, counts, which) for which in range(len(parts))]
            if others := [user for user in node.users if user not in nodes]:
                whole = graph.call_function(aten.cat.default, (made[node], 1))
                for user in others:
                    user.replace_input_with(node, whole)
    for node in reversed(nodes[1:]):  # the first may have other readers
        graph.erase_node(node)


def _for_part(graph: Any, node: Any, made: dict[Any, Any], counts: list[Any], which: int) -> Any:
    """`node` computed for one of two parts, of so many tokens, of what has been made for each so far."""
    import torch

    span = ((0, counts[0]), (counts[0], sys.maxsize))[which]

    def own(other: Any) -> Any:
        if other in made:
            return made[other][which]
        value = other.meta["val"]
        axis = 1 + value.ndim - node.meta["val"].ndim if hasattr(value, "ndim") else -1  # where its tokens are
        if axis < 0 or str(value.shape[axis]) == "1":
            return other
        return graph.call_function(torch.ops.aten.slice.Tensor, (other, axis, *span))

    args = torch.fx.node.map_arg(node.args, own)
    if sizes := _sizes(node):
        args = (args[0], [sizes[0], counts[which], *sizes[2:]])
    return graph.call_function(node.target, args, node.kwargs)
