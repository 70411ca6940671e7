"""The inverse of outlining: every call of a function becomes the function's nodes."""

from __future__ import annotations

import operator
from typing import Any

from torch import fx
from torch.fx.node import map_arg

from squareq_fx import ops
from squareq_fx.edit import finish
from squareq_fx.ir import Level, functions, info, join_layers, layers, program, set_info, update_program

__all__ = ["inline"]


def inline(gm: fx.GraphModule) -> fx.GraphModule:
    """A flat graph that computes the same, with no calls; the input is unchanged.

    Raises:
        PassError: never; a graph without calls comes back as a copy.
    """
    children = functions(gm)
    homes: dict[str, fx.Node] = {}  # the call each function was made from, whose names its nodes carry
    graph = fx.Graph()
    env: dict[fx.Node, Any] = {}
    for node in gm.graph.nodes:
        if node.op == "call_module":
            home = homes.setdefault(str(node.target), node)
            arguments = [map_arg(a, env.__getitem__) for a in node.args]
            env[node] = _splice(graph, children[str(node.target)], arguments, home, node)
        elif node.target is operator.getitem and isinstance(env[node.args[0]], tuple):
            env[node] = env[node.args[0]][node.args[1]]
        else:
            env[node] = graph.node_copy(node, env.__getitem__)
    flat = fx.GraphModule({}, graph, class_name=type(gm).__name__)
    flat.meta = dict(gm.meta)
    level = program(gm).level
    return update_program(finish(flat), level=min(level, Level.QUANTIZED))


def _splice(graph: fx.Graph, function: fx.GraphModule, arguments: list[Any], home: fx.Node, call: fx.Node) -> Any:
    env: dict[fx.Node, Any] = {}
    remaining = iter(arguments)
    for node in function.graph.nodes:
        if node.op == "placeholder":
            env[node] = next(remaining)
        elif node.op == "output":
            return map_arg(node.args[0], env.__getitem__)
        else:
            env[node] = graph.node_copy(node, env.__getitem__)
            if call is not home:
                _rename(env[node], home, call)
    return None


def _rename(node: fx.Node, home: fx.Node, call: fx.Node) -> None:
    """Let a node of a shared function say that it belongs to the block (and visit) of this call."""
    old, new = str(info(home).key), str(info(call).key)
    key = next((k for k, (path, _) in _stack(call).items() if path.partition("@")[0] == new), None)

    def moved(path: str) -> str | None:
        return new + path[len(old) :] if path == old or path.startswith(f"{old}.") else None

    names = [moved(name) for name in layers(node)]
    layer = join_layers(name for name in names if name) if all(names) else None
    if node.target is ops.int8_linear:
        layer = info(node.args[1]).layer  # type: ignore[arg-type]
    if layer is not None:
        set_info(node, layer=layer)
    if key is not None:
        node.meta["nn_module_stack"] = {
            k if (path := moved(at.partition("@")[0])) is None else key + path[len(new) :]: (path or at, kind)
            for k, (at, kind) in _stack(node).items()
        }


def _stack(node: fx.Node) -> dict[str, tuple[str, Any]]:
    return node.meta.get("nn_module_stack") or {}
