"""A graph with a backward, cut at the loss: what runs before it, what runs after, and what goes from one to the other."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import fx

from squareq_fx import ops
from squareq_fx.edit import drop_unused_functions, finish
from squareq_fx.errors import PassError
from squareq_fx.gradients.activity import output_nodes
from squareq_fx.ir import functions, info, program, set_info, update_program

__all__ = ["Halves", "forward_only", "halves"]


@dataclass(frozen=True)
class Halves:
    """Both halves take the inputs of the whole graph first, in their order.

    Attributes:
        forward: returns the model's outputs, then the saved values: tensors, and sizes.
        backward: takes the saved values too, and then one cotangent for each of `outputs`; returns the gradients.
        saved: names of the saved values.
        outputs: positions of the model's outputs that a gradient comes from.
    """

    forward: fx.GraphModule
    backward: fx.GraphModule
    saved: tuple[str, ...]
    outputs: tuple[int, ...]


def forward_only(gm: fx.GraphModule) -> fx.GraphModule:
    """The model's outputs alone; a graph without a backward comes back as it is. The arena's plan stays what it was."""
    if not program(gm).gradients:
        return gm
    before, _ = _cut(gm)
    loaded = {_visit(n) for n in before if n.target is ops.load}
    wanted = [n for n in before if n.target is not ops.prefetch or _visit(n) in loaded]
    return _half(gm, wanted, _model_outputs(gm), at_end=ops.evict)


def halves(gm: fx.GraphModule) -> Halves:
    """The two halves of a graph with a backward.

    What crosses is activations and sizes, never weights: a segment that is loaded at the cut is kept by the forward
    (`ops.keep`) and loaded again by the backward, which costs no copy unless another step has taken its bytes in between.

    Raises:
        PassError: the graph has no backward.
    """
    if not program(gm).gradients:
        raise PassError("this graph has no backward; run the differentiate pass, or compile with lora=Lora(...)")
    before, after = _cut(gm)
    readers = {n for n in after if n.target is not ops.cotangent}
    crossing = [n for n in before if n.target is not ops.load and any(u in readers for u in n.users)]
    cotangents = [n for n in after if n.target is ops.cotangent]
    again = _still_loaded(before)
    gradients = output_nodes(gm)[len(_model_outputs(gm)) :]
    return Halves(
        _half(gm, before, [*_model_outputs(gm), *crossing], at_end=ops.keep),
        _half(gm, [*again, *(n for n in after if n not in cotangents)], gradients, given=[*crossing, *cotangents]),
        tuple(n.name for n in crossing),
        tuple(int(n.args[1]) for n in cotangents),  # type: ignore[arg-type]
    )


def _cut(gm: fx.GraphModule) -> tuple[list[fx.Node], list[fx.Node]]:
    """The nodes before and from the first `cotangent` on, without inputs and output."""
    nodes = [n for n in gm.graph.nodes if n.op not in ("placeholder", "output")]
    at = next(i for i, n in enumerate(nodes) if n.target is ops.cotangent)
    return nodes[:at], nodes[at:]


def _model_outputs(gm: fx.GraphModule) -> list[fx.Node]:
    return list(output_nodes(gm)[: -len(program(gm).gradients)])


def _still_loaded(nodes: Iterable[fx.Node]) -> list[fx.Node]:
    nodes = list(nodes)
    evicted = {n.args[0] for n in nodes if n.target is ops.evict}
    return [n for n in nodes if n.target is ops.load and n not in evicted]


def _visit(node: fx.Node) -> tuple[object, object]:
    return node.args[0], node.kwargs["visit"]


def _half(
    gm: fx.GraphModule,
    nodes: Sequence[fx.Node],
    outputs: Sequence[fx.Node],
    *,
    given: Sequence[fx.Node] = (),
    at_end: object = None,
) -> fx.GraphModule:
    """Some of the graph's nodes as a graph of their own.

    Args:
        given: values of the whole graph that become further inputs.
        at_end: what is done with segments that are still loaded, `ops.evict` or `ops.keep`.
    """
    graph = fx.Graph()
    env = {n: graph.node_copy(n) for n in gm.graph.nodes if n.op == "placeholder"}
    for node in given:
        env[node] = graph.placeholder(node.name)
        env[node].meta["val"] = node.meta["val"]
        set_info(env[node], kind="input", key=node.name, made_by="halves")
    for node in nodes:
        env[node] = graph.node_copy(node, env.__getitem__)
    for load in _still_loaded(nodes) if at_end is not None else ():
        arguments = (env[load], load.args[0], load.kwargs["visit"])
        name = load.name.replace("load_", "evict_" if at_end is ops.evict else "keep_", 1)
        end = graph.create_node("call_function", at_end, arguments, name=name)  # type: ignore[arg-type]
        end.meta["val"] = None
        set_info(end, made_by="halves", key=info(load).key)
    graph.output(tuple(env[n] for n in outputs))
    half = fx.GraphModule(functions(gm), graph, class_name=type(gm).__name__)
    half.meta = dict(gm.meta)
    drop_unused_functions(half)
    return update_program(finish(half), gradients=())
