"""From a trace of a function and its gradients to functions the graph can call: recompute everything, or save in between."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from squareq_fx.edit import call
from squareq_fx.gradients.vjp import Traced
from squareq_fx.ir import info, set_info
from squareq_fx.liveness import aliased_arguments
from squareq_fx.specs import spec

__all__ = ["Pullback", "recomputing", "saving"]


@dataclass(frozen=True)
class Pullback:
    """How one function is differentiated.

    Attributes:
        forward: what the forward calls instead of the function, returning its outputs and then `saved` further tensors; None
            to leave the function as it is.
        backward: takes the inputs at the positions `inputs`, the saved tensors, the cotangents; returns one gradient for each
            position in `gradients`, contiguous.
        saved: how many tensors the forward saves.
        inputs: positions of the function's inputs that the backward reads; its weights are always all among them.
        gradients: which of the inputs differentiated by have one.
    """

    forward: fx.GraphModule | None
    backward: fx.GraphModule
    saved: int
    inputs: tuple[int, ...]
    gradients: tuple[int, ...]


def recomputing(traced: Traced) -> Pullback:
    """The backward starts from the function's inputs and computes again what it needs of the forward."""
    return _pullback(traced, None, ())


def saving(traced: Traced) -> Pullback:
    """The forward also returns what the backward needs; weights, and views of anything, are taken from their source again."""
    saved = _residuals(traced)
    everything = [*traced.outputs, *saved]
    return _pullback(traced, _extract(traced.inputs, everything, always_tuple=True), saved)


def _pullback(traced: Traced, forward: fx.GraphModule | None, saved: Sequence[fx.Node]) -> Pullback:
    gradients = [_contiguous(traced.graph, g) for g in traced.gradients if g is not None]
    given = set(saved)
    read = _reachable(gradients, given)
    inputs = tuple(i for i, n in enumerate(traced.inputs) if n in read or info(n).kind == "weight")
    order = [*(traced.inputs[i] for i in inputs), *saved, *traced.cotangents]
    positions = tuple(i for i, g in enumerate(traced.gradients) if g is not None)
    return Pullback(forward, _extract(order, gradients), len(saved), inputs, positions)


def _contiguous(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """Gradients leave a function in one layout, so that blocks can share the function that takes them."""
    val = node.meta["val"]
    with val.fake_mode, torch.no_grad():
        plain = torch.empty(val.shape, dtype=val.dtype, device=val.device)
    if spec(val) == spec(plain):
        return node
    with graph.inserting_after(node):
        return call(
            graph,
            torch.ops.aten.clone.default,
            (node,),
            {"memory_format": torch.contiguous_format},
            like=node,
            made_by=info(node).made_by,
        )


def _residuals(traced: Traced) -> tuple[fx.Node, ...]:
    """What the backward reads of the forward, followed through views and sizes to tensors worth keeping."""
    backward: set[fx.Node] = set(traced.cotangents)
    for node in traced.graph.nodes:
        if any(a in backward for a in node.all_input_nodes):
            backward.add(node)
    targets = {g for g in traced.gradients if g is not None}
    wanted = _reachable(targets, set())
    waiting = [a for n in backward & wanted for a in n.all_input_nodes if a not in backward]
    waiting += [g for g in targets if g not in backward]
    kept: set[fx.Node] = set()
    seen: set[fx.Node] = set()
    while waiting:
        node = waiting.pop()
        if node in seen or node.op == "placeholder":
            continue
        seen.add(node)
        if _is_free(node):
            waiting += node.all_input_nodes
        else:
            kept.add(node)
    return tuple(n for n in traced.graph.nodes if n in kept)


def _is_free(node: fx.Node) -> bool:
    """A size, a view, or one of the tensors an operation returns as views."""
    if not isinstance(node.meta["val"], torch.Tensor | tuple | list):
        return True
    if node.target is operator.getitem:
        return bool(aliased_arguments(node.args[0]))  # type: ignore[arg-type]
    return bool(aliased_arguments(node))


def _reachable(targets: Iterable[fx.Node], stop: set[fx.Node]) -> set[fx.Node]:
    """Everything the targets are computed from, `stop` included but not what these come from."""
    waiting, found = list(targets), set()
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            if node not in stop:
                waiting += node.all_input_nodes
    return found


def _extract(inputs: Sequence[fx.Node], outputs: Sequence[fx.Node], *, always_tuple: bool = False) -> fx.GraphModule:
    """The part of a graph between some of its nodes and others, as a function."""
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for node in inputs:
        if node.op == "placeholder":
            env[node] = graph.node_copy(node)
        else:
            env[node] = graph.placeholder(f"saved_{node.name}")
            env[node].meta["val"] = node.meta["val"]
            set_info(env[node], kind="input", key=node.name, made_by=info(node).made_by)
    needed = _reachable(outputs, set(inputs))
    source = inputs[0].graph if inputs else outputs[0].graph
    for node in source.nodes:
        if node in needed and node not in env:
            env[node] = graph.node_copy(node, env.__getitem__)
    results = [env[n] for n in outputs]
    graph.output(results[0] if len(results) == 1 and not always_tuple else tuple(results))
    return fx.GraphModule({}, graph, class_name="Function")

