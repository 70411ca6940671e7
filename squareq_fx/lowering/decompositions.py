"""Our operations in terms of aten, where a compiler that fuses aten gains by seeing inside.

| operation | becomes | because |
|---|---|---|
| `quantize_rows` | maximum, division, rounding | it joins the norm or activation before it |
| `int8_linear`, `_dx` and `_parts`, w8a16, many rows | a float weight, `aten.linear` | one kernel, torch's own product |

With few rows, and with `compute="w8a8"`, the operations stay what they are: kernels of our own run them. So do `quantize_rows`
of two tensors that kernels made, and `squareq.attention`, which no aten operation is equal to for every number of tokens, and
which fuses with nothing.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from squareq_fx import ops
from squareq_fx.attention_op import attention
from squareq_fx.kernels.dispatch import FUSED_MAX_ROWS
from squareq_fx.kernels.reference import QMAX, SMALLEST_ROW
from squareq_fx.lowering.symbols import hint

__all__ = ["decompose"]

aten = torch.ops.aten


def decompose(graph: fx.Graph, value_of: Callable[[Any], int] = hint) -> None:
    """Rewrite `graph`, which the caller owns, in place; every node has its `val` before, and not all of them afterwards.

    Args:
        value_of: what a size will be; whether a layer has many rows goes by it.
    """
    for node in list(graph.nodes):
        rewrite = _REWRITES.get(node.target) if node.op == "call_function" else None
        if rewrite is not None and (rewrite is _quantize_rows or _has_many_rows(node, value_of)):
            with graph.inserting_before(node):
                rewrite(graph, node)
    graph.eliminate_dead_code()


def _quantize_rows(graph: fx.Graph, node: fx.Node) -> None:
    """As `kernels.reference.quantize_rows`; a division by 127 may be a product with its reciprocal, one bit off.

    The sum is over the steps as floats, which are still at hand: exact for rows of up to 2**24 / 127 elements.
    """
    x, beside = _arguments(node, "x", "beside")
    call = graph.call_function
    if beside is not None:
        if _is_opaque(x) and _is_opaque(beside):
            return  # nothing to join, and our kernel reads both where they are
        width = x.meta["val"].shape[-1] + beside.meta["val"].shape[-1]
        x = call(aten.cat.default, ([x, beside], -1))
    else:
        width = x.meta["val"].shape[-1]
    if not hint(width):
        return
    rows = call(aten._to_copy.default, (x,), {"dtype": torch.float32})
    top = call(aten.amax.default, (call(aten.abs.default, (rows,)), [-1]))
    is_zero = call(aten.lt.Scalar, (top, SMALLEST_ROW))
    scale = call(aten.where.ScalarSelf, (is_zero, 1.0, call(aten.div.Tensor, (top, QMAX))))
    inverse = call(aten.unsqueeze.default, (call(aten.reciprocal.default, (scale,)), -1))
    steps = call(aten.round.default, (call(aten.mul.Tensor, (rows, inverse)),))
    bounded = call(aten.clamp.default, (steps, -QMAX, QMAX))
    xq = call(aten._to_copy.default, (bounded,), {"dtype": torch.int8})
    total = call(aten.sum.dim_IntList, (bounded, [-1]))
    sx = call(aten.stack.default, ([scale, total], -1))
    _replace_items(node, {0: xq, 1: sx})


def _is_opaque(node: fx.Node) -> bool:
    """Whether a value lies in memory however its readers are fused: a function's input, or what a product or attention made."""
    while node.target in _VIEWS:
        node = node.all_input_nodes[0]
    return node.op == "placeholder" or node.target in _OPAQUE


def _linear(graph: fx.Graph, node: fx.Node) -> None:
    x, qweight, scale, zero_point, bias = _arguments(node, "x", "qweight", "scale", "zero_point", "bias")
    weight = _dequantized(graph, qweight, scale, zero_point, _width(x), x.meta["val"].dtype)
    _replace(node, _product(graph, x, weight, bias))


def _linear_dx(graph: fx.Graph, node: fx.Node) -> None:
    dy, qweight, scale, zero_point, width = _arguments(node, "dy", "qweight", "scale", "zero_point", "in_features")
    weight = _dequantized(graph, qweight, scale, zero_point, width, dy.meta["val"].dtype)
    _replace(node, graph.call_function(aten.matmul.default, (dy, weight)))


def _linear_parts(graph: fx.Graph, node: fx.Node) -> None:
    """Several products with slices of one dequantised weight; no stack where each part is read by itself."""
    x, qweight, scale, zero_point, bias, parts = _arguments(
        node, "x", "qweight", "scale", "zero_point", "bias", "parts"
    )
    call = graph.call_function
    weight = _dequantized(graph, qweight, scale, zero_point, _width(x), x.meta["val"].dtype)
    height = qweight.meta["val"].shape[0] // parts
    products = []
    for i in range(parts):
        rows = [i * height, (i + 1) * height]
        own = call(aten.slice.Tensor, (weight, 0, *rows))
        own_bias = None if bias is None else call(aten.slice.Tensor, (bias, 0, *rows))
        products.append(_product(graph, x, own, own_bias))
    for user in list(node.users):
        if user.target is aten.select.int and user.args[1:2] == (0,) and isinstance(user.args[2], int):
            _replace(user, products[user.args[2]])
        elif user.target is aten.unbind.int and (user.args[1:] == () or user.args[1] == 0):
            _replace_items(user, dict(enumerate(products)))
    _replace(node, call(aten.stack.default, (products,)))


def _product(graph: fx.Graph, x: fx.Node, weight: fx.Node, bias: fx.Node | None) -> fx.Node:
    """The bias rounds to the type of x first and meets the accumulator, as in any 16-bit layer."""
    if bias is not None:
        bias = graph.call_function(aten._to_copy.default, (bias,), {"dtype": x.meta["val"].dtype})
    return graph.call_function(aten.linear.default, (x, weight, bias))


def _dequantized(
    graph: fx.Graph, qweight: fx.Node, scale: fx.Node, zero_point: fx.Node, width: Any, dtype: torch.dtype
) -> fx.Node:
    """(q - zero_point) * scale in float32, without the padding, in `dtype`."""
    call = graph.call_function
    if qweight.meta["val"].shape[1] != width:
        qweight = call(aten.slice.Tensor, (qweight, 1, 0, width))
    steps = call(aten._to_copy.default, (qweight,), {"dtype": torch.float32})
    shifted = call(aten.sub.Tensor, (steps, call(aten.unsqueeze.default, (zero_point, 1))))
    weight = call(aten.mul.Tensor, (shifted, call(aten.unsqueeze.default, (scale, 1))))
    return weight if dtype == torch.float32 else call(aten._to_copy.default, (weight,), {"dtype": dtype})


def _has_many_rows(node: fx.Node, value_of: Callable[[Any], int]) -> bool:
    """Whether the rows are more than the fused kernel is for."""
    val = node.args[0].meta["val"]  # type: ignore[union-attr]
    if _argument(node, "compute", "w8a16") != "w8a16" or _width(node.args[0]) is None:
        return False
    rows = 1
    for size in val.shape[:-1]:
        rows *= value_of(size)
    return rows > FUSED_MAX_ROWS[val.dtype]


def _width(node: Any) -> int | None:
    """Elements of a row, if that is one number; a trace may have it as a symbolic size, a graph that was read has not."""
    size = node.meta["val"].shape[-1]
    known: int | None = size if isinstance(size, int) else size.node.maybe_as_int()
    return known


def _arguments(node: fx.Node, *names: str) -> list[Any]:
    return [_argument(node, name, None) for name in names]


def _argument(node: fx.Node, name: str, default: Any) -> Any:
    """By position or by name, as the operation's schema has it."""
    declared = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    if name not in declared:
        return default
    position = declared.index(name)
    return node.args[position] if position < len(node.args) else node.kwargs.get(name, default)


def _replace(old: fx.Node, new: fx.Node) -> None:
    """The type goes with it: a later rewrite may read it."""
    new.meta["val"] = old.meta["val"]
    old.replace_all_uses_with(new)
    old.graph.erase_node(old)


def _replace_items(node: fx.Node, items: dict[int, fx.Node]) -> None:
    """Let the readers of `node`'s results, which are all `getitem`s, read `items`."""
    for user in list(node.users):
        if user.target is not operator.getitem:
            raise AssertionError(f"{user.format_node()} reads the results of {node.name} as a whole")
        _replace(user, items[user.args[1]])  # type: ignore[index]
    node.graph.erase_node(node)


_VIEWS = {
    operator.getitem,
    *(aten.view.default, aten.reshape.default, aten.flatten.using_ints, aten.unflatten.int, aten.alias.default),
    *(aten.transpose.int, aten.permute.default, aten.select.int, aten.slice.Tensor, aten.unsqueeze.default),
}
_OPAQUE = {
    *(ops.int8_matmul, ops.int8_linear, ops.int8_linear_dx, ops.int8_linear_parts, attention),
    *(aten.linear.default, aten.mm.default, aten.addmm.default, aten.bmm.default, aten.matmul.default),
}

_REWRITES: dict[Any, Callable[[fx.Graph, fx.Node], None]] = {
    ops.quantize_rows: _quantize_rows,
    ops.int8_linear: _linear,
    ops.int8_linear_dx: _linear_dx,
    ops.int8_linear_parts: _linear_parts,
}
