"""The inverse of outlining: every call of a function becomes the function's nodes."""

from __future__ import annotations

import operator
from typing import Any

from torch import fx
from torch.fx.node import map_arg

from squareq_fx.edit import finish
from squareq_fx.ir import Level, functions, program, update_program

__all__ = ["inline"]


def inline(gm: fx.GraphModule) -> fx.GraphModule:
    """A flat graph that computes the same, with no calls; the input is unchanged.

    Raises:
        PassError: never; a graph without calls comes back as a copy.
    """
    children = functions(gm)
    graph = fx.Graph()
    env: dict[fx.Node, Any] = {}
    for node in gm.graph.nodes:
        if node.op == "call_module":
            env[node] = _splice(graph, children[str(node.target)], [map_arg(a, env.__getitem__) for a in node.args])
        elif node.target is operator.getitem and isinstance(env[node.args[0]], tuple):
            env[node] = env[node.args[0]][node.args[1]]
        else:
            env[node] = graph.node_copy(node, env.__getitem__)
    flat = fx.GraphModule({}, graph, class_name=type(gm).__name__)
    flat.meta = dict(gm.meta)
    level = program(gm).level
    return update_program(finish(flat), level=min(level, Level.QUANTIZED))


def _splice(graph: fx.Graph, function: fx.GraphModule, arguments: list[Any]) -> Any:
    env: dict[fx.Node, Any] = {}
    remaining = iter(arguments)
    for node in function.graph.nodes:
        if node.op == "placeholder":
            env[node] = next(remaining)
        elif node.op == "output":
            return map_arg(node.args[0], env.__getitem__)
        else:
            env[node] = graph.node_copy(node, env.__getitem__)
    return None
