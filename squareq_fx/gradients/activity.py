"""Which values of a graph change when some of its inputs do, and could carry a gradient of them."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from squareq_fx.ir import functions

__all__ = ["active_outputs", "active_values", "has_floats", "is_valueless", "output_nodes", "value_arguments"]

_VALUELESS = {
    *("empty", "full", "zeros", "ones", "rand", "randn", "scalar_tensor", "arange", "sym_size", "sym_numel", "detach"),
    *("empty_like", "full_like", "zeros_like", "ones_like", "rand_like", "randn_like"),
    *("new_empty", "new_full", "new_zeros", "new_ones", "new_empty_strided", "empty_strided"),
}
_COPY = torch.ops.aten.copy.default


def is_valueless(node: fx.Node) -> bool:
    """Does the operation read no more of a tensor than its type, or is it `detach`, so that no gradient is lost?"""
    name = getattr(node.target, "_schema", None)
    return name is not None and name.name.removeprefix("aten::") in _VALUELESS


def value_arguments(node: fx.Node) -> list[fx.Node]:
    """What the operation reads the values of: all its arguments, but not what `copy` (a write, made functional) overwrites."""
    return [a for a in node.args[1:2] if isinstance(a, fx.Node)] if node.target is _COPY else node.all_input_nodes


def active_values(gm: fx.GraphModule, seeds: Iterable[fx.Node]) -> set[fx.Node]:
    """The nodes whose floating point value depends on that of `seeds`, these included; calls of functions are looked into."""
    active = set(seeds)
    outputs: dict[fx.Node, tuple[bool, ...]] = {}
    for node in gm.graph.nodes:
        if node.op in ("placeholder", "output") or not any(a in active for a in value_arguments(node)):
            continue
        if node.op == "call_module":
            flags = active_outputs(functions(gm)[str(node.target)], tuple(a in active for a in node.args))
            outputs[node] = flags
            if any(flags):
                active.add(node)
        elif node.target is operator.getitem and node.args[0] in outputs:
            if outputs[node.args[0]][node.args[1]]:  # type: ignore[index]
                active.add(node)
        elif has_floats(node.meta.get("val")) and not is_valueless(node):
            active.add(node)
    return active


def active_outputs(function: fx.GraphModule, inputs: Iterable[bool]) -> tuple[bool, ...]:
    """For each output of a function whether it depends on the inputs that are marked."""
    placeholders = [n for n in function.graph.nodes if n.op == "placeholder"]
    active = active_values(function, [n for n, marked in zip(placeholders, inputs) if marked])
    return tuple(n in active for n in output_nodes(function))


def output_nodes(gm: fx.GraphModule) -> tuple[fx.Node, ...]:
    """The nodes a graph returns; one for a function that returns a single value."""
    result = next(n for n in gm.graph.nodes if n.op == "output").args[0]
    return (result,) if isinstance(result, fx.Node) else tuple(result)  # type: ignore[arg-type]


def has_floats(val: Any) -> bool:
    """Is a tensor in it that could carry a gradient, real or complex?"""
    leaves = [leaf for leaf in pytree.tree_leaves(val) if isinstance(leaf, torch.Tensor)]
    return any(leaf.is_floating_point() or leaf.is_complex() for leaf in leaves)
