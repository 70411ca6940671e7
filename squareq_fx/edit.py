"""Small edits of a graph that keep its records true. Passes are written with these."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from squareq_fx.inference import infer
from squareq_fx.ir import functions, identifier, info, operation_name, set_info, weight_inputs

__all__ = [
    "add_function",
    "add_input",
    "add_weight",
    "arguments",
    "call",
    "call_function",
    "drop_unused_functions",
    "drop_unused_weights",
    "enclosed",
    "finish",
    "replace",
    "results",
]


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


def arguments(node: fx.Node) -> dict[str, Any]:
    """What an operator is called with, by argument name and in the order of its schema; defaults where the call gives none."""
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    given = dict(zip((a.name for a in schema), node.args)) | node.kwargs
    return {a.name: given.get(a.name, a.default_value) for a in schema}


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
    return add_input(before, key, val, kind="weight", made_by=made_by, layer=layer)


def add_input(
    before: fx.Node, key: str, val: torch.Tensor, *, kind: str, made_by: str, layer: str | None = None
) -> fx.Node:
    """A new input of the graph ahead of the node `before`; `kind` as in `Info`."""
    with before.graph.inserting_before(before):
        node = before.graph.placeholder(identifier(key).lower())
    node.meta["val"] = val
    return set_info(node, kind=kind, key=key, layer=layer, made_by=made_by)


def drop_unused_weights(gm: fx.GraphModule) -> tuple[str, ...]:
    """Remove weight inputs that nothing reads; returns their keys."""
    dropped = tuple(key for key, node in weight_inputs(gm).items() if not node.users)
    for node in [n for n in gm.graph.nodes if n.op == "placeholder"]:
        if info(node).kind == "weight" and not node.users:
            gm.graph.erase_node(node)
    return dropped


def add_function(gm: fx.GraphModule, name: str, function: fx.GraphModule) -> str:
    """Give the graph a function to call; returns its name, with a number behind it if `name` is taken."""
    taken = {child for child, _ in gm.named_children()}
    numbered = (f"{name}_{i}" for i in itertools.count(2))
    unique = next(n for n in itertools.chain([name], numbered) if n not in taken)
    gm.add_module(unique, finish(function))
    return unique


def call_function(
    gm: fx.GraphModule,
    function: str,
    arguments: Sequence[Any],
    *,
    like: fx.Node,
    made_by: str,
    name: str,
    results: Sequence[str] = (),
) -> tuple[fx.Node, list[fx.Node]]:
    """A new call of one of the graph's functions at the insertion point.

    Args:
        like: the node whose place in the model's source the new ones inherit.
        results: names for the values, if the function returns several.

    Returns:
        the call, and the nodes of the values it returns (the call itself, if that is the value).
    """
    node = gm.graph.create_node("call_module", function, tuple(arguments), name=name)
    output = next(n for n in functions(gm)[function].graph.nodes if n.op == "output").args[0]
    made = [node]
    if isinstance(output, fx.Node):
        node.meta["val"] = output.meta["val"]
    else:
        node.meta["val"] = tuple(o.meta["val"] for o in output)  # type: ignore[union-attr]
        made += [
            gm.graph.create_node("call_function", operator.getitem, (node, i), name=results[i])
            for i in range(len(node.meta["val"]))
        ]
        for item, val in zip(made[1:], node.meta["val"]):
            item.meta["val"] = val
    for new in made:
        for key in ("stack_trace", "nn_module_stack"):
            if key in like.meta:
                new.meta[key] = like.meta[key]
        set_info(new, made_by=made_by)
    return node, made[1:] or [node]


def results(node: fx.Node) -> dict[int, fx.Node]:
    """The values that a call of a function returns and that are used, by position."""
    if isinstance(node.meta["val"], torch.Tensor):
        return {0: node}
    found = {int(user.args[1]): user for user in node.users if user.target is operator.getitem}  # type: ignore[arg-type]
    return dict(sorted(found.items()))


def enclosed(node: fx.Node) -> tuple[fx.GraphModule, list[fx.Node]]:
    """A function of the one operation `node`, and the arguments to call it with."""
    graph = fx.Graph()
    arguments = list(node.all_input_nodes)
    env: dict[fx.Node, fx.Node] = {}
    for argument in arguments:
        kind = info(argument).kind if info(argument).kind in ("weight", "adapter") else "input"
        env[argument] = graph.placeholder(argument.name)
        env[argument].meta["val"] = argument.meta["val"]
        set_info(env[argument], kind=kind, key=argument.name)
    graph.output(graph.node_copy(node, env.__getitem__))
    return fx.GraphModule({}, graph, class_name="Function"), arguments


def drop_unused_functions(gm: fx.GraphModule) -> None:
    """Remove functions that nothing calls."""
    called = {str(n.target) for n in gm.graph.nodes if n.op == "call_module"}
    for name in functions(gm):
        if name not in called:
            delattr(gm, name)


def finish(gm: fx.GraphModule) -> fx.GraphModule:
    """Remove dead nodes and regenerate the code; what a pass calls on the graph it returns."""
    gm.graph.eliminate_dead_code()
    gm.recompile()
    return gm
