"""canonicalize: one spelling for each operation, nothing that computes nothing, every value bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import laws
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given
from models import EXAMPLES, SIZES, Function, Spec, Staged, few, make_slab, specs, staged
from torch import fx, nn

import squareq_fx
from squareq_fx.ir import Level, program, weight_inputs
from squareq_fx.passes import Canonicalize

aten = torch.ops.aten


@few
@given(specs())
@example(EXAMPLES[0])
@example(EXAMPLES[1])
@example(EXAMPLES[2])
@example(EXAMPLES[3])
def test_laws(spec: Spec) -> None:
    models = staged(spec)
    after = laws.apply(Canonicalize(), models.graphs["capture"], models)
    assert program(after).level == Level.CANONICAL
    for sizes in SIZES:
        call = spec.inputs(*sizes)
        expected = laws.eager(models.model, call)
        assert laws.same(laws.evaluate(after, models, call), expected)
        assert laws.same(laws.printed(after, models, call), expected)


def canonical(model: nn.Module, x: torch.Tensor) -> fx.GraphModule:
    """The model's canonical graph, after it was seen to compute the model's very bits."""
    slab = make_slab(model, (x,))
    graph = squareq_fx.capture(model, (x,))
    models = Staged(model.eval(), slab, {"capture": graph}, model)
    after = laws.apply(Canonicalize(), graph, models)
    assert laws.same(laws.evaluate(after, models, {"x": x}), laws.eager(model, (x,)))
    return after


def operations(gm: fx.GraphModule) -> list[Any]:
    return [n.target for n in gm.graph.nodes if n.op == "call_function"]


@pytest.mark.parametrize(
    "body",
    [
        lambda m, x: F.dropout(x, 0.5, m.training) + 1,
        lambda m, x: F.dropout1d(x, 0.5, m.training) + 1,
        lambda m, x: F.alpha_dropout(x, 0.5, m.training) + 1,
        lambda m, x: x.to(torch.float32) + 1,
        lambda m, x: x.to(x.device, torch.float32) + 1,
        lambda m, x: x.type_as(x * 2) + 1,
        lambda m, x: x[:] + 1,
        lambda m, x: x[:, 0:] + 1,
        lambda m, x: x.contiguous() + 1,
        lambda m, x: x.clone() + 1,
        lambda m, x: x.to(torch.bool).to(torch.bool).to(torch.float32) + 1,
    ],
    ids=[
        *("dropout", "feature_dropout", "alpha_dropout", "same_dtype", "same_device", "type_as"),
        *("whole_slice", "whole_dim", "contiguous", "clone", "cast_twice"),
    ],
)
def test_what_computes_nothing_is_gone(body: Callable[..., Any]) -> None:
    left = operations(canonical(Function(body), torch.randn(3, 4, 5)))
    assert [t for t in left if t is not aten.to.dtype] == [aten.add.Tensor]
    assert left.count(aten.to.dtype) == (2 if "bool" in body.__code__.co_names else 0)


def test_a_cast_or_copy_that_changes_something_stays() -> None:
    left = operations(canonical(Function(lambda m, x: x.to(torch.bfloat16).t().contiguous() * 2), torch.randn(3, 4)))
    assert aten.to.dtype in left and aten.contiguous.default in left
    assert aten.slice.Tensor in operations(canonical(Function(lambda m, x: x[1:] * 2), torch.randn(3, 4)))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (lambda m, x: torch.concat([x, x]), lambda m, x: torch.cat([x, x])),
        (lambda m, x: torch.concatenate([x, x]), lambda m, x: torch.cat([x, x])),
        (lambda m, x: x.absolute(), lambda m, x: x.abs()),
        (lambda m, x: torch.multiply(x, x), lambda m, x: x * x),
        (lambda m, x: torch.subtract(x, x + 1), lambda m, x: x - (x + 1)),
        (lambda m, x: torch.divide(x, x + 1), lambda m, x: x / (x + 1)),
        (lambda m, x: torch.negative(x), lambda m, x: -x),
        (lambda m, x: x.swapaxes(0, 1) * 2, lambda m, x: x.transpose(0, 1) * 2),
        (lambda m, x: x.swapdims(0, 1) * 2, lambda m, x: x.transpose(0, 1) * 2),
        (lambda m, x: x.half() * 2, lambda m, x: x.to(torch.float16) * 2),
        (lambda m, x: x.type_as(torch.ones(1, dtype=torch.half)) * 2, lambda m, x: x.half() * 2),
        (lambda m, x: x[1:] * 2, lambda m, x: torch.narrow(x, 0, 1, x.shape[0] - 1)[:] * 2),
    ],
    ids=[
        *("concat", "concatenate", "absolute", "multiply", "subtract", "divide", "negative", "swapaxes"),
        *("swapdims", "half", "type_as", "narrow"),
    ],
)
def test_one_spelling(one: Callable[..., Any], other: Callable[..., Any], request: pytest.FixtureRequest) -> None:
    x = torch.randn(3, 4)
    found, expected = (operations(canonical(Function(body), x)) for body in (one, other))
    if request.node.callspec.id == "narrow":  # its length is an expression, so it stays what it is
        assert aten.slice.Tensor in found and aten.narrow.default in expected
    elif request.node.callspec.id == "type_as":
        assert found[-2:] == expected[-2:] == [aten.to.dtype, aten.mul.Tensor]
    else:
        assert found == expected


def test_assertions_and_the_weights_only_they_looked_at_are_dropped() -> None:
    def body(m: Any, x: torch.Tensor) -> torch.Tensor:
        m.scale.to(torch.float32)
        torch._check(x.shape[0] < 1000)
        return x.float() * m.used

    model = Function(body, scale=torch.ones(2), used=torch.ones(4))
    captured = squareq_fx.capture(model, (torch.randn(3, 4),))
    after = canonical(model, torch.randn(3, 4))
    assert aten._assert_tensor_metadata.default in operations(captured)
    assert operations(after) == [aten.mul.Tensor] and list(weight_inputs(after)) == ["used"]


def test_sizes_are_computed_once() -> None:
    def body(m: Any, x: torch.Tensor) -> torch.Tensor:
        return x.reshape(x.shape[0] * x.shape[1], 4) + torch.ones(x.shape[0] * x.shape[1], 4)

    sizes = [
        n for n in canonical(Function(body), torch.randn(3, 2, 4)).graph.nodes if isinstance(n.meta.get("val"), torch.SymInt)
    ]
    assert len({str((n.target, n.args)) for n in sizes}) == len(sizes)


@pytest.mark.parametrize(
    "body",
    [
        lambda m, x: (x * 2, m.p.clone()),
        lambda m, x: (x * 2, m.p.clone().clone()[1:]),
        lambda m, x: (x * 2, x.clone()),
        lambda m, x: (x * 2, m.p.to(torch.float32, copy=True)),
        lambda m, x: (x * 2, torch.tensor([1.0, 2.0])),
    ],
    ids=["parameter", "twice", "input", "cast", "constant"],
)
def test_a_copy_that_is_returned_stays_a_copy(body: Callable[..., Any]) -> None:
    """Otherwise the caller would be handed the weight itself, and could change the model through it."""
    x = torch.randn(3, 4)
    model = Function(body, p=torch.randn(5, 4))
    graph = canonical(model, x)
    module = squareq_fx.emit.emit(graph, model, make_slab(model, (x,)))
    first = [t.clone() for t in module(x)]
    module(x)[1].fill_(7)
    assert all(map(torch.equal, module(x), first))


def test_equal_modules_become_equal_nodes() -> None:
    """The last block of diffusers models ends in another way than the others, but only in what it leaves unused."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.drop = nn.Linear(4, 4), nn.Dropout(0.1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.drop(self.a(x.to(x.dtype))).view(x.shape[0], -1, 4)

    model = Function(lambda m, x: m.two(m.one(x)), one=Layer(), two=Layer())
    lines = laws.normal_form(canonical(model, torch.randn(3, 2, 4)))
    views = [line.split(" = ")[1] for line in lines if "view" in line or "linear" in line]
    assert len(views) == 4
    assert views[1].split("(", 2)[2].split(",", 1)[1] == views[3].split("(", 2)[2].split(",", 1)[1]
