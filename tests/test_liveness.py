"""Which values share memory: held against where tensors really lie when the graph runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import example, given
from models import EXAMPLES, Function, Spec, few, make_slab, specs, staged
from torch import fx
from torch.utils import _pytree as pytree

import squareq_fx
from squareq_fx import ops
from squareq_fx.calls import flatten_call
from squareq_fx.ir import functions, info, program
from squareq_fx.liveness import last_use, shared_storage
from squareq_fx.weights import WeightValues


def storages(value: Any) -> set[int]:
    leaves = pytree.tree_leaves(value)
    return {t.untyped_storage().data_ptr() for t in leaves if isinstance(t, torch.Tensor) and t.numel()}


def real_storages(gm: fx.GraphModule, values: Callable[[fx.Node], Any]) -> dict[fx.Node, set[int]]:
    """Where each value lies when the graph runs on real tensors, all of which are kept alive."""

    class Run(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            if n.op == "placeholder":
                result = values(n)
            elif n.target in (ops.evict, ops.prefetch):
                result = None
            elif n.target is ops.load:
                result = torch.zeros(n.kwargs["nbytes"], dtype=torch.uint8)
            else:
                result = super().run_node(n)
            found[n] = (storages(result), result)
            return result

    found: dict[fx.Node, tuple[set[int], Any]] = {}
    with torch.no_grad():
        Run(gm).run()
    return {node: places for node, (places, _) in found.items()}


def assert_covers(gm: fx.GraphModule, values: Callable[[fx.Node], Any]) -> None:
    roots = shared_storage(gm)
    real = real_storages(gm, values)
    seen: list[fx.Node] = []
    for node, places in real.items():
        for other in seen:
            if real[other] & places:
                assert roots[node] & roots[other], f"{node.format_node()} shares memory with {other}, unseen"
        if places:
            seen.append(node)


@few
@given(specs())
@example(EXAMPLES[1])
@example(EXAMPLES[2])
def test_no_sharing_is_missed_at_any_stage(spec: Spec) -> None:
    models = staged(spec)
    given_call = flatten_call(spec.inputs())
    for gm in models.graphs.values():
        weights = WeightValues(models.model, models.slab, program(gm).constants)

        def value(node: fx.Node, weights: WeightValues = weights) -> torch.Tensor:
            key, val = str(info(node).key), node.meta["val"]
            return given_call[key] if info(node).kind == "input" else weights.tensor(key, val.dtype).clone()

        assert_covers(gm, value)


aten = torch.ops.aten
X = object()
"""Stands for the input, a 4 x 4 tensor."""
SAYS_NOTHING: list[tuple[Any, tuple[Any, ...]]] = [
    (aten.dropout.default, (X, 0.5, False)),
    (aten.feature_dropout.default, (X, 0.5, False)),
    (aten.alpha_dropout.default, (X, 0.5, False)),
    (aten.feature_alpha_dropout.default, (X, 0.5, False)),
    (aten.atleast_1d.default, (X,)),
    (aten.atleast_2d.default, (X,)),
    (aten.atleast_3d.default, (X,)),
    (aten.atleast_2d.Sequence, ([X, X],)),
    (aten.broadcast_tensors.default, ([X, X],)),
    (aten.einsum.default, ("ij->ji", [X])),
    (aten.unsafe_chunk.default, (X, 2)),
    (aten.unsafe_split.Tensor, (X, 2)),
    (aten.unsafe_split_with_sizes.default, (X, [1, 3])),
    (aten._unsafe_view.default, (X, [16])),
    (aten.type_as.default, (X, X)),
    (aten.sum_to_size.default, (X, [4, 4])),
    (aten.chain_matmul.default, ([X],)),
    (aten.conj_physical.default, (X,)),
    (aten.lift.default, (X,)),
    (aten.data.default, (X,)),
    (aten.to_dense.default, (X,)),
    (aten.dequantize.self, (X,)),
    (aten._cast_Float.default, (X,)),
]


@pytest.mark.parametrize(("operation", "arguments"), SAYS_NOTHING, ids=lambda v: str(v) if callable(v) else "")
def test_operators_that_return_views_without_saying_so(operation: Any, arguments: tuple[Any, ...]) -> None:
    assert not any(r.alias_info is not None for r in operation._schema.returns)
    x = torch.arange(16.0).reshape(4, 4)
    graph = fx.Graph()
    placeholder = graph.placeholder("x")
    graph.output(graph.call_function(operation, pytree.tree_map(lambda v: placeholder if v is X else v, arguments)))
    assert_covers(fx.GraphModule({}, graph), lambda node: x)


@pytest.mark.parametrize("operation", [aten.meshgrid.indexing, aten.cartesian_prod.default], ids=str)
def test_of_vectors(operation: Any) -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    options = {"indexing": "ij"} if operation is aten.meshgrid.indexing else {}
    graph.output(graph.call_function(operation, ([x],), options))
    assert_covers(fx.GraphModule({}, graph), lambda node: torch.arange(4.0))


def shown(body: Callable[..., Any], **state: Any) -> fx.GraphModule:
    model = Function(body, **state)
    x = torch.randn(3, 4)
    return squareq_fx.run(
        squareq_fx.capture(model, (x,)), squareq_fx.default_passes(make_slab(model, (x,))), until="canonicalize"
    )


def node(gm: fx.GraphModule, name: str) -> fx.Node:
    return next(n for n in gm.graph.nodes if n.name == name)


def test_views_of_views_and_parts_of_tuples_are_followed() -> None:
    gm = shown(lambda m, x: (m.p.chunk(2)[1].t()[0] * 2, x.unbind(0)[1] + 1), p=torch.randn(4, 4))
    roots = shared_storage(gm)
    p, x = node(gm, "p"), node(gm, "x")
    assert last_use(gm, p, roots) is node(gm, "mul") and last_use(gm, x, roots) is node(gm, "add")
    assert roots[node(gm, "chunk")] == roots[node(gm, "t")] == roots[node(gm, "select")] == {p}
    assert roots[node(gm, "mul")] == {node(gm, "mul")}


def test_a_value_nobody_reads_is_last_used_where_it_is_made() -> None:
    gm = shown(lambda m, x: x * 2)
    mul = node(gm, "mul")
    assert last_use(gm, mul, shared_storage(gm)).op == "output"
    alone = fx.Graph()
    x = alone.placeholder("x")
    alone.output(None)
    gm = fx.GraphModule({}, alone)
    assert last_use(gm, x, shared_storage(gm)) is x


def test_a_function_that_returns_what_it_was_given_is_looked_through() -> None:
    inner = fx.Graph()
    a, b = inner.placeholder("a"), inner.placeholder("b")
    inner.output((inner.call_function(aten.t.default, (a,)), inner.call_function(aten.add.Tensor, (b, 1))))
    outer = fx.Graph()
    x, y = outer.placeholder("x"), outer.placeholder("y")
    call = outer.call_module("f", (x, y))
    view = outer.call_function(torch.ops.aten.alias.default, (call,))
    outer.output(view)
    gm = fx.GraphModule({"f": fx.GraphModule({}, inner)}, outer)
    roots = shared_storage(gm)
    assert roots[call] == {x, call} and roots[view] == {x, call}, "y is only read"
    assert set(functions(gm)) == {"f"}
