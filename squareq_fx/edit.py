"""Small edits of a graph that keep its records true. Passes are written with these."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from squareq_fx.inference import infer
from squareq_fx.ir import identifier, info, operation_name, set_info, weight_inputs

__all__ = ["add_weight", "call", "drop_unused_weights", "finish", "replace"]


def call(
    graph: fx.Graph,
    target: Any,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    *,
    like: fx.Node,
    made_by: str | None = None,
    layer: str | None = None,
    name: str | None = None,
) -> fx.Node:
    """A new `call_function` at the graph's insertion point, with its `val` inferred and the source of `like`.

    Args:
        like: the node whose place in the model's source the new one inherits.
        made_by: the pass; left out, the pipeline fills in the name of the running one.
        layer: the slab layer the node computes.

    Raises:
        PassError: the operation does not take these arguments.
    """
    node = graph.create_node("call_function", target, args, dict(kwargs or {}), name=name or operation_name(target))
    for key in ("stack_trace", "nn_module_stack"):
        if key in like.meta:
            node.meta[key] = like.meta[key]
    node.meta["val"] = infer(target, args, dict(kwargs or {}), getattr(like.meta.get("val"), "fake_mode", None))
    return set_info(node, made_by=made_by, layer=layer)


def replace(old: fx.Node, new: fx.Node) -> None:
    """Let every user of `old` read `new`, and remove `old`; blocks go on calling the value what they did."""
    if info(old).arguments:
        set_info(new, arguments=tuple(dict.fromkeys(info(new).arguments + info(old).arguments)))
    old.replace_all_uses_with(new)
    old.graph.erase_node(old)


def add_weight(
    before: fx.Node, key: str, val: torch.Tensor, *, made_by: str, layer: str | None = None
) -> fx.Node:
    """A new weight input ahead of the placeholder `before`; `val` is a fake tensor (`inference.empty`)."""
    with before.graph.inserting_before(before):
        node = before.graph.placeholder(identifier(key))
    node.meta["val"] = val
    return set_info(node, kind="weight", key=key, layer=layer, made_by=made_by)


def drop_unused_weights(gm: fx.GraphModule) -> tuple[str, ...]:
    """Remove weight inputs that nothing reads; returns their keys."""
    dropped = tuple(key for key, node in weight_inputs(gm).items() if not node.users)
    for node in [n for n in gm.graph.nodes if n.op == "placeholder"]:
        if info(node).kind == "weight" and not node.users:
            gm.graph.erase_node(node)
    return dropped


def finish(gm: fx.GraphModule) -> fx.GraphModule:
    """Remove dead nodes and regenerate the code; what a pass calls on the graph it returns."""
    gm.graph.eliminate_dead_code()
    gm.recompile()
    return gm
