"""Which values share memory, and when each is used for the last time."""

from __future__ import annotations

import operator

import torch
from torch import fx

from squareq_fx.ir import functions

__all__ = ["aliased_arguments", "last_use", "shared_storage"]

# Operations that may return their input, or a view of it, although their schema does not say so: found by calling every
# operator of aten whose schema promises a new tensor and looking where the result lies.
_MAY_RETURN_INPUT = {
    "aten::" + name
    for name in (
        *("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout"),
        *("atleast_1d", "atleast_2d", "atleast_3d", "broadcast_tensors", "meshgrid", "einsum", "cartesian_prod"),
        *("unsafe_chunk", "unsafe_split", "unsafe_split_with_sizes", "_unsafe_view", "flatten_dense_tensors"),
        *("type_as", "sum_to_size", "chain_matmul", "align_tensors", "conj_physical", "lift", "data", "dequantize", "to_dense"),
        *("_cast_Byte", "_cast_Char", "_cast_Double", "_cast_Float", "_cast_Half", "_cast_Int", "_cast_Long", "_cast_Short"),
    )
}


def shared_storage(gm: fx.GraphModule) -> dict[fx.Node, frozenset[fx.Node]]:
    """For every node the nodes whose storage its value may be part of; itself, if it makes storage of its own.

    Views are followed through the alias annotations of operator schemas, `getitem`, and calls of the graph's functions.
    The answer is conservative: `reshape` may be a view, so it counts as one.
    """
    roots: dict[fx.Node, frozenset[fx.Node]] = {}
    returned: dict[fx.Node, list[frozenset[fx.Node]]] = {}  # of a call, one for each value it returns
    children = functions(gm)
    summaries = {name: _outputs_from_inputs(child) for name, child in children.items()}
    for node in gm.graph.nodes:
        if node.op == "call_module" and node.target in summaries:
            arguments = [[node.args[i] for i in positions] for positions in summaries[node.target]]
            returned[node] = [_union(roots, [a for a in given if isinstance(a, fx.Node)]) | {node} for given in arguments]
            roots[node] = frozenset().union(*returned[node])
        elif node.op == "call_function" and node.target is operator.getitem:
            whole = node.args[0]
            roots[node] = returned[whole][node.args[1]] if whole in returned else _union(roots, node.all_input_nodes)
        elif node.op == "call_function" and (sources := aliased_arguments(node)):
            roots[node] = _union(roots, sources)
        elif node.op == "output":
            roots[node] = _union(roots, node.all_input_nodes)
        else:
            roots[node] = frozenset({node})
    return roots


def last_use(gm: fx.GraphModule, node: fx.Node, roots: dict[fx.Node, frozenset[fx.Node]]) -> fx.Node:
    """The last node that reads `node`'s storage, through views and calls too; `node` itself if none does.

    Args:
        roots: what `shared_storage(gm)` gave.
    """
    readers = {user for value, sources in roots.items() if node in sources for user in value.users}
    order = {n: i for i, n in enumerate(gm.graph.nodes)}
    return max(readers | {node}, key=order.__getitem__)


def _union(roots: dict[fx.Node, frozenset[fx.Node]], nodes: list[fx.Node]) -> frozenset[fx.Node]:
    return frozenset().union(*(roots[n] for n in nodes))


def _outputs_from_inputs(gm: fx.GraphModule) -> list[tuple[int, ...]]:
    """For each output of a function the positions of the inputs it may be a view of."""
    roots = shared_storage(gm)
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    result = next(n for n in gm.graph.nodes if n.op == "output").args[0]
    outputs = result if isinstance(result, tuple | list) else (result,)
    return [
        tuple(i for i, p in enumerate(placeholders) if p in roots[output]) if isinstance(output, fx.Node) else ()
        for output in outputs
    ]


def aliased_arguments(node: fx.Node) -> list[fx.Node]:
    """Arguments whose storage the result may share, by the operator's schema."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return []
    schema = node.target._schema
    if schema.name in _MAY_RETURN_INPUT:
        return node.all_input_nodes
    if not any(r.alias_info is not None for r in schema.returns):
        return []
    found: list[fx.Node] = []
    for i, argument in enumerate(schema.arguments):
        if argument.alias_info is None:
            continue
        value = node.args[i] if i < len(node.args) else node.kwargs.get(argument.name)
        for leaf in value if isinstance(value, list | tuple) else (value,):
            if isinstance(leaf, fx.Node):
                found.append(leaf)
    return found
