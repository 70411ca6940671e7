"""One spelling for each operation, and nothing that computes nothing. Values stay the same bit for bit."""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from squareq_fx.edit import call, drop_unused_weights, finish, replace
from squareq_fx.ir import Level, clone, program, update_program
from squareq_fx.liveness import shared_storage
from squareq_fx.specs import spec

__all__ = ["Canonicalize"]

aten = torch.ops.aten

_ASSERTIONS = {
    aten._assert_tensor_metadata.default,
    aten._assert_scalar.default,
    aten._assert_async.default,
    aten._assert_async.msg,
    aten.sym_constrain_range.default,
    aten.sym_constrain_range_for_size.default,
}
_DROPOUTS = {aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default}
_CASTS = {aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten.type_as.default, aten._to_copy.default}
_COPIES = {aten.clone.default, aten._to_copy.default, aten.lift_fresh_copy.default}
_ALIASES = {aten.alias.default, aten.lift_fresh_copy.default}
_SPELLINGS: dict[Any, Any] = {
    aten.concat.default: aten.cat.default,
    aten.concatenate.default: aten.cat.default,
    aten.absolute.default: aten.abs.default,
    aten.multiply.Tensor: aten.mul.Tensor,
    aten.subtract.Tensor: aten.sub.Tensor,
    aten.divide.Tensor: aten.div.Tensor,
    aten.negative.default: aten.neg.default,
    aten.swapaxes.default: aten.transpose.int,
    aten.swapdims.default: aten.transpose.int,
}


@dataclass(frozen=True)
class Canonicalize:
    """Drop assertions, eval-mode dropout, casts and slices that change nothing; one name for each operation.

    Requires: a captured graph.   Preserves: signature, every value bit for bit.
    Afterwards: two modules with the same code give the same nodes, which is what `outline` shares functions by.
    """

    name = "canonicalize"
    requires_level = Level.CAPTURED
    changes_inputs = True  # a weight only an assertion looked at is dropped

    def __call__(self, gm: fx.GraphModule) -> fx.GraphModule:
        gm = clone(gm)
        returned = _returned_copies(gm)
        for node in list(gm.graph.nodes):
            if node.op != "call_function" or node in returned:
                continue
            if node.target in _ASSERTIONS:
                gm.graph.erase_node(node)
                continue
            for rule in _RULES:
                new = rule(node)
                if new is not None:
                    replace(node, new)
                    break
        _share_sizes(gm)
        finish(gm)
        drop_unused_weights(gm)
        gm.recompile()
        return update_program(gm, level=max(program(gm).level, Level.CANONICAL))


def _returned_copies(gm: fx.GraphModule) -> set[fx.Node]:
    """Copies between an input or weight and the output: without them the caller would be handed that tensor itself."""
    roots = shared_storage(gm)

    def is_input(node: fx.Node) -> bool:
        return any(
            root.op == "placeholder"
            or (root.target in _COPIES and isinstance(root.args[0], fx.Node) and is_input(root.args[0]))
            for root in roots[node]
        )

    (output,) = (n for n in gm.graph.nodes if n.op == "output")
    return {n for n in roots[output] if n.target in _COPIES and any(map(is_input, n.all_input_nodes))}


def _dropout(node: fx.Node) -> fx.Node | None:
    if node.target not in _DROPOUTS:
        return None
    x, p, train = node.args
    return x if not train or p == 0.0 else None  # type: ignore[return-value]


def _same_type(node: fx.Node) -> fx.Node | None:
    """A cast, alias or `contiguous` whose result has the very type of its input is that input."""
    if node.target not in _CASTS | _ALIASES | {aten.contiguous.default, aten.clone.default}:
        return None
    x, memory_format = node.args[0], node.kwargs.get("memory_format")
    if not isinstance(x, fx.Node) or memory_format not in (None, torch.preserve_format, torch.contiguous_format):
        return None
    if node.target is aten.contiguous.default and not _is_contiguous(x):
        return None
    if node.target in _CASTS and _argument(node, "copy"):
        return None
    return x if spec(x.meta["val"]) == spec(node.meta["val"]) else None


def _argument(node: fx.Node, name: str) -> Any:
    """What the call gives for this argument of the operator, by position or keyword."""
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    return dict(zip(names, node.args), **node.kwargs).get(name)


def _is_contiguous(node: fx.Node) -> bool:
    return bool(torch.fx.experimental.symbolic_shapes.statically_known_true(node.meta["val"].is_contiguous()))


def _cast(node: fx.Node) -> fx.Node | None:
    """Every change of the floating point type alone is `aten.to.dtype`."""
    if node.target not in (aten.to.dtype_layout, aten._to_copy.default, aten.type_as.default):
        return None
    x, out = node.args[0], node.meta["val"]
    if not isinstance(x, fx.Node) or node.kwargs.get("memory_format") not in (None, torch.preserve_format):
        return None
    given = x.meta["val"]
    if given.device != out.device or given.layout != out.layout or given.dtype == out.dtype:
        return None
    return _respell(node, aten.to.dtype, (x, out.dtype))


def _full_slice(node: fx.Node) -> fx.Node | None:
    if node.target is not aten.slice.Tensor:
        return None
    x, _, start, end, step = (list(node.args) + [None] * 5)[:5]
    whole = start in (0, None) and (end is None or end == sys.maxsize) and step in (1, None)
    return x if whole and isinstance(x, fx.Node) else None


def _slice_arguments(node: fx.Node) -> fx.Node | None:
    """`x[:n]` with all of dimension, start and end spelled out."""
    if node.target is not aten.slice.Tensor or len(node.args) >= 4:
        return None
    full = (*node.args, *(None, 0, 0, sys.maxsize)[len(node.args) :])
    return _respell(node, aten.slice.Tensor, full)


def _spelling(node: fx.Node) -> fx.Node | None:
    target = _SPELLINGS.get(node.target)
    return None if target is None else _respell(node, target, node.args, node.kwargs)


def _respell(node: fx.Node, target: Any, args: Any, kwargs: Any = None) -> fx.Node:
    with node.graph.inserting_before(node):
        return call(node.graph, target, tuple(args), kwargs, like=node, made_by="canonicalize")


_RULES: tuple[Callable[[fx.Node], fx.Node | None], ...] = (
    _dropout,
    _same_type,
    _cast,
    _full_slice,
    _slice_arguments,
    _spelling,
)


def _share_sizes(gm: fx.GraphModule) -> None:
    """Integer arithmetic on sizes is computed once: two nodes of one target and arguments are one."""
    seen: dict[Any, fx.Node] = {}
    for node in list(gm.graph.nodes):
        if node.op != "call_function" or not isinstance(node.meta.get("val"), torch.SymInt):
            continue
        if node.target is operator.getitem:
            continue
        key = (node.target, str(node.args), str(node.kwargs))
        if key in seen:
            replace(node, seen[key])
        else:
            seen[key] = node
