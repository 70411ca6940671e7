"""What follows an INT8 product and nothing else reads becomes the product's own last steps."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from squareq_fx import ops
from squareq_fx.edit import arguments, call, replace
from squareq_fx.ir import info
from squareq_fx.specs import spec

__all__ = ["fold_epilogues"]

_ADD = torch.ops.aten.add.Tensor
_DIV = torch.ops.aten.div.Tensor
_GELU = torch.ops.aten.gelu.default
_SILU = torch.ops.aten.silu.default


def fold_epilogues(graph: fx.Graph) -> None:
    """Let every `int8_matmul` of one part compute what alone reads it: gelu or silu, then an addition of its own type.

    The product moves to where its reader was, so that the other summand is made before it.

    Raises:
        PassError: never of a well-formed graph.
    """
    for node in list(graph.nodes):
        if node.target is ops.int8_matmul and arguments(node)["parts"] == 1:
            _undivided(_fold_addend(_undivided(_fold_activation(_undivided(node)))))


def _undivided(node: fx.Node) -> fx.Node:
    """The product, after its readers look through a division by 1: the rescale factor of diffusers' attention."""
    while divided := [user for user in node.users if user.target is _DIV and user.args == (node, 1) and _is_like(user, node)]:
        for user in divided:
            replace(user, node)
    return node


def _fold_activation(node: fx.Node) -> fx.Node:
    """The product with the activation that alone reads it; itself, if there is none."""
    given, reader = arguments(node), _only_reader(node)
    if reader is None or given["activation"] != "none" or given["addend"] is not None:
        return node
    if reader.target is _SILU:
        return _refitted(node, reader, activation="silu")
    if reader.target is _GELU:
        return _refitted(node, reader, activation="gelu_tanh" if arguments(reader)["approximate"] == "tanh" else "gelu")
    return node


def _fold_addend(node: fx.Node) -> fx.Node:
    reader = _only_reader(node)
    if reader is None or reader.target is not _ADD or arguments(node)["addend"] is not None:
        return node
    given = arguments(reader)
    other = given["other"] if given["self"] is node else given["self"]
    if given["alpha"] != 1 or other is node or not isinstance(other, fx.Node) or _kind(other) != _kind(node):
        return node
    return _refitted(node, reader, addend=other)


def _only_reader(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _is_like(node: fx.Node, other: fx.Node) -> bool:
    return spec(node.meta["val"]) == spec(other.meta["val"])


def _kind(node: fx.Node) -> tuple[Any, ...]:
    val = node.meta["val"]
    if not isinstance(val, torch.Tensor):
        return (val,)
    return val.dtype, val.device, tuple(map(str, val.shape))


def _refitted(node: fx.Node, reader: fx.Node, **changes: Any) -> fx.Node:
    """The product with other arguments in place of itself and its reader; itself, if the types differ."""
    given = arguments(node) | changes
    with reader.graph.inserting_before(reader):
        new = call(reader.graph, node.target, tuple(given.values()), like=node, made_by="fuse", layer=info(node).layer)
    if not _is_like(new, reader):
        reader.graph.erase_node(new)
        return node
    name = node.name
    replace(reader, new)
    node.graph.erase_node(node)
    new.name = name
    return new
