"""A graph in steps: runs of nodes that compute, and between them the nodes that move memory."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import fx
from torch.fx.node import map_arg

from squareq_fx import ops

__all__ = ["Plan", "Step", "arguments", "evaluate", "plan"]

_MOVES = frozenset({ops.load, ops.evict, ops.keep, ops.prefetch, ops.offload, ops.fetch, ops.arrived})
_OF_SIZES = frozenset({"aten::sym_size", "aten::sym_stride", "aten::sym_numel", "aten::sym_storage_offset"})
_MODULES_OF_SIZES = frozenset({operator.add.__module__, math.floor.__module__, int.__module__})


@dataclass(frozen=True)
class Step:
    """Some nodes of a graph that run one after the other.

    Attributes:
        kind: "piece" if they compute; "move" if the first of them moves memory; "sizes" if none does either. In each, further
            nodes may take results apart or work out sizes: Python does that, no device.
        nodes: in an order in which they can run.
        reads: values of earlier steps and inputs of the graph that a piece reads, in order of first use.
        gives: values that later steps, or the graph's output, read.
        returned: those of `gives` that are outputs of the graph.
        dead: values, inputs of the graph too, that no later step reads.
        name: what errors call it.
    """

    kind: Literal["piece", "move", "sizes"]
    nodes: tuple[fx.Node, ...]
    reads: tuple[fx.Node, ...]
    gives: tuple[fx.Node, ...]
    returned: tuple[fx.Node, ...]
    dead: tuple[fx.Node, ...]
    name: str


@dataclass(frozen=True)
class Plan:
    """What `plan` makes of a graph.

    Attributes:
        inputs: its placeholders.
        attributes: its `get_attr` nodes.
        steps: everything between them and the output.
        output: the output's argument.
        fixed: inputs, attributes and loads whose values stay at one address from call to call.
        computed: values that pieces give.
        returned: values that the graph returns.
    """

    inputs: tuple[fx.Node, ...]
    attributes: tuple[fx.Node, ...]
    steps: tuple[Step, ...]
    output: Any
    fixed: frozenset[fx.Node]
    computed: frozenset[fx.Node]
    returned: frozenset[fx.Node]

    @property
    def pieces(self) -> int:
        return sum(step.kind == "piece" for step in self.steps)


def plan(gm: fx.GraphModule) -> Plan:
    """The longest runs of computing nodes with no node between them that moves memory, in the graph's order.

    A `getitem` joins the step that makes what it takes apart, so that no step waits for the whole of it; sizes join the step
    that makes the last of what they are worked out from.
    """
    kinds: list[Literal["piece", "move", "sizes"]] = ["sizes"]
    groups: list[list[fx.Node]] = [[]]
    step_of: dict[fx.Node, int] = {}
    inputs, attributes, output = [], [], None
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            inputs.append(node)
        elif node.op == "get_attr":
            attributes.append(node)
        elif node.op == "output":
            output = node
        else:
            made_in = max((step_of.get(n, 0) for n in node.all_input_nodes), default=0)
            if _is_sizes(node) or (_is_part(node) and kinds[made_in] == "piece"):
                step_of[node] = made_in
            else:
                kind: Literal["piece", "move"] = "move" if node.target in _MOVES else "piece"
                if kind == "move" or kinds[-1] != "piece":
                    kinds.append(kind)
                    groups.append([])
                step_of[node] = len(groups) - 1
            groups[step_of[node]].append(node)
    assert output is not None, "a graph has an output"
    returned = set(output.all_input_nodes)
    last_read = {node: index for index, group in enumerate(groups) for n in group for node in (n, *n.all_input_nodes)}
    dead: list[list[fx.Node]] = [[] for _ in groups]
    for node, index in last_read.items():
        if node not in returned:
            dead[index].append(node)
    steps = tuple(
        _step(kind, group, step_of, last_read, returned, dead[index]) for index, (kind, group) in enumerate(zip(kinds, groups))
    )
    fixed = {n for n in inputs if getattr(n.meta.get("squareq"), "kind", None) == "weight"}
    fixed.update(attributes, (n for n in step_of if n.target is ops.load))
    computed = frozenset(n for step in steps if step.kind == "piece" for n in step.nodes)
    return Plan(tuple(inputs), tuple(attributes), steps, output.args[0], frozenset(fixed), computed, frozenset(returned))


def evaluate(gm: fx.GraphModule, nodes: Iterable[fx.Node], values: dict[fx.Node, Any]) -> None:
    """Runs nodes of `gm` in order on `values`, and adds theirs."""
    for node in nodes:
        args, kwargs = arguments(node, values)
        if node.op == "call_module":
            values[node] = operator.attrgetter(str(node.target))(gm)(*args, **kwargs)
        elif node.op == "call_method":
            values[node] = getattr(args[0], str(node.target))(*args[1:], **kwargs)
        else:
            values[node] = node.target(*args, **kwargs)  # type: ignore[operator]


def arguments(node: fx.Node, values: Mapping[fx.Node, Any]) -> tuple[Any, Any]:
    """The node's arguments and keywords, with values in place of nodes."""
    return map_arg((node.args, node.kwargs), values.__getitem__)


def _step(
    kind: Literal["piece", "move", "sizes"],
    nodes: list[fx.Node],
    step_of: Mapping[fx.Node, int],
    last_read: Mapping[fx.Node, int],
    returned: set[fx.Node],
    dead: list[fx.Node],
) -> Step:
    own = set(nodes)
    reads = dict.fromkeys(a for n in nodes for a in n.all_input_nodes if a not in own)
    gives = tuple(n for n in nodes if n in returned or last_read[n] > step_of[n])
    blocks = dict.fromkeys(str(a.args[0]) for a in reads if a.target is ops.load)
    called = dict.fromkeys(str(n.target) for n in nodes if n.op == "call_module") or dict.fromkeys(n.name for n in nodes)
    name = ", ".join(called) + (f" on the weights of {', '.join(blocks)}" if blocks else "")
    out = tuple(n for n in gives if n in returned)
    return Step(kind, tuple(nodes), tuple(reads), gives, out, tuple(dead), name)


def _is_part(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target is operator.getitem


def _is_sizes(node: fx.Node) -> bool:
    """Does the node read and give integers only, or the size of a tensor?"""
    if node.op != "call_function" or _is_part(node):
        return False
    schema = getattr(node.target, "_schema", None)
    if schema is not None:
        return schema.name in _OF_SIZES
    if isinstance(node.meta.get("val"), torch.Tensor):
        return False
    of_torch = getattr(torch, getattr(node.target, "__name__", ""), None) is node.target
    return getattr(node.target, "__module__", None) in _MODULES_OF_SIZES or (
        of_torch and node.target.__name__.startswith("sym_")  # type: ignore[union-attr]
    )
